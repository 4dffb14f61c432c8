"""DeepSeek's two families from their papers (arXiv 2405.04434, 2412.19437), slowly, and what a directory must hold.

Everything follows from config.json and the tensors of a directory; nothing comes from the package or from transformers.
One head, one token and one expert at a time, in float64.
"""

import math

import torch
from torch import Tensor


def layer_names(config: dict, layer: int) -> dict[str, list[int]]:
    """Name inside a decoder layer -> shape, of every tensor that the family has there."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    names = {
        "input_layernorm.weight": [width],
        "post_attention_layernorm.weight": [width],
        "self_attn.kv_a_proj_with_mqa.weight": [latent + rotary, width],
        "self_attn.kv_a_layernorm.weight": [latent],
        "self_attn.kv_b_proj.weight": [heads * (plain + value), latent],
        "self_attn.o_proj.weight": [width, heads * value],
    }
    if queries is None:
        names["self_attn.q_proj.weight"] = [heads * (plain + rotary), width]
    else:
        names["self_attn.q_a_proj.weight"] = [queries, width]
        names["self_attn.q_a_layernorm.weight"] = [queries]
        names["self_attn.q_b_proj.weight"] = [heads * (plain + rotary), queries]

    def feed_forward(prefix: str, inner: int) -> dict[str, list[int]]:
        shapes = {"gate_proj": [inner, width], "up_proj": [inner, width], "down_proj": [width, inner]}
        return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}

    if layer < config["first_k_dense_replace"]:
        return names | feed_forward("mlp", config["intermediate_size"])
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    names["mlp.gate.weight"] = [experts, width]
    if config["model_type"] == "deepseek_v3":
        names["mlp.gate.e_score_correction_bias"] = [experts]
    for expert in range(experts):
        names |= feed_forward(f"mlp.experts.{expert}", inner)
    return names | feed_forward("mlp.shared_experts", inner * config["n_shared_experts"])


def main_names(config: dict) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the main model."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    names = {
        "model.embed_tokens.weight": [vocabulary, width],
        "model.norm.weight": [width],
        "lm_head.weight": [vocabulary, width],
    }
    for layer in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_names(config, layer).items()}
    return names


def mtp_names(config: dict) -> dict[str, list[int]]:
    """Name -> shape of every tensor that vLLM's loader of draft models asks for."""
    width, vocabulary, names = config["hidden_size"], config["vocab_size"], {}
    for block in range(config["num_nextn_predict_layers"]):
        layer = config["num_hidden_layers"] + block
        own = {
            "enorm.weight": [width],
            "hnorm.weight": [width],
            "eh_proj.weight": [width, 2 * width],
            "shared_head.norm.weight": [width],
            "shared_head.head.weight": [vocabulary, width],
            "embed_tokens.weight": [vocabulary, width],
        }
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in (own | layer_names(config, layer)).items()}
    return names


