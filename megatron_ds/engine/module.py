"""One rank's chunks of the model as a DeepSpeed ``PipelineModule``.

The layers are the same as in ``model.decoder.Decoder``; only the container differs. A rank of the pipeline holds one
stage, or several virtual ones (chunks), wherever the schedule places them. DeepSpeed names submodules by their index in
the layer list and tied ones by their key; ``logical_names`` turns both into the names that checkpoints use.
"""

import contextlib
import io
from collections.abc import Sequence

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from megatron_ds.model.context import Context
from megatron_ds.model.decoder import LayerEntry, run
from megatron_ds.model.moe.layer import Anchor
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.parallel.groups import Groups
from megatron_ds.pipeline.schedule import Placement


class StageModule(PipelineModule):
    """The layers of this rank, chunk by chunk."""

    def __init__(
        self,
        entries: Sequence[LayerEntry],
        bounds: Sequence[int],
        placement: Placement,
        groups: Groups,
        recompute: str | None = None,
    ):
        """Build this rank's share of ``entries``; collective over the world.

        Args:
            entries: all layers.
            bounds: virtual stage s holds entries ``[bounds[s], bounds[s + 1])``.
            placement: which rank holds which virtual stage.
            groups: this rank's place.
            recompute: see ``decoder.run``.
        """
        ranks, rank = groups.topology.pipe, groups.index("pipe")
        stages = [placement.stage(rank, chunk, ranks) for chunk in range((len(bounds) - 1) // ranks)]
        # PipelineModule's __init__ builds the layers from these; before it, a module takes no attributes.
        for name, value in (("stages", stages), ("_bounds", list(bounds)), ("_placement", placement)):
            object.__setattr__(self, name, value)
        self.chunks: list[list]
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints its layers on every construction
            super().__init__([_layer_spec(entry) for entry in entries], topology=groups.deepspeed_topology())
        self.entries, self.recompute = entries, recompute
        has_experts = any(isinstance(module, SparseMLP) for module in self.modules())
        self.anchor = None if groups.experts is None or has_experts else Anchor(groups)

    def _partition_layers(self, method: str) -> None:
        self.parts = self._bounds

    def stage_owner(self, layer_idx: int) -> int:
        """Pipeline rank that holds a layer."""
        stage = sum(bound <= layer_idx for bound in self._bounds[1:])
        return self._placement.rank_and_chunk(stage, self._topo.get_dim("pipe"))[0]

    def _build(self) -> None:
        chunks = []
        for stage in self.stages:
            self._set_bounds(self._bounds[stage], self._bounds[stage + 1])
            self.forward_funcs = []
            super()._build()
            chunks.append(self.forward_funcs)
        self.chunks = chunks

    def is_first(self, chunk: int) -> bool:
        """Whether a chunk begins the model."""
        return self.stages[chunk] == 0

    def is_last(self, chunk: int) -> bool:
        """Whether a chunk ends the model: its output are the logits."""
        return self.stages[chunk] == len(self._bounds) - 2

    def forward(self, x: Tensor, context: Context, *, chunk: int = 0) -> Tensor:
        """Run a chunk.

        Args:
            x: token_BS on the first virtual stage, x_BSD on the others.
            context: of the micro-batch.
            chunk: which of this rank's.

        Returns:
            x_BSD, or logits_BSV from the last virtual stage.
        """
        anchored = self.anchor is not None and chunk == 0
        if anchored and not self.is_first(chunk):  # token ids could not carry it
            x = self.anchor(x)
        x = run(self.chunks[chunk], x, context, self.recompute)
        return self.anchor(x) if anchored and self.is_first(chunk) else x

    @property
    def shared_embedding(self) -> nn.Module | None:
        """The embedding, if both ends of the model are here and both use it."""
        both = 0 in self.stages and len(self._bounds) - 2 in self.stages
        return self.tied_modules["embedding"] if both and "embedding" in self.tied_modules else None

    def logical_names(self) -> dict[str, Tensor]:
        """This rank's parameters and buffers under their checkpoint names; the anchor is no weight and has none."""
        names = {}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            head, _, rest = name.partition(".")
            if head == "tied_modules":
                names[rest] = tensor
            elif head != "anchor":
                names[f"{self.entries[int(head)].name}.{rest}"] = tensor
        return names


def _layer_spec(entry: LayerEntry) -> LayerSpec:
    if entry.tied:
        return TiedLayerSpec(
            "embedding", entry.kind, *entry.arguments, forward_fn=entry.call, tied_weight_attr="weight"
        )
    return LayerSpec(entry.kind, *entry.arguments)
