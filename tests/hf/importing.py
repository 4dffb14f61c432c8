"""Tiny models of stock transformers on disk, and our decoder filled from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_ds.checkpoint.pieces import whole
from megatron_ds.checkpoint.reader import WeightSource
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.hf.decoder import check_tensors
from megatron_ds.hf.reader import open_hugging_face
from megatron_ds.model.decoder import Decoder

SIZES = {
    "vocab_size": 301, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
"""Settings of a tiny model that all families know."""


def stock_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> PreTrainedModel:
    """A model of stock transformers whose every tensor differs from its neutral value: no norm is one, no bias zero."""
    config = AutoConfig.for_model(
        model_type, **SIZES | settings, attn_implementation="eager", experts_implementation="eager"
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor += (0.3 if tensor.dim() == 1 else 0.08) * torch.randn(tensor.shape)
    return model


def save_stock(directory: Path, model_type: str, **options) -> PreTrainedModel:
    """The same, saved by transformers; its logits are to be compared with ours."""
    model = stock_model(model_type, **options)
    model.save_pretrained(directory)
    return model


def edit_config(directory: Path, **keys) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory: Path, **tensors: Tensor | None) -> None:
    """Change tensors of model.safetensors, with "__" for "." in their names; None removes one."""
    path = directory / "model.safetensors"
    named = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in named.items() if tensor is not None}, path, {"format": "pt"})


def imported(directory: Path, moe: dict | None = None, **model) -> Decoder:
    """Our decoder with the weights of a directory; ``model`` and ``moe`` change the sections that it settles."""
    opened = open_hugging_face(directory)
    ours = ModelConfig.model_validate(opened.model.model_dump() | model)
    experts = opened.moe and MoEConfig.model_validate(opened.moe.model_dump() | (moe or {}))
    return filled(opened.weights(ours, experts), ours, experts)


@torch.no_grad()
def filled(source: WeightSource, model: ModelConfig, moe: MoEConfig | None) -> Decoder:
    """A decoder in fp32 with the weights of a source."""
    check_tensors(source, model, moe)
    decoder = Decoder(model, moe).eval()
    for name, tensor in decoder.state_dict().items():
        tensor.copy_(source.read_range(name, "weight", whole(tensor.shape), 0, tensor.numel()).view(tensor.shape))
    return decoder


@torch.no_grad()
def difference(model: PreTrainedModel, decoder: Decoder, token_BS: Tensor) -> float:
    """Largest difference of the logits over the true vocabulary."""
    logits_BSV = decoder(token_BS)[..., : decoder.config.vocab_size]
    return (model(token_BS).logits - logits_BSV).abs().max().item()


def stock_fixture(variants: dict[str, tuple[str, dict]]):
    """A fixture for each of the named (family, settings): family, directory, the stock model that was saved there."""

    @pytest.fixture(scope="module", params=variants.values(), ids=variants.keys())
    def stock(request, tmp_path_factory):
        family, settings = request.param
        directory = tmp_path_factory.mktemp("stock") / "model"
        return family, directory, save_stock(directory, family, **settings)

    return stock