class Reference:
    """The main model and its MTP blocks, of one sequence at a time."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        """``weights``: every tensor of the directory, or of the two when the MTP blocks are apart."""
        self.config, self.weights = config, {name: value.double() for name, value in weights.items()}

    def logits(self, token_S: Tensor, following_S: Tensor) -> tuple[Tensor, list[Tensor]]:
        """logits_SV of the main model and of every MTP block.

        ``following_S``: the tokens after the sequence, as many as there are blocks. Block k sees token i + k at i.
        """
        held = self.weights
        x_SD = held["model.embed_tokens.weight"][token_S]
        for layer in range(self.config["num_hidden_layers"]):
            x_SD = self._layer(layer, x_SD)
        x_SD = _norm(x_SD, held["model.norm.weight"])
        drafts, all_tokens = [], torch.cat((token_S, following_S))
        h_SD = x_SD
        for block in range(len(following_S)):
            layer = self.config["num_hidden_layers"] + block
            own = self._inside(layer)
            seen_S = all_tokens[block + 1 : block + 1 + len(token_S)]
            embedded_SD = _norm(own["embed_tokens.weight"][seen_S], own["enorm.weight"])
            joined_SD = torch.cat((embedded_SD, _norm(h_SD, own["hnorm.weight"])), dim=1) @ own["eh_proj.weight"].T
            h_SD = _norm(self._layer(layer, joined_SD), own["shared_head.norm.weight"])
            drafts.append(h_SD @ own["shared_head.head.weight"].T)
        return x_SD @ held["lm_head.weight"].T, drafts

    def _inside(self, layer: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer}."
        return {name[len(prefix) :]: value for name, value in self.weights.items() if name.startswith(prefix)}

    def _layer(self, layer: int, x_SD: Tensor) -> Tensor:
        own = self._inside(layer)
        x_SD = x_SD + self._attention(own, _norm(x_SD, own["input_layernorm.weight"]))
        normed_SD = _norm(x_SD, own["post_attention_layernorm.weight"])
        if layer < self.config["first_k_dense_replace"]:
            return x_SD + _feed_forward(own, "mlp", normed_SD)
        routed_SD = torch.stack([self._experts(own, token_D) for token_D in normed_SD])
        return x_SD + routed_SD + _feed_forward(own, "mlp.shared_experts", normed_SD)

    def _attention(self, own: dict[str, Tensor], x_SD: Tensor) -> Tensor:
        config = self.config
        plain, rotary, latent = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
        if config["q_lora_rank"] is None:
            query = x_SD @ own["self_attn.q_proj.weight"].T
        else:
            small = _norm(x_SD @ own["self_attn.q_a_proj.weight"].T, own["self_attn.q_a_layernorm.weight"])
            query = small @ own["self_attn.q_b_proj.weight"].T
        both = x_SD @ own["self_attn.kv_a_proj_with_mqa.weight"].T
        expanded = _norm(both[:, :latent], own["self_attn.kv_a_layernorm.weight"]) @ own["self_attn.kv_b_proj.weight"].T
        shared = self._turn(both[:, latent:])
        later = torch.ones(len(x_SD), len(x_SD), dtype=torch.bool).triu(1)
        outputs = []
        for head in range(config["num_attention_heads"]):
            q = query[:, head * (plain + rotary) :][:, : plain + rotary]
            key_value = expanded[:, head * (plain + config["v_head_dim"]) :][:, : plain + config["v_head_dim"]]
            score_SS = q[:, :plain] @ key_value[:, :plain].T + self._turn(q[:, plain:]) @ shared.T
            score_SS = score_SS * self._score_scale() / math.sqrt(plain + rotary)
            outputs.append(score_SS.masked_fill(later, -math.inf).softmax(-1) @ key_value[:, plain:])
        return torch.cat(outputs, dim=1) @ own["self_attn.o_proj.weight"].T

    def _turn(self, x_SR: Tensor) -> Tensor:
        """Neighbouring channels as complex numbers, turned by the position."""
        rope, rotary = self.config["rope_parameters"], x_SR.shape[1]
        angles, length = [], 1.0
        for pair in range(rotary // 2):
            frequency = rope["rope_theta"] ** (-2 * pair / rotary)
            if rope["rope_type"] == "yarn":
                low, high = (self._pair_that_turns(rope[beta], rotary) for beta in ("beta_fast", "beta_slow"))
                low, high = max(math.floor(low), 0), min(math.ceil(high), rotary - 1)
                slow = min(max((pair - low) / max(high - low, 1e-3), 0), 1)
                frequency = frequency * (1 - slow) + frequency / rope["factor"] * slow
                length = self._stretch(rope["mscale"]) / self._stretch(rope["mscale_all_dim"])
            angles.append(frequency * torch.arange(len(x_SR), dtype=torch.float64))
        turn = torch.polar(torch.full((len(x_SR), rotary // 2), length, dtype=torch.float64), torch.stack(angles, 1))
        return torch.view_as_real(torch.view_as_complex(x_SR.unflatten(1, (-1, 2)).contiguous()) * turn).flatten(1)

    def _pair_that_turns(self, times: float, rotary: int) -> float:
        rope = self.config["rope_parameters"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * times)
        return rotary / 2 * math.log(turns) / math.log(rope["rope_theta"])

    def _stretch(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.config["rope_parameters"]["factor"]) + 1

    def _score_scale(self) -> float:
        rope = self.config["rope_parameters"]
        return self._stretch(rope["mscale_all_dim"]) ** 2 if rope["rope_type"] == "yarn" else 1.0

    def _experts(self, own: dict[str, Tensor], x_D: Tensor) -> Tensor:
        """The routed experts of one token."""
        config, logit_E = self.config, own["mlp.gate.weight"] @ x_D
        sigmoid = config["scoring_func"] == "sigmoid"
        score_E = logit_E.sigmoid() if sigmoid else logit_E.softmax(0)
        choice_E = score_E + own["mlp.gate.e_score_correction_bias"] if sigmoid else score_E
        size = config["n_routed_experts"] // config["n_group"]
        rank = [sorted(group.tolist(), reverse=True) for group in choice_E.split(size)]
        best = [sum(group[:2]) if sigmoid else group[0] for group in rank]
        groups = sorted(range(len(best)), key=lambda group: -best[group])[: config["topk_group"]]
        candidates = [expert for expert in range(len(choice_E)) if expert // size in groups]
        chosen = sorted(candidates, key=lambda expert: -choice_E[expert])[: config["num_experts_per_tok"]]
        total = score_E[chosen].sum() if config["norm_topk_prob"] else 1.0
        outputs = [score_E[e] / total * _feed_forward(own, f"mlp.experts.{e}", x_D) for e in chosen]
        return config["routed_scaling_factor"] * torch.stack(outputs).sum(0)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _feed_forward(own: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate = x @ own[f"{prefix}.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (x @ own[f"{prefix}.up_proj.weight"].T)) @ own[f"{prefix}.down_proj.weight"].T
