"""The feed-forward block with distributed experts, in the form that DeepSpeed's MoE engine looks for.

DeepSpeed finds expert layers by class and expert parameters by two attributes; from these it builds optimizer groups,
reduces expert gradients over the ranks that hold the same experts only, and divides them by the whole data axis.
Router, exchange and experts are ours. A pipeline stage without experts carries an ``Anchor``, since the optimizer of
every stage must have the same groups.
"""

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.model.moe.sparse_mlp import SparseMLP
from megatron_ds.parallel.groups import Groups


class ExpertParallelMLP(SparseMLP, MoE):
    """A ``SparseMLP`` whose experts are shared out over the expert axis."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, index: int, groups: Groups):
        SparseMLP.__init__(self, model, moe, index, groups)
        _fulfil_contract(self, self.experts.parameters(), moe.num_experts, groups)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to set: ``Groups.tell_deepspeed_about_experts`` runs before the engine starts."""


class Anchor(MoE):
    """One expert parameter that is always zero: it stands for the experts that a pipeline stage does not have."""

    def __init__(self, groups: Groups):
        nn.Module.__init__(self)
        self.zero = nn.Parameter(torch.zeros(1))
        _fulfil_contract(self, [self.zero], groups.topology.expert, groups)

    def forward(self, x: Tensor) -> Tensor:
        """x itself, which now depends on the anchor, so that this has a gradient: zero."""
        return x + 0.0 * self.zero.to(x.dtype)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """See ``ExpertParallelMLP``."""


def _fulfil_contract(module: MoE, parameters, num_experts: int, groups: Groups) -> None:
    """Attributes that DeepSpeed 0.19 reads of an expert layer and of its parameters."""
    module.num_experts = num_experts
    module.ep_size = groups.topology.expert
    module.num_local_experts = num_experts // groups.topology.expert
    module.expert_group_name = groups.expert_group_name
    module.enable_expert_tensor_parallelism = groups.expert_tensor.size > 1
    for parameter in parameters:
        parameter.allreduce = False
        parameter.group_name = groups.expert_group_name
