"""What one rank has to hold: its part of the parameters, their gradients and optimizer states, and activations.

The number of parameters and the bytes of their states are exact; they follow from how layers are cut over tensor and
expert ranks (``parallel/shard.py``) and what ZeRO shards over data ranks. Activations are an estimate: what autograd
keeps of a layer between its passes, from the products up, with evenly loaded experts. Allocator, message buffers and
the workspace of kernels are not counted. How many micro-batches are under way is the schedule's business.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config.model_schema import LatentAttention, ModelConfig
from megatron_ds.config.moe_schema import MoEConfig, has_experts
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.model.cost import layer_parameters

WHOLE = ("attention.whole", "norm", "projection", "router")
"""Parts that every tensor-parallel rank holds whole, see ``cost.layer_parameters``."""


# --- parameters -----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """Parameters on one rank."""

    dense: int
    """Those that all its data-parallel ranks hold, too."""
    experts: int
    """Those of its routed experts, which only every ``expert_model_parallel_size``-th of them holds."""


def held_parameters(parts: Counter[str], parallel: ParallelConfig, num_kv_heads: int) -> Held:
    """What one rank holds of these parts of the model, which ``cost.layer_parameters`` counts."""
    ranks = parallel.tensor_model_parallel_size
    divisor = dict.fromkeys(WHOLE, 1) | {"attention.groups": min(ranks, num_kv_heads)}
    dense = sum(size // divisor.get(part, ranks) for part, size in parts.items() if part != "experts")
    shards = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return Held(dense, parts["experts"] // shards)


def stage_parameters(
    model: ModelConfig,
    moe: MoEConfig | None,
    parallel: ParallelConfig,
    bounds: Sequence[int],
    stages_of_ranks: Sequence[Sequence[int]],
) -> list[Held]:
    """Parameters on a rank of every pipeline rank; each of its tensor and data ranks has as many.

    Args:
        model, moe, parallel: of the run.
        bounds: virtual stage s holds entries ``[bounds[s], bounds[s + 1])`` of the layer list.
        stages_of_ranks: the virtual stages of every pipeline rank.
    """
    entries, last = layer_parameters(model, moe), len(bounds) - 2
    late_uses = not model.untie_embeddings_and_output_weights or model.mtp_num_layers > 0
    held = []
    for stages in stages_of_ranks:
        parts: Counter[str] = Counter()
        for stage in stages:
            for entry in entries[bounds[stage] : bounds[stage + 1]]:
                parts.update(entry)
        if late_uses and last in stages and 0 not in stages:
            parts.update(entries[0])  # a copy of the embedding
        held.append(held_parameters(parts, parallel, model.num_kv_heads))
    return held


# --- states ---------------------------------------------------------------------------------------------------------


class StateBytes(NamedTuple):
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments in fp32, and with ZeRO or in low precision the fp32 weights."""


def state_bytes(held: Held, *, data: int, expert: int, dtype_name: str, zero_stage: int) -> StateBytes:
    """Weights, gradients and optimizer states of one rank's parameters; nothing is offloaded.

    Args:
        held: the parameters.
        data: data-parallel ranks, which share dense states under ZeRO.
        expert: of these, how many hold different experts; the others share those of a rank's.
        dtype_name: of the weights; gradients of bf16 are accumulated in fp32, of others in their own type.
        zero_stage: 1 shards the optimizer states, 2 gradients, too, 3 also the weights.
    """
    element = 4 if dtype_name == "fp32" else 2
    gradient = 2 if dtype_name == "fp16" else 4
    states = 8 + (4 if zero_stage > 0 or dtype_name != "fp32" else 0)

    def total(size: int, sharded_from: int) -> float:
        if zero_stage < sharded_from:
            return float(size * (held.dense + held.experts))
        return size * (held.dense / data + held.experts * expert / data)

    return StateBytes(total(element, 3), total(gradient, 2), total(states, 1))


# --- activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch occupies on one rank in some layers."""

    kept: float = 0.0
    """From the forward pass to the backward pass."""
    deferred: float = 0.0
    """From the backward pass to that of the weights, where it comes later: inputs and gradients of outputs."""
    working: float = 0.0
    """Within a backward pass: the layer that is computed again."""

    def __add__(self, other: "Activations") -> "Activations":
        """Those of layers that follow one another: only one is worked on at a time."""
        return Activations(self.kept + other.kept, self.deferred + other.deferred, max(self.working, other.working))


