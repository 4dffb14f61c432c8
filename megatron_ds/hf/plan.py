"""What goes into the files: for every tensor of the model, the tensors of the export and where their values come from.

An entry is a box of one of the checkpoint's tensors under a Hugging Face name: all of it, the rows of the true
vocabulary, or one part of one expert of a stack. Boxes are read one by one, so the experts of a layer are never in
memory together. What only training needs (the running load of the experts) is left out; what a family has in every
layer and the model has not is zeros, which change nothing.
"""

import re
from dataclasses import dataclass
from math import prod

from megatron_ds.checkpoint.pieces import Box, whole
from megatron_ds.config.schema import RunConfig
from megatron_ds.hf.options import FORMATS, Format
from megatron_ds.hf.targets.common import NAMES, Target

ROUTER_BIAS = "mlp.router.bias"
"""Logical name inside a layer of the one tensor that training, too, always keeps in fp32."""

ROUNDED = "rounded"
"""Key of the trainer's state of an imported checkpoint: ``Plan.rounded``."""

TRAINING_ONLY = "mlp.balance."
"""Logical names inside a layer that begin so are no part of the model."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the export."""

    name: str
    """Its name in the file."""
    source: str | None
    """The checkpoint's tensor that has the values; None: all are zero."""
    box: Box
    """Which part of that tensor."""
    shape: tuple[int, ...]
    """Shape in the file, of as many elements as the box."""
    precision: str
    """Key of FORMATS."""
    rounding: str
    """Key of FORMATS, no finer than ``precision``: what the values are rounded to."""

    @property
    def format(self) -> Format:
        """Number format in the file."""
        return FORMATS[self.precision]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.format.itemsize


@dataclass(frozen=True)
class Plan:
    """Which tensors an export has; of MTP blocks apart, since they may have a directory of their own."""

    shapes: dict[str, tuple[int, ...]]
    """Logical name -> full shape of every tensor of the model."""
    run: RunConfig
    """What was trained."""
    target: Target
    """The family; its names, and what it keeps in fp32."""
    precision: str
    """Key of FORMATS for everything else."""
    computed: str = "fp32"
    """``computed_precision`` of the weights."""
    rounded: frozenset[str] = frozenset()
    """Logical names inside a layer that the family keeps in fp32 and this model came without: imported so, and not
    trained."""

    def main(self) -> list[Entry]:
        """Every tensor of the main model, layer by layer, without the vocabulary's padding."""
        entries = []
        for name, shape in self.shapes.items():
            if name.startswith("layers."):
                entries += self._layer(f"model.layers.{name.split('.')[1]}.", name, shape)
            elif name == "norm.weight":
                entries.append(self._whole(NAMES[name], name, shape))
            elif name in NAMES:
                entries.append(self._vocabulary(NAMES[name], name))
        if self.target.untied and "output.weight" not in self.shapes:
            entries.append(self._vocabulary(NAMES["output.weight"], "output.weight"))
        return entries

    def mtp(self) -> list[Entry]:
        """Every tensor of the MTP blocks, with a copy of embedding and output in each, since vLLM reads them there."""
        model, layout = self.run.megatron_ds.model, self.target.mtp
        assert layout is not None, f"{self.target.model_type} has no place for MTP blocks; place_mtp tells"
        entries = []
        for block in range(model.mtp_num_layers):
            own, prefix = f"mtp.{block}.", f"model.layers.{model.num_layers + block}."
            for name, shape in self.shapes.items():
                if name.startswith(own + "layer."):
                    entries += self._layer(prefix, name, shape)
                elif name.startswith(own):
                    entries.append(self._whole(prefix + layout.names[name.removeprefix(own)], name, shape))
            entries.append(self._vocabulary(prefix + layout.embedding, "embedding.weight"))
            entries.append(self._vocabulary(prefix + layout.output, "output.weight"))
        return entries

    def _whole(self, name: str, source: str, shape: tuple[int, ...]) -> Entry:
        return Entry(name, source, whole(shape), shape, self.precision, self.precision)

    def _vocabulary(self, name: str, source: str) -> Entry:
        """Embedding or output without its padding; a tied model has but one weight for both."""
        model = self.run.megatron_ds.model
        held = source if source in self.shapes else "embedding.weight"
        return self._whole(name, held, (model.vocab_size, model.hidden_size))

    def _layer(self, prefix: str, name: str, shape: tuple[int, ...]) -> list[Entry]:
        """The entries of one tensor of a decoder layer; after a router's, what the layer lacks and the family has."""
        inside = inside_layer(name)
        if inside.startswith(TRAINING_ONLY):
            return []
        rounding = held_precision(name, self.computed, self.target, self.precision)
        entries = self._tensor(prefix, inside, name, shape, rounding)
        if inside == "mlp.router.weight":
            for lacking, zeros in self._lacking(*shape).items():
                entries += self._tensor(prefix, lacking, None, zeros, self._kept(lacking))
        return entries

    def _kept(self, inside: str) -> str:
        """Precision in the file."""
        return "fp32" if inside in self.target.kept_fp32 and inside not in self.rounded else self.precision

    def _lacking(self, num_experts: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Logical name and shape of what the family has in every layer with experts and the model has not."""
        ours = self.run.megatron_ds
        lacking: dict[str, tuple[int, ...]] = {}
        if ours.moe.router.fine == "none" and ROUTER_BIAS in self.target.layer_names:
            lacking[ROUTER_BIAS] = (num_experts,)
        if ours.moe.moe_shared_expert_intermediate_size is None and self.target.always_shared:
            width = ours.moe.moe_ffn_hidden_size or ours.model.ffn_size
            lacking |= dict.fromkeys(("mlp.shared.gate.weight", "mlp.shared.up.weight"), (width, hidden_size))
            lacking["mlp.shared.down.weight"] = (hidden_size, width)
        return lacking

    def _tensor(
        self, prefix: str, inside: str, source: str | None, shape: tuple[int, ...], rounding: str
    ) -> list[Entry]:
        """The entries of one tensor; of experts, stacked as [E, (parts,) rows, columns], one for every part of each."""
        names, kept = self.target.layer_names[inside], self._kept(inside)
        if isinstance(names, str):
            stored = (1, *shape) if inside in self.target.as_row else shape
            return [Entry(prefix + names, source, whole(shape), stored, kept, rounding)]
        num_experts, rows, columns = shape[0], *shape[-2:]
        return [
            Entry(
                prefix + name.format(expert=expert),
                source,
                ((expert, expert + 1), *((part, part + 1) for _ in shape[1:-2]), (0, rows), (0, columns)),
                (rows, columns),
                kept,
                rounding,
            )
            for expert in range(num_experts)
            for part, name in enumerate(names)
        ]


def held_precision(name: str, computed: str, target: Target, precision: str) -> str:
    """What the export rounds the tensor of a logical name to, a key of FORMATS.

    That is its precision, save for what the family keeps in fp32. Of that, the router's weights are rounded when the
    run computed with them in this very precision, so that the export routes as training did; its bias never is.

    ``computed``: ``computed_precision`` of what is exported.
    """
    inside = inside_layer(name)
    if inside not in target.kept_fp32:
        return precision
    return precision if inside != ROUTER_BIAS and computed == precision else "fp32"


def computed_precision(step: int, run: RunConfig) -> str:
    """What training computed with the weights of a step in; those of step 0 were imported, and are as they were."""
    return run.dtype_name if step else "fp32"


def inside_layer(name: str) -> str:
    """What follows the decoder layer in a logical name, be it one of the list or that of an MTP block."""
    return re.sub(r"^(layers\.\d+|mtp\.\d+\.layer)\.", "", name)
