"""Tiny models as real checkpoints, and what stock transformers makes of their exports."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_ds.checkpoint.pieces import Fragment, whole
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.store import CheckpointStore, SingleProcess, open_checkpoint
from megatron_ds.config.schema import RunConfig
from megatron_ds.data.tokenizer import train_bpe
from megatron_ds.hf.export import export
from megatron_ds.hf.options import ExportOptions
from megatron_ds.hf.verify import TEXTS
from megatron_ds.model.decoder import Decoder
from megatron_ds.model.init import initialize

WINDOW = 5
LENGTH = 23
HYBRID = {"kind": "hybrid", "pattern": "LLG", "window": WINDOW}
SOFT_GATE = {"kind": "soft_gate", "window": WINDOW}
FULL = {"kind": "full"}
EXPERTS = {"num_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 40}
LATENT = {
    "kind": "latent", "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 10, "qk_pos_emb_head_dim": 6,
    "v_head_dim": 14,
}  # fmt: skip
DEEPSEEK = {
    "attention": LATENT, "qk_layernorm": False, "rotary_interleaved": True, "num_query_groups": None,
    "kv_channels": None, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
DEEPSEEK_EXPERTS = EXPERTS | {"moe_shared_expert_intermediate_size": 80, "moe_layer_freq": [0, 1, 1, 1]}
PLAIN_ROUTER = {"router": {"kind": "softmax", "fine": "none"}}
MODELS = {
    "qwen3": {"attention": HYBRID, "qk_layernorm": True},
    "llama": {"attention": FULL, "qk_layernorm": False},
    "cwm": {"attention": HYBRID, "qk_layernorm": False},
    "mistral": {"attention": HYBRID | {"pattern": "L"}, "qk_layernorm": False, "hidden_size": 50},
    "qwen2": {"attention": HYBRID, "qk_layernorm": False, "add_qkv_bias": True, "kv_channels": None},
    "mds_dense": {"attention": SOFT_GATE, "qk_layernorm": True},
    "ernie4_5_moe": {
        "attention": FULL, "qk_layernorm": False, "rotary_interleaved": True,
        "moe": EXPERTS | {"moe_shared_expert_intermediate_size": 80, "moe_layer_freq": [0, 1, 1, 1]},
    },
    "qwen3_moe": {"attention": FULL, "moe": EXPERTS | {"moe_layer_freq": [1, 0, 1, 1]} | PLAIN_ROUTER},
    "mixtral": {"attention": FULL, "qk_layernorm": False, "moe": EXPERTS | PLAIN_ROUTER},
    "deepseek_v3": DEEPSEEK | {
        "moe": DEEPSEEK_EXPERTS | {
            "router": {"kind": "sigmoid", "num_groups": 3, "group_topk": 2, "scaling_factor": 1.5},
        },
    },
    "deepseek_v2": DEEPSEEK | {
        "moe": DEEPSEEK_EXPERTS | {
            "router": {
                "kind": "softmax", "fine": "none", "norm_topk_prob": False, "num_groups": 3, "group_topk": 2,
                "scaling_factor": 4.0,
            },
        },
    },
    "mds_moe": {
        "attention": HYBRID, "rotary_interleaved": True,
        "moe": EXPERTS | {
            "moe_shared_expert_intermediate_size": 24, "moe_layer_freq": 2,
            "router": {"kind": "softmax", "fine": "refine", "refine_candidates": 3},
        },
    },
}  # fmt: skip
"""A model section that each target can express; ``moe`` is a section of its own, given beside it."""


@dataclass
class Tiny:
    """A checkpoint and the model it holds."""

    checkpoint: Checkpoint
    decoder: Decoder

    def logits(self, token_BS: Tensor) -> Tensor:
        """Logits of the training model over the true vocabulary."""
        with torch.no_grad():
            return self.decoder(token_BS)[..., : self.decoder.config.vocab_size]


def run_config(moe: dict | None = None, **model) -> dict:
    """A resolved run configuration: 4 layers, odd sizes, grouped keys, vocabulary 301 padded to 384."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 64,
        "vocab_size": 301,
    }
    ours = {"model": sizes | model, "moe": moe, "data": {"eod_id": 0}}
    tree = RunConfig.model_validate({"megatron_ds": ours})
    return tree.model_dump(mode="json")


def save_tiny(directory: Path, tokenizer: Path | None = None, seed: int = 0, **model) -> Tiny:
    """Save a model whose every tensor differs from its neutral value: norm weights are not all one, biases not zero."""
    config = run_config(**model)
    ours = RunConfig.model_validate(config).megatron_ds
    decoder = Decoder(ours.model, ours.moe).eval()
    initialize(decoder.named_parameters(), ours.model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            tensor += (0.3 if tensor.dim() == 1 else 0.08) * torch.randn(tensor.shape, generator=generator)
    fragments = [
        Fragment(name, "weight", tuple(weight.shape), whole(weight.shape), 0, weight.detach().flatten())
        for name, weight in decoder.state_dict().items()
    ]
    trainer = {"step": 7, "consumed_tokens": 3_584, "train_loss": 5.4321, "eval": {"valid": 5.5}}
    extra = {} if tokenizer is None else {"tokenizer": tokenizer}
    CheckpointStore(directory, SingleProcess()).save(
        7, fragments, rank_state={}, trainer=trainer, config=config, extra_files=extra
    )
    return Tiny(open_checkpoint(directory), decoder)


def export_tiny(tiny: Tiny, output: Path, **options) -> Path:
    """Export to ``output`` and return it."""
    export(tiny.checkpoint, output, ExportOptions(**options))
    return output


def load_stock(directory: Path, attention: str = "eager", **options) -> PreTrainedModel:
    """The export as stock transformers loads it, in fp32; every weight must be there and none too many.

    Experts are computed by a loop beside eager attention, by transformers' default, grouped_mm, beside any other.
    """
    if attention == "eager":
        options["experts_implementation"] = "eager"
    trust = (directory / "modeling_mds_common.py").exists()
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=trust,
        output_loading_info=True,
        **options,
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.eval()


def random_tokens(batch: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    """token_BS over the true vocabulary."""
    return torch.randint(301, (batch, length), generator=torch.Generator().manual_seed(seed))


def train_tokenizer(directory: Path, vocab_size: int = 301) -> Path:
    """A byte-level BPE tokenizer with <|endoftext|> as id 0 and <|pad|> as id 1."""
    train_bpe(TEXTS, vocab_size).save(directory)
    return directory
