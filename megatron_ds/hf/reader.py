"""A Hugging Face directory as a source of weights: any part of any tensor of a run's model, wherever its values lie.

The entries of an export's plan say which box of which tensor of ours a Hugging Face tensor holds. Reading goes the
other way: of the entries that a wanted box overlaps, the common part is read, and so a rank touches the bytes of its
own slices only. Names therefore stand in one place, and what is added here is what the files of others may have:
experts stacked as transformers has them in memory, an output beside the embedding that it is tied to, blocks of multi-
token prediction that the run has not, channels of a head in the other of two orders.
"""

import re
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.pieces import Box, intersection, range_boxes, sizes, volume, whole
from megatron_ds.config.model_schema import LatentAttention, ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import MegatronDs, RunConfig
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.decoder import tensor_shapes
from megatron_ds.hf.plan import ROUTER_BIAS, TRAINING_ONLY, Entry, Plan, inside_layer
from megatron_ds.hf.sections import Sections, read_sections
from megatron_ds.hf.targets.common import NAMES
from megatron_ds.hf.tensors import first_few, open_tensors

EMBEDDING, OUTPUT = "embedding.weight", "output.weight"

MEMORY_NAMES = {
    "mlp.experts.gate_up": ("mlp.experts.gate_up_proj",),
    "mlp.experts.down": ("mlp.experts.down_proj",),
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.router.bias": ("mlp.gate.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias"),
}
"""Logical name inside a layer -> what transformers 5 calls the tensor in memory, and in files of that layout."""

IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq$|mtp_)")
"""Tensors that follow from config.json, and are in old files all the same; and ERNIE's blocks for drafts, which stock
transformers passes over, too."""

LAYER = re.compile(r"model\.layers\.(\d+)\.")

MEAN_LOAD = 1.0
"""What training takes for the load of an expert before the first step."""

UNTIE = (
    "untie them with tie_word_embeddings false in config.json, or for a run with "
    "model.untie_embeddings_and_output_weights true"
)


def open_hugging_face(directory: Path) -> "HuggingFaceModel":
    """Open a Hugging Face directory.

    Raises ConfigError when config.json describes no model that ours can be, CheckpointError when the files do not hold
    that model.
    """
    return HuggingFaceModel(read_sections(Path(directory)))


