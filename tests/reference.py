"""Slow, plain oracles of the model: written from the definitions, composed of single operations, nothing shared with
the package but the configuration and the parameter names."""

import math

import torch
import torch.nn.functional as F


def visible(document_BS, window=None):
    """bool [B, S, S]: key j is visible to query i iff j <= i, same document, and i - j <= window."""
    batch, length = document_BS.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for i in range(length):
            for j in range(i + 1):
                near = window is None or i - j <= window
                mask[row, i, j] = near and bool(document_BS[row, i] == document_BS[row, j])
    return mask


def attention(q_BHSK, k_BGSK, v_BGSK, mask_BSS, bias_BHSS=None, keep_BHSS=None):
    """(out_BHSK, lse_BHS) over the visible keys, with an additive bias and a multiplier of the probabilities."""
    repeats = q_BHSK.shape[1] // k_BGSK.shape[1]
    k_BHSK, v_BHSK = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSK, v_BGSK))
    score = q_BHSK @ k_BHSK.transpose(-1, -2) / math.sqrt(q_BHSK.shape[-1])
    if bias_BHSS is not None:
        score = score + bias_BHSS
    score = score.masked_fill(~mask_BSS[:, None], -math.inf)
    probability = score.softmax(-1)
    if keep_BHSS is not None:
        probability = probability * keep_BHSS
    return probability @ v_BHSK, score.logsumexp(-1)


def far(length, window):
    """float [S, S]: 1 where the distance i - j is above the window."""
    index = torch.arange(length)
    return (index[:, None] - index[None] > window).double()


def rms_norm(x, weight, epsilon):
    return weight * (x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt())


def rotary(x_BSHK, position_BS, base):
    """Half-split rotation without context extension."""
    width = x_BSHK.shape[-1]
    frequency = torch.tensor([base ** (-2 * c / width) for c in range(width // 2)], dtype=x_BSHK.dtype)
    angle = position_BS[..., None, None] * frequency
    first, second = x_BSHK[..., : width // 2], x_BSHK[..., width // 2 :]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def decoder(weights, config, token_BS, document_BS, position_BS):
    """logits_BSV in the dtype of the weights, a dict of logical names; default rotary embedding, no dropout."""
    x = main_model(weights, config, token_BS, document_BS, position_BS)
    return x @ weights.get("output.weight", weights["embedding.weight"]).T


def main_model(weights, config, token_BS, document_BS, position_BS):
    """What the output layer gets."""
    x = weights["embedding.weight"][token_BS]
    for index in range(config.num_layers):
        x = decoder_layer(below(weights, f"layers.{index}."), config, index, x, document_BS, position_BS)
    return rms_norm(x, weights["norm.weight"], config.norm_epsilon)


def below(weights, prefix):
    """The weights whose names begin with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def decoder_layer(layer, config, index, x, document_BS, position_BS):
    """One dense layer, from its own weights."""
    normed = rms_norm(x, layer["attention_norm.weight"], config.norm_epsilon)
    x = x + self_attention(layer, config, index, normed, document_BS, position_BS)
    normed = rms_norm(x, layer["mlp_norm.weight"], config.norm_epsilon)
    gate, up = normed @ layer["mlp.gate.weight"].T, normed @ layer["mlp.up.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down.weight"].T


def self_attention(layer, config, index, x_BSD, document_BS, position_BS):
    heads = []
    for name in ("query", "key", "value"):
        x_BSHK = (x_BSD @ layer[f"attention.{name}.weight"].T).unflatten(-1, (-1, config.head_dim))
        if name != "value":
            if config.qk_layernorm:
                x_BSHK = rms_norm(x_BSHK, layer[f"attention.{name}_norm.weight"], config.norm_epsilon)
            x_BSHK = rotary(x_BSHK, position_BS, config.rotary_base)
        heads.append(x_BSHK.transpose(1, 2))
    kind, window, bias = config.attention, None, None
    if kind.kind == "hybrid" and kind.pattern[index % len(kind.pattern)] == "L":
        window = kind.window
    if kind.kind == "soft_gate":
        gate_BSH = x_BSD @ layer["attention.far_gate.weight"].T + layer["attention.far_gate.bias"]
        bias = F.logsigmoid(gate_BSH).transpose(1, 2)[..., None] * far(x_BSD.shape[1], kind.window)
    out_BHSK, _ = attention(*heads, visible(document_BS, window), bias)
    return out_BHSK.transpose(1, 2).flatten(2) @ layer["attention.output.weight"].T


def packed(lengths, length):
    """(document_BS, position_BS) of rows made of documents with these lengths, cut or filled up to ``length``."""
    document, position = [], []
    for row in lengths:
        row = [*row, max(0, length - sum(row))]
        document.append([n for n, size in enumerate(row) for _ in range(size)][:length])
        position.append([p for size in row for p in range(size)][:length])
    return torch.tensor(document), torch.tensor(position)
