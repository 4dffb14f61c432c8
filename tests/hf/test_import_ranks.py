"""Ranks of real layouts begin with a Hugging Face model: each reads its own slices, together they have every weight."""

from math import prod

import pytest
import torch
from ranks import run_ranks
from tiny import build, parallel
from tiny_checkpoint import MODELS, export_tiny, load_stock, save_tiny

from megatron_ds.checkpoint.pieces import Piece, covered
from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.data.loader import Batch
from megatron_ds.engine.state import fragments, restore_weights
from megatron_ds.hf.reader import open_hugging_face

TURNED = {"rotary_interleaved": True}
CASES = {
    "latent attention, experts and an MTP block, over every axis": (
        "deepseek_v3", {"mtp_num_layers": 1}, {}, {"tp": 2, "pp": 2, "stage": 1},
    ),
    "experts over data ranks": ("qwen3_moe", {}, TURNED, {"ep": 2, "stage": 2}),
    "dense and fully sharded, in bf16": ("llama", {}, TURNED, {"stage": 3, "dtype": "bf16"}),
}  # fmt: skip


def begin(groups, directory, options):
    """What a rank's optimizer holds after the rank has begun: piece and values of each of its parts of a weight."""
    config, engine, weights = build(groups, options)
    ours = config.megatron_ds
    restore_weights(engine, weights, open_hugging_face(directory).weights(ours.model, ours.moe))
    return [(one.piece, one.tensor.clone()) for one in fragments(engine, weights) if one.kind == "weight"]


@pytest.mark.parametrize(("family", "settings", "changes", "layout"), CASES.values(), ids=CASES.keys())
def test_every_layout_begins_with_the_models_weights(tmp_path, family, settings, changes, layout):
    tiny = save_tiny(tmp_path / "trained", **MODELS[family] | settings)
    directory = export_tiny(tiny, tmp_path / "model", mtp="inline" if settings else "auto")
    opened = open_hugging_face(directory)
    model = ModelConfig.model_validate(opened.model.model_dump() | changes)
    options = {"model": model.model_dump(), "moe": opened.moe and opened.moe.model_dump(), "batch": 4, **layout}
    results = run_ranks(begin, 4, directory, options, parallel=parallel(**layout))

    source = opened.weights(model, opened.moe)
    pieces: dict[str, list[Piece]] = {}
    for piece, values in (fragment for held in results for fragment in held):
        expected = source.read_range(piece.name, "weight", piece.box, piece.start, piece.length)
        assert torch.equal(values, expected), piece
        pieces.setdefault(piece.name, []).append(piece)
    whole = {name: prod(shape) for name, shape in source.shapes().items()}
    assert {name: covered(found) for name, found in pieces.items()} == whole


def evaluate(groups, directory, options):
    """Tokens, and on the last stage their logits: the columns of this rank's part of the vocabulary."""
    config, engine, weights = build(groups, options)
    ours = config.megatron_ds
    restore_weights(engine, weights, open_hugging_face(directory).weights(ours.model, ours.moe))
    kept, objective = [], engine.objective

    def recording(logits_BSV, batch):
        kept.append(logits_BSV.clone())
        return objective(logits_BSV, batch)

    engine.objective = recording
    shape = (config.gradient_accumulation_steps, ours.model.seq_length)
    token_BS = torch.randint(ours.model.vocab_size, shape, generator=torch.Generator().manual_seed(3))
    zeros_1S, position_1S = torch.zeros(1, shape[1], dtype=torch.long), torch.arange(shape[1])[None]
    engine.evaluate([Batch(row, row, zeros_1S == 0, zeros_1S, position_1S) for row in token_BS.split(1)])
    return token_BS, torch.cat(kept) if kept else None


@pytest.mark.parametrize(
    "family", ["qwen3", "qwen2", "mistral", "qwen3_moe", "ernie4_5_moe", "deepseek_v3", "deepseek_v2"]
)
@torch.no_grad()
def test_logits_over_tensor_and_pipeline_ranks(tmp_path, family):
    tiny = save_tiny(tmp_path / "trained", **MODELS[family])
    directory = export_tiny(tiny, tmp_path / "model")
    opened, layout = open_hugging_face(directory), {"tp": 2, "pp": 2, "stage": 1}
    options = {"model": opened.model.model_dump(), "moe": opened.moe and opened.moe.model_dump(), "batch": 4, **layout}
    results = run_ranks(evaluate, 4, directory, options, parallel=parallel(**layout))
    token_BS, vocabulary = results[0][0], opened.model.vocab_size
    logits_BSV = torch.cat([logits for _, logits in results if logits is not None], -1)[..., :vocabulary]
    assert (logits_BSV - load_stock(directory)(token_BS).logits).abs().max() <= 2e-5
