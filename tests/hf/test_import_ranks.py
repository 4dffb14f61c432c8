"""Ranks of real layouts begin with a Hugging Face model: each reads its own slices, together they have every weight."""

from math import prod

import pytest
import torch
from ranks import run_ranks
from tiny import build, parallel
from tiny_checkpoint import MODELS, export_tiny, save_tiny

from megatron_ds.checkpoint.pieces import Piece, covered
from megatron_ds.config.model_schema import ModelConfig
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