def entry_activations(
    model: ModelConfig,
    moe: MoEConfig | None,
    parallel: ParallelConfig,
    *,
    tokens: int,
    element: int,
    recompute: str | None,
) -> list[Activations]:
    """An estimate for every entry of the layer list.

    Args:
        model, moe, parallel: of the run.
        tokens: of a micro-batch.
        element: bytes of a number.
        recompute: ``training.recompute_granularity``.
    """
    sizes = _Sizes.of(model, moe, parallel)
    unit, depths = tokens * element, model.mtp_num_layers
    layers = [_layer(sizes, model, moe, index, recompute) for index in range(model.num_layers + depths)]
    decoder = [_in_bytes(layer, sizes.width / sizes.stretch, unit, recompute) for layer in layers[: model.num_layers]]
    logits = (1 + depths) * model.padded_vocab_size / parallel.tensor_model_parallel_size * unit
    output = Activations(kept=(1 + depths) * sizes.width * unit, deferred=logits, working=2 * logits)
    norm = Activations(kept=sizes.width / sizes.stretch * unit)
    if not depths:
        return [Activations(), *decoder, norm, output]
    # Beside its layers: the joined input, its two norms, the projection and the last norm.
    extra = depths * 6 * sizes.width / sizes.stretch
    kept, deferred = (sum(part) for part in zip(*layers[model.num_layers :], strict=True))
    blocks = (kept + extra, deferred + extra / 2)
    mtp = _in_bytes(blocks, (1 + depths) * sizes.width / sizes.stretch, unit, recompute)
    return [Activations(), *decoder, norm, Activations(), mtp, output]


def _in_bytes(layer: tuple[float, float], entering: float, unit: int, recompute: str | None) -> Activations:
    """From numbers per token that a layer keeps and defers; ``entering`` is its input."""
    kept, deferred = layer
    if recompute == "full":
        return Activations(entering * unit, deferred * unit, kept * unit)
    return Activations(kept * unit, deferred * unit)


@dataclass(frozen=True)
class _Sizes:
    """Widths on one rank, in numbers per token of the micro-batch."""

    width: int
    tensor: int
    stretch: int
    """Ranks that share the sequence between regions."""
    rows: float = 0.0
    """Rows of other ranks that reach the experts of this one, per token."""
    chosen: float = 0.0
    """Assignments to them, per token."""
    expert_tensor: int = 1
    """Ranks that share every expert."""

    @classmethod
    def of(cls, model: ModelConfig, moe: MoEConfig | None, parallel: ParallelConfig) -> "_Sizes":
        ranks, experts = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        stretch = ranks if parallel.sequence_parallel else 1
        if moe is None:
            return cls(model.hidden_size, ranks, stretch)
        topk, cutting = moe.moe_router_topk, parallel.expert_tensor_parallel_size
        spread = ranks // cutting  # tensor ranks that share the tokens
        # A row goes to a rank once, however many of its experts are there, if they are chosen by chance.
        rows = (experts - 1) * (1 - (1 - 1 / experts) ** topk)
        return cls(model.hidden_size, ranks, stretch, rows / spread, topk / spread, cutting)


def _layer(
    sizes: _Sizes, model: ModelConfig, moe: MoEConfig | None, index: int, recompute: str | None
) -> tuple[float, float]:
    """Numbers per token that a layer keeps for its backward pass, and that products of weight gradients wait with."""
    blocks = _attention(sizes, model, recompute), _feed_forward(sizes, model, moe, index)
    kept, deferred = (sum(part) for part in zip(*blocks, strict=True))
    return kept + 2 * sizes.width / sizes.stretch, deferred  # inputs of the two norms


def _attention(sizes: _Sizes, model: ModelConfig, recompute: str | None) -> tuple[float, float]:
    width, heads = sizes.width, model.num_attention_heads / sizes.tensor
    if not isinstance(model.attention, LatentAttention):
        groups = max(model.num_kv_heads / sizes.tensor, 1)
        query, both = heads * model.head_dim, 2 * groups * model.head_dim
        return width + 2 * query + both, 2 * width + 2 * query + both
    attention = model.attention
    key = attention.qk_head_dim + attention.qk_pos_emb_head_dim
    value, up = heads * attention.v_head_dim, heads * (attention.qk_head_dim + attention.v_head_dim)
    compressed = attention.kv_lora_rank + attention.qk_pos_emb_head_dim
    entering = compressed + (attention.q_lora_rank or width)  # into the region, whole on every rank
    down = (width + compressed + (attention.q_lora_rank or 0)) / sizes.stretch
    made = 0 if recompute == "selective" else 2 * heads * key + up
    return down + entering + made + value, down + entering + heads * key + up + value + width


def _feed_forward(sizes: _Sizes, model: ModelConfig, moe: MoEConfig | None, index: int) -> tuple[float, float]:
    if not has_experts(model, moe, index):
        return _swiglu(sizes, model.ffn_size)
    width = sizes.width
    expert = sizes.chosen * (moe.moe_ffn_hidden_size or model.ffn_size) / sizes.expert_tensor
    own = width / sizes.stretch
    kept, deferred = own + sizes.rows * width + 2 * expert, 2 * own + 2 * sizes.rows * width + 3 * expert
    if moe.moe_shared_expert_intermediate_size is None:
        return kept, deferred
    shared_kept, shared_deferred = _swiglu(sizes, moe.moe_shared_expert_intermediate_size)
    return kept + shared_kept, deferred + shared_deferred


def _swiglu(sizes: _Sizes, ffn_size: int) -> tuple[float, float]:
    """A block whose columns tensor ranks share: the input of the region, and three times the inner width."""
    inner = 3 * ffn_size / sizes.tensor
    return sizes.width + inner, 2 * sizes.width + inner
