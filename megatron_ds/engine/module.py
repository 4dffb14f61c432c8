"""One pipeline stage of the model as a DeepSpeed ``PipelineModule``.

The layers are the same as in ``model.decoder.Decoder``; only the container differs. DeepSpeed names submodules by their
index in the layer list and tied ones by their key; ``logical_names`` turns both into the names that checkpoints use.
"""

import contextlib
import io
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.context import Context
from megatron_ds.model.cost import layer_costs
from megatron_ds.model.decoder import LayerEntry, layer_list, run
from megatron_ds.model.moe.layer import Anchor
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.model.vocabulary import tied_output
from megatron_ds.parallel.groups import Groups
from megatron_ds.pipeline.partition import partition


class StageModule(PipelineModule):
    """The layers of this rank's stage."""

    def __init__(self, model: ModelConfig, moe: MoEConfig | None, groups: Groups, recompute: str | None):
        entries = layer_list(model, moe, groups)
        # nn.Module's __setattr__ needs its __init__, which PipelineModule runs only after it partitions the layers.
        object.__setattr__(self, "_stage_bounds", stage_bounds(model, moe, groups.topology.pipe))
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints its layers on every construction
            super().__init__([_layer_spec(entry) for entry in entries], topology=groups.deepspeed_topology())
        self.model_config, self.entries, self.recompute = model, entries, recompute
        has_experts = any(isinstance(module, SparseMLP) for module in self.modules())
        self.anchor = None if groups.experts is None or has_experts else Anchor(groups)

    def _partition_layers(self, method: str) -> None:
        self.parts = self._stage_bounds
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def forward(
        self,
        x: Tensor,
        document_BS: Tensor,
        position_BS: Tensor,
        **progress: Any,
    ) -> Tensor:
        """Run the stage.

        Args:
            x: token_BS on the first stage, x_BSD on the others.
            document_BS, position_BS: packing of the sample, see ``data.loader.Batch``.
            progress: step, dropout_seed and the like, see ``Context.build``.

        Returns:
            x_BSD, or logits_BSV from the last stage.
        """
        context = Context.build(self.model_config, document_BS, position_BS, **progress)
        if self.anchor is not None and x.is_floating_point():  # the first stage has no input that could carry it
            return run(self.forward_funcs, self.anchor(x), context, self.recompute)
        x = run(self.forward_funcs, x, context, self.recompute)
        return x if self.anchor is None or self.stage_id > 0 else self.anchor(x)

    def logical_names(self) -> dict[str, Tensor]:
        """This stage's parameters and buffers under their checkpoint names; the anchor is no weight and has none."""
        names = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            head, _, rest = name.partition(".")
            if head == "tied_modules":
                names[rest] = tensor
            elif head != "anchor":
                names[f"{self.entries[int(head)].name}.{rest}"] = tensor
        return names


def stage_bounds(model: ModelConfig, moe: MoEConfig | None, num_stages: int) -> list[int]:
    """Boundaries of the stages in the layer list: equal cost, and at least one decoder layer in each.

    Cost is training FLOPs per token. Every stage needs a decoder layer so that its optimizer has the same parameter
    groups as the others, which DeepSpeed's gradient norm relies on. So the cut runs over the decoder layers; embedding,
    norm and output go with the outermost ones.
    """
    first, *layers, norm, output = layer_costs(model, moe)
    layers[0] += first
    layers[-1] += norm + output
    inner = partition(layers, num_stages)[1:-1]
    return [0, *(1 + layer for layer in inner), len(layers) + 3]


def _layer_spec(entry: LayerEntry) -> LayerSpec:
    if entry.tied:
        forward = None if entry.name == "embedding" else tied_output
        return TiedLayerSpec("embedding", entry.kind, *entry.arguments, forward_fn=forward, tied_weight_attr="weight")
    return LayerSpec(entry.kind, *entry.arguments)
