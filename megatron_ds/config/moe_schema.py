"""The ``moe`` section: experts, the router that chooses among them, their balance, capacity and exchange.

Part of the tree of ``schema.py``, with its conventions: the string below a field is its documentation.
"""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ds.config.deepspeed_keys import NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Section
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.token_schedule import Scheduled


class Router(Section):
    """What both kinds of router share: a coarse stage, a fine stage and the weights of the chosen experts."""

    fine: Literal["none", "bias", "refine"] = "bias"
    """Fine stage: select by the scores, by scores plus a balancing bias, or by re-scored candidates plus bias."""
    refine_candidates: PositiveInt | None = None
    """Coarse candidates that a learned refine stage scores again; by default twice moe_router_topk."""
    num_groups: PositiveInt | None = None
    """Groups of neighbouring experts for the coarse stage; by default every expert is a candidate."""
    group_topk: PositiveInt | None = None
    """Groups that stay candidates for a token."""
    norm_topk_prob: bool = True
    """Divide the weights of the chosen experts by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Factor on the weights of the routed experts."""


class SoftmaxRouter(Router):
    """Scores are a softmax over all experts; a group counts as its best expert."""

    kind: Literal["softmax"] = "softmax"


class SigmoidRouter(Router):
    """Scores are independent sigmoids; a group counts as the sum of its two best experts."""

    kind: Literal["sigmoid"] = "sigmoid"


RouterConfig = Annotated[SoftmaxRouter | SigmoidRouter, Field(discriminator="kind")]


class Dropless(Section):
    """Every token reaches every expert that it chose."""

    kind: Literal["dropless"] = "dropless"


class Capacity(Section):
    """What both kinds of limited capacity share; evaluation and export are dropless all the same."""

    factor: PositiveFloat = 1.25
    """Slots of all experts together, as a multiple of the assignments of a micro-batch (tokens x topk)."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which assignments a full expert drops: those of least weight, or the last of the micro-batch."""


class FixedCapacity(Capacity):
    """Every expert has the same number of slots."""

    kind: Literal["fixed"] = "fixed"


class DynamicCapacity(Capacity):
    """The same total of slots, shared out in proportion to each expert's load factor lambda."""

    kind: Literal["dynamic"] = "dynamic"
    smoothing: Probability = 0.9
    """Weight of the past in the running mean of lambda."""
    min_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Least slots of an expert, as a multiple of the mean."""
    max_share: Annotated[float, Field(ge=1)] = 4.0
    """Most slots of an expert, as a multiple of the mean."""


CapacityConfig = Annotated[Dropless | FixedCapacity | DynamicCapacity, Field(discriminator="kind")]


class MoEConfig(Section):
    """Sparse mixture of experts in place of some feed-forward blocks, see docs/moe.md."""

    num_experts: PositiveInt = 8
    """Routed experts of a layer."""
    moe_router_topk: PositiveInt = 2
    """Experts that a token is sent to."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Feed-forward width of one routed expert; by default that of a dense layer."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Width of the shared expert that every token passes; by default there is none."""
    moe_layer_freq: PositiveInt | tuple[Literal[0, 1], ...] = 1
    """n: every n-th layer from the first has experts; or a list with a 1 for every layer that has, else 0."""
    router: RouterConfig = SoftmaxRouter()
    """How experts are scored and chosen."""
    moe_input_jitter_eps: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multiply the router's input by uniform noise in [1 - eps, 1 + eps] during training."""
    moe_router_bias_update_rate: Scheduled = 1e-3
    """Loss-free balancing: bias += rate * sign(1 - lambda) after every step; may change with the tokens consumed."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the Switch balancing loss over a micro-batch."""
    moe_seq_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the balancing loss within each sequence."""
    moe_global_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the balancing loss against the load of the last whole global batch."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the mean square of the router's log-sum-exp."""
    capacity: CapacityConfig = Dropless()
    """Whether and how an expert's tokens are limited in training."""
    dispatcher: Literal["local", "all_to_all", "ring", "hierarchical"] = "ring"
    """How tokens reach experts on other ranks; one expert-parallel rank has nothing to exchange."""
    wire_dtype: Literal["same", "bf16"] = "same"
    """Type of activations on the wire; bf16 halves an fp32 exchange and rounds what it carries."""
    experts: Literal["grouped_mm", "loop"] = "grouped_mm"
    """Products of the experts: one grouped matrix product, or one after another (the slow reference)."""

    def is_moe_layer(self, index: int) -> bool:
        """Whether decoder layer ``index`` has experts; see ``has_experts`` for the blocks behind the last one."""
        frequency = self.moe_layer_freq
        return bool(frequency[index]) if isinstance(frequency, tuple) else index % frequency == 0


def has_experts(model: ModelConfig, moe: MoEConfig | None, index: int) -> bool:
    """Whether layer ``index`` has experts: a decoder layer, or an MTP block, which is like the last of them.

    Args:
        index: of a decoder layer; ``num_layers + k`` is MTP block k.
    """
    return moe is not None and moe.is_moe_layer(min(index, model.num_layers - 1))
