"""mds_moe: a decoder with sparse experts and a router of several stages, for stock transformers 5 (trust_remote_code).

All experts are scored, by softmax or sigmoid. Candidates, by score plus bias, are all of them or those of the best
groups; a refine stage keeps the best few and scores them again by a second projection. Of the candidates the best are
chosen, by score plus bias, and weighed by their scores alone. Routing is in fp32 and drops no token.

In files every expert has tensors of its own; transformers stacks them while loading and takes them apart when saving.
The rest of the decoder is in modeling_mds_common.py, which also explains the suffixes of names.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .configuration_mds_moe import MdsMoeConfig
from .modeling_mds_common import MdsAttention, MdsDecoderLayer, MdsForCausalLMMixin, MdsMLP, MdsModelMixin

# Per-expert tensors in files, stacked ones in memory: Qwen's layout and names.
register_checkpoint_conversion_mapping("mds_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class MdsMoeRouter(nn.Module):
    """x_TD -> weights and numbers of the K chosen experts of every token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.refine = nn.Parameter(torch.empty(shape)) if config.refine_candidates else None
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TD):
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TK, expert_TK = self.choose(x_TD.float())
            if self.config.norm_topk_prob:
                total_T1 = score_TK.sum(-1, keepdim=True)
                softmax = self.config.scoring_func == "softmax"
                score_TK = score_TK / (total_T1.clamp_min(1e-12) if softmax else total_T1 + 1e-20)
        return (score_TK * self.config.routed_scaling_factor).to(x_TD.dtype), expert_TK

    def choose(self, x_TD):
        """Scores, without bias, and numbers of the chosen experts."""
        bias_E, count = self.e_score_correction_bias, self.config.num_experts_per_tok
        logit_TE = nn.functional.linear(x_TD, self.weight.float())
        score_TE = self.score(logit_TE)
        candidate_TE = self.within_best_groups(score_TE + bias_E)
        if self.refine is None:
            expert_TK = best(candidate_TE, count)
            return score_TE.gather(1, expert_TK), expert_TK
        expert_TC = best(candidate_TE, self.config.refine_candidates)
        refined_TE = logit_TE + nn.functional.linear(x_TD, self.refine.float())
        score_TC = self.score(refined_TE.gather(1, expert_TC))
        chosen_TK = best(score_TC + bias_E[expert_TC], count)
        return score_TC.gather(1, chosen_TK), expert_TC.gather(1, chosen_TK)

    def score(self, logit):
        """Softmax over the last axis, or sigmoids."""
        return logit.softmax(dim=-1) if self.config.scoring_func == "softmax" else logit.sigmoid()

    def within_best_groups(self, choice_TE):
        """-inf where an expert's group is not among the best; a group is worth its best expert, or its best two."""
        if self.config.n_group is None:
            return choice_TE
        choice_TGE = choice_TE.unflatten(1, (self.config.n_group, -1))
        counted = 1 if self.config.scoring_func == "softmax" else 2
        group_TG = best(choice_TGE.topk(counted, dim=-1).values.sum(-1), self.config.topk_group)
        left_out_TG = torch.ones_like(choice_TGE[..., 0], dtype=torch.bool).scatter(1, group_TG, False)
        return choice_TGE.masked_fill(left_out_TG.unsqueeze(-1), -torch.inf).flatten(1)


def best(score, count):
    """Indices of the largest scores, best first; of equal ones the lower index, as in training."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]


@use_experts_implementation
class MdsMoeExperts(nn.Module):
    """All routed experts of a layer, stacked; this forward is the eager one, transformers brings faster ones."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token_A, place_A = torch.where(top_k_index == expert)
            gate_AF, up_AF = nn.functional.linear(hidden_states[token_A], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y_AD = nn.functional.linear(self.act_fn(gate_AF) * up_AF, self.down_proj[expert])
            out_TD.index_add_(0, token_A, y_AD * top_k_weights[token_A, place_A, None])
        return out_TD


class MdsMoeSparseBlock(nn.Module):
    """Routed experts, and a shared one that every token passes."""

    def __init__(self, config):
        super().__init__()
        self.gate = MdsMoeRouter(config)
        self.experts = MdsMoeExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = MdsMLP(config, shared) if shared else None

    def forward(self, x_BQD):
        x_TD = x_BQD.flatten(0, 1)
        weight_TK, expert_TK = self.gate(x_TD)
        y_BQD = self.experts(x_TD, expert_TK, weight_TK).view_as(x_BQD)
        return y_BQD if self.shared_experts is None else y_BQD + self.shared_experts(x_BQD)


class MdsMoeDecoderLayer(MdsDecoderLayer):
    """A layer with a dense or a sparse feed-forward block."""

    def __init__(self, config, layer_idx):
        dense = layer_idx in config.mlp_only_layers
        mlp = MdsMLP(config, config.intermediate_size) if dense else MdsMoeSparseBlock(config)
        super().__init__(config, MdsAttention(config, layer_idx), mlp)


class MdsMoePreTrainedModel(PreTrainedModel):
    """What transformers must know about the family."""

    config_class = MdsMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MdsMoeDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("gate.weight", "gate.refine", "gate.e_score_correction_bias")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MdsMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
            if module.refine is not None:
                init.normal_(module.refine, mean=0.0, std=std)
        elif isinstance(module, MdsMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class MdsMoeModel(MdsModelMixin, MdsMoePreTrainedModel):
    """Embedding, decoder layers and final norm."""

    build_layer = MdsMoeDecoderLayer

    def attention_inputs(self, x_BQD, **mask_inputs):
        """Mask and window of each layer, by its type."""
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
        masks = {
            kind: makers[kind](config=self.config, inputs_embeds=x_BQD, **mask_inputs)
            for kind in set(self.config.layer_types)
        }
        return [{"attention_mask": masks[kind], "sliding_window": windows[kind]} for kind in self.config.layer_types]


class MdsMoeForCausalLM(MdsForCausalLMMixin, MdsMoePreTrainedModel, GenerationMixin):
    """The model with its language head."""

    def __init__(self, config):
        super().__init__(config)
        self.add_head(MdsMoeModel(config))


__all__ = ["MdsMoeForCausalLM", "MdsMoeModel", "MdsMoePreTrainedModel"]