class HuggingFaceModel:
    """A directory whose tensors are those of the model that its config.json describes, in name and shape.

    Attributes:
        model: the model section; as many blocks of multi-token prediction as the files have, whatever they declare.
        moe: its experts.
        entries: logical name -> the Hugging Face tensors that hold it.
        copies: the same for tensors that repeat what ``entries`` has.
        zeros: tensors that every model of the family has and this one has not, whose values must be zero.
    """

    def __init__(self, sections: Sections) -> None:
        """Raises CheckpointError naming the tensors that are missing, unknown or of another shape."""
        self.path, self.sections, self.moe = sections.path, sections, sections.moe
        self.stored = open_tensors(sections.path, sections.block)
        self.model = sections.model.model_copy(update={"mtp_num_layers": self._count_blocks()})
        self.shapes = tensor_shapes(self.model, self.moe)
        self.entries: dict[str, list[Entry]] = {}
        self.copies: dict[str, list[Entry]] = {}
        self.zeros: list[Entry] = []
        self._place()
        self._require_all()

    def weights(self, model: ModelConfig, moe: MoEConfig | None) -> "HuggingFaceWeights":
        """The weights of a run's model; CheckpointError when the directory's is another one."""
        return HuggingFaceWeights(self, model, moe)

    def holds_values(self, entry: Entry) -> bool:
        """Whether any element of a Hugging Face tensor is not zero."""
        return bool(self.read(entry, entry.box).any())

    def read(self, entry: Entry, part: Box) -> Tensor:
        """A part of the entry's box, in its shape and in fp32."""
        inside = tuple((lo - first, hi - first) for (lo, hi), (first, _) in zip(part, entry.box))
        return self.stored[entry.name].read(sizes(entry.box), inside).float().view(sizes(part))

    def _count_blocks(self) -> int:
        """Blocks of multi-token prediction: layers behind the last one, in a family that has them."""
        if self.sections.target.mtp is None:
            return 0
        layers = {int(match[1]) for match in map(LAYER.match, self.stored) if match}
        return sum(layer >= self.sections.model.num_layers for layer in layers)

    def _place(self) -> None:
        """Sort what an export of this model would write by the tensor of ours that it is a part of."""
        run = RunConfig(megatron_ds=MegatronDs(model=self.model, moe=self.moe))
        plan, output = Plan(self.shapes, run, self.sections.target, "fp32"), NAMES[OUTPUT]
        main, groups = plan.main(), {}
        if output in self.stored and all(entry.name != output for entry in main):
            shape = (self.model.vocab_size, self.model.hidden_size)
            main.append(Entry(output, OUTPUT, whole(shape), shape, "fp32", "fp32"))
        for entry in main:
            source = OUTPUT if entry.name == output else entry.source
            groups.setdefault(source, []).append(entry)
        for entry in plan.mtp() if self.model.mtp_num_layers else ():
            if not entry.source.startswith("mtp."):
                self.copies.setdefault(entry.source, []).append(entry)
            else:
                groups.setdefault(entry.source, []).append(entry)
        self.copies = {source: self._present(entries) for source, entries in self.copies.items()}
        self.zeros = self._present(groups.pop(None, []))
        self.entries = {source: self._as_stored(source, entries) for source, entries in groups.items()}

    def _present(self, entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.name in self.stored]

    def _as_stored(self, source: str, entries: list[Entry]) -> list[Entry]:
        """The entries, or the one under the name that transformers 5 has in memory if the files have that."""
        inside, layer = inside_layer(source), LAYER.match(entries[0].name)
        other = [layer[0] + name for name in MEMORY_NAMES.get(inside, ())] if layer else []
        found = [name for name in other if name in self.stored]
        if not found or entries[0].name in self.stored:
            return entries
        shape = self.shapes[source]
        is_stack = not isinstance(self.sections.target.layer_names[inside], str)
        stored = (shape[0], prod(shape[1:-1]), shape[-1]) if is_stack else entries[0].shape
        return [replace(entries[0], name=found[0], box=whole(shape), shape=stored)]

    def _require_all(self) -> None:
        """CheckpointError unless names and shapes are those of the entries."""
        groups = [*self.entries.values(), *self.copies.values(), self.zeros]
        entries = {entry.name: entry for group in groups for entry in group}
        problems = [f"{name} is missing" for name in entries if name not in self.stored]
        problems += [f"{name} is unknown" for name in self.stored if name not in entries and not IGNORED.search(name)]
        problems += [
            f"{name} is {list(self.stored[name].shape)} instead of {list(entry.shape)}"
            for name, entry in entries.items()
            if name in self.stored and self.stored[name].shape != entry.shape
        ]
        if problems:
            family = self.sections.target.model_type
            raise CheckpointError(
                f"{self.path}: does not hold the {family} that its config.json describes: {first_few(problems)}"
            )


