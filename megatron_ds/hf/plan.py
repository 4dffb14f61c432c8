"""What goes into the files: for every tensor of the model, the tensors of the export and where their values come from.

An entry is a box of one of the checkpoint's tensors under a Hugging Face name: all of it, the rows of the true
vocabulary, or one part of one expert of a stack. Boxes are read one by one, so the experts of a layer are never in
memory together. What only training needs (the running load of the experts) is left out.
"""

from dataclasses import dataclass
from math import prod

from megatron_ds.checkpoint.pieces import Box, sizes, whole
from megatron_ds.config.schema import RunConfig
from megatron_ds.hf.options import FORMATS, Format
from megatron_ds.hf.targets.common import NAMES, Target

ROUTER_BIAS = "mlp.router.bias"
"""Logical name inside a layer of the one tensor that training, too, always keeps in fp32."""

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


def plan_entries(shapes: dict[str, tuple[int, ...]], run: RunConfig, target: Target, precision: str) -> list[Entry]:
    """Every tensor of the export, layer by layer, without the vocabulary's padding.

    Args:
        shapes: logical name -> full shape of every tensor of the model.
        run: what was trained.
        target: the family; its names, and what it keeps in fp32.
        precision: key of FORMATS for everything else.
    """
    model, moe = run.megatron_ds.model, run.megatron_ds.moe
    entries = []
    for name, shape in shapes.items():
        rounding = held_precision(name, run, target, precision)
        if not name.startswith("layers."):
            rows = shape[0] if name == "norm.weight" else model.vocab_size
            box = whole((rows, *shape[1:]))
            entries.append(Entry(NAMES[name], name, box, sizes(box), precision, rounding))
            continue
        _, layer, inside = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if not inside.startswith(TRAINING_ONLY):
            kept = "fp32" if inside in target.kept_fp32 else precision
            entries += _layer_entries(target, prefix, inside, name, shape, (kept, rounding))
        if inside == "mlp.router.weight" and moe.router.fine == "none" and ROUTER_BIAS in target.layer_names:
            entries += _layer_entries(target, prefix, ROUTER_BIAS, None, shape[:1], ("fp32", "fp32"))
    return entries


def held_precision(name: str, run: RunConfig, target: Target, precision: str) -> str:
    """What the export rounds the tensor of a logical name to, a key of FORMATS.

    That is its precision, save for what the family keeps in fp32. Of that, the router's weights are rounded when the
    run computed with them in this very precision, so that the export routes as training did; its bias never is.
    """
    inside = name.split(".", 2)[-1]
    if inside not in target.kept_fp32:
        return precision
    return precision if inside != ROUTER_BIAS and run.dtype_name == precision else "fp32"


def _layer_entries(
    target: Target, prefix: str, inside: str, source: str | None, shape: tuple[int, ...], numbers: tuple[str, str]
) -> list[Entry]:
    """The entries of one tensor of a layer; of a stack [experts, rows, columns], one for every part of every expert.

    ``numbers``: precision and rounding.
    """
    names = target.layer_names[inside]
    if isinstance(names, str):
        stored = (1, *shape) if inside in target.as_row else shape
        return [Entry(prefix + names, source, whole(shape), stored, *numbers)]
    num_experts, rows, columns = shape
    rows //= len(names)
    return [
        Entry(
            prefix + name.format(expert=expert),
            source,
            ((expert, expert + 1), (part * rows, (part + 1) * rows), (0, columns)),
            (rows, columns),
            *numbers,
        )
        for expert in range(num_experts)
        for part, name in enumerate(names)
    ]
