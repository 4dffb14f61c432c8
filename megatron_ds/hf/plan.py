"""What goes into the files: for every tensor of the model, the tensors of the export and where their values come from.

An entry is a box of one of the checkpoint's tensors under a Hugging Face name: all of it, the rows of the true
vocabulary, or one part of one expert of a stack. Boxes are read one by one, so the experts of a layer are never in
memory together. What only training needs (the running load of the experts) is left out.
"""

from dataclasses import dataclass
from math import prod

from megatron_ds.checkpoint.pieces import Box, sizes, whole
from megatron_ds.config.schema import ModelConfig, MoEConfig
from megatron_ds.hf.options import FORMATS, Format
from megatron_ds.hf.targets.common import NAMES, Target

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


def plan_entries(
    shapes: dict[str, tuple[int, ...]], model: ModelConfig, moe: MoEConfig | None, target: Target, precision: str
) -> list[Entry]:
    """Every tensor of the export, layer by layer, without the vocabulary's padding.

    Args:
        shapes: logical name -> full shape of every tensor of the model.
        model: the decoder; ``moe``: its experts, None for a dense one.
        target: the family; its names, and what it keeps in fp32.
        precision: key of FORMATS for everything else.
    """
    entries = []
    for name, shape in shapes.items():
        if not name.startswith("layers."):
            rows = shape[0] if name == "norm.weight" else model.vocab_size
            box = whole((rows, *shape[1:]))
            entries.append(Entry(NAMES[name], name, box, sizes(box), precision))
            continue
        _, layer, inside = name.split(".", 2)
        if not inside.startswith(TRAINING_ONLY):
            kept = "fp32" if inside in target.kept_fp32 else precision
            entries += _layer_entries(target, f"model.layers.{layer}.", inside, name, shape, kept)
        if inside == "mlp.router.weight" and moe.router.fine == "none" and "mlp.router.bias" in target.layer_names:
            entries += _layer_entries(target, f"model.layers.{layer}.", "mlp.router.bias", None, shape[:1], "fp32")
    return entries


def _layer_entries(
    target: Target, prefix: str, inside: str, source: str | None, shape: tuple[int, ...], precision: str
) -> list[Entry]:
    """The entries of one tensor of a layer; of a stack [experts, rows, columns], one for every part of every expert."""
    names = target.layer_names[inside]
    if isinstance(names, str):
        stored = (1, *shape) if inside in target.as_row else shape
        return [Entry(prefix + names, source, whole(shape), stored, precision)]
    num_experts, rows, columns = shape
    rows //= len(names)
    return [
        Entry(
            prefix + name.format(expert=expert),
            source,
            ((expert, expert + 1), (part * rows, (part + 1) * rows), (0, columns)),
            (rows, columns),
            precision,
        )
        for expert in range(num_experts)
        for part, name in enumerate(names)
    ]