class HuggingFaceWeights:
    """The weights of a run's model, read from a directory: a ``WeightSource``.

    Rows that pad the vocabulary are zeros, as at initialisation: they stand for no token, their logits are masked, and
    a mean would only put something into norms and averages. So are router biases that the directory has not, and the
    loads of experts, which only training knows, are at their mean. An output of its own begins as the embedding that
    the directory ties it to.
    """

    def __init__(self, directory: HuggingFaceModel, model: ModelConfig, moe: MoEConfig | None) -> None:
        """Raises CheckpointError when the directory has a tensor of another shape, none, or one too many."""
        self.path, self._directory, self._model = directory.path, directory, model
        self._shapes = tensor_shapes(model, moe)
        self._entries, self._copies = dict(directory.entries), dict(directory.copies)
        self._turned = model.rotary_interleaved != directory.model.rotary_interleaved
        self._orders: dict[str, Tensor | None] = {}
        self.notes: list[str] = []
        """What was passed over, one line each."""
        self._settle_output()
        self._require_same(moe)

    def shapes(self, kind: str = "weight") -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor of the run's model; a directory has no other kinds."""
        return dict(self._shapes) if kind == "weight" else {}

    def read_range(self, name: str, kind: str, box: Box, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of the flattened ``box`` of a tensor: 1-D, fp32, on the CPU.

        CheckpointError when a file cannot be read, or has two values for one weight.
        """
        assert kind == "weight", f"{self.path} has no {kind}"
        values = torch.empty(length)
        for part, offset in range_boxes(box, start, length):
            values[offset : offset + volume(part)] = self._in_order(name, part).flatten()
        return values

    def _in_order(self, name: str, box: Box) -> Tensor:
        """A box with its rows in the run's order of the channels of a head."""
        order = self._order(name)
        if order is None:
            return self._read(name, box)
        row = order[slice(*box[0])]
        first = int(row.min())
        return self._read(name, ((first, int(row.max()) + 1), *box[1:]))[row - first]

    def _order(self, name: str) -> Tensor | None:
        """The directory's row of every row of ours; None when they are the same."""
        if not self._turned:
            return None
        if name not in self._orders:
            self._orders[name] = rotary_order(self._model, inside_layer(name))
        return self._orders[name]

    def _read(self, name: str, box: Box) -> Tensor:
        """A box as the directory has it."""
        is_load = inside_layer(name).startswith(TRAINING_ONLY)
        values = torch.full(sizes(box), MEAN_LOAD if is_load else 0.0)
        for entry, view, part in self._overlaps(self._entries, name, box, values):
            view.copy_(self._directory.read(entry, part))
        for entry, view, part in self._overlaps(self._copies, name, box, values):
            if not torch.equal(view, self._directory.read(entry, part)):
                fix = UNTIE if entry.name == NAMES[OUTPUT] else "leave the blocks out with model.mtp_num_layers 0"
                pair = f"{entry.name} differs from {self._entries[name][0].name}"
                raise CheckpointError(f"{self.path}: {pair}, and the model has one weight for both; {fix}")
        return values

    @staticmethod
    def _overlaps(entries: dict[str, list[Entry]], name: str, box: Box, values: Tensor):
        """Each entry of a tensor that overlaps the box, the place of the common part in ``values``, and that part."""
        for entry in entries.get(name, ()):
            part = intersection(box, entry.box)
            if part is not None:
                yield entry, values[tuple(slice(lo - at, hi - at) for (lo, hi), (at, _) in zip(part, box))], part

    def _settle_output(self) -> None:
        """A run with one weight for both ends reads the output as a copy; one with two, a missing one as the other."""
        if OUTPUT not in self._shapes and OUTPUT in self._entries:
            self._copies[EMBEDDING] = [*self._copies.get(EMBEDDING, ()), *self._entries.pop(OUTPUT)]
        elif OUTPUT in self._shapes and OUTPUT not in self._entries:
            self._entries[OUTPUT] = self._entries[EMBEDDING]

    def _require_same(self, moe: MoEConfig | None) -> None:
        """CheckpointError unless the directory has what the run's model needs, and nothing else but zeros."""
        problems, vocabulary = [], (self._model.vocab_size, self._model.hidden_size)
        for name, shape in self._shapes.items():
            inside = inside_layer(name)
            if name in self._entries:
                padded = name in (EMBEDDING, OUTPUT)
                held = self._entries[name][0].shape if padded else self._directory.shapes[name]
                expected = vocabulary if padded else shape
                if held != expected:
                    problems.append(f"{name} is {list(held)}, the configured model's {list(expected)}")
            elif inside != ROUTER_BIAS and not inside.startswith(TRAINING_ONLY):
                problems.append(f"{name} is missing")
        zeros = list(self._directory.zeros)
        for name, entries in self._entries.items():
            if name not in self._shapes and not name.startswith("mtp."):
                zeros += entries
        problems += [f"{entry.name} is not zero" for entry in zeros if self._directory.holds_values(entry)]
        if problems:
            raise CheckpointError(f"{self.path}: holds another model than the configured one: {first_few(problems)}")
        unused = self._directory.model.mtp_num_layers - self._model.mtp_num_layers
        if unused > 0:
            self.notes.append(f"{unused} block(s) of multi-token prediction in {self.path} are not read")


def rotary_order(model: ModelConfig, inside: str) -> Tensor | None:
    """Row of a tensor in the other rotary convention, for every row in the model's; None when there is no difference.

    Pairs are neighbours in the one, and half a head apart in the other: in every head the rows of rotary channels
    change places, those of plain channels stay.

    Args:
        model: ``rotary_interleaved`` is the convention of the rows that are wanted.
        inside: the tensor's logical name inside a layer.
    """
    heads, plain = _heads(model).get(inside.removesuffix(".weight").removesuffix(".bias"), (0, 0))
    if not heads:
        return None
    pairs = model.rotary_dim // 2
    channel = torch.arange(model.rotary_dim)
    turned = channel.view(2, pairs).T if model.rotary_interleaved else channel.view(pairs, 2).T
    within = torch.cat([torch.arange(plain), plain + turned.flatten()])
    return (torch.arange(heads)[:, None] * len(within) + within).flatten()


def _heads(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Logical name of a module -> how many heads its rows are, and plain channels before the rotary ones of each."""
    heads, latent = model.num_attention_heads, model.attention
    if not isinstance(latent, LatentAttention):
        norms = dict.fromkeys(("attention.query_norm", "attention.key_norm"), (1, 0))
        return norms | {"attention.query": (heads, 0), "attention.key": (model.num_kv_heads, 0)}
    queries = dict.fromkeys(("attention.query", "attention.query_up"), (heads, latent.qk_head_dim))
    return queries | {"attention.key_value_down": (1, latent.kv_lora_rank)}
