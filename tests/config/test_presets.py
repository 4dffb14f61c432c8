"""The presets of the third generation: built whole without memory, counted, and laid out within their devices."""

from pathlib import Path

import pytest
import torch

from megatron_ds.cli.plan import GB, heading, rank_shares
from megatron_ds.config.load import load_config
from megatron_ds.config.resolve import with_vocabulary
from megatron_ds.model import cost
from megatron_ds.model.decoder import Decoder

CONFIGS = Path(__file__).parents[2] / "ds_configs"
WORLDS = {"v3": 1024, "v3_671b": 2048, "v3_671b_32k": 2048, "v3_671b_128k": 2048, "v3_16b": 32, "v3_tiny": 8}
MEMORY = 80 * GB
ROOM = 0.8
"""Share of the memory that may be planned; the rest is for buffers, workspace and what an estimate misses."""


def preset(name, *flags, world_size=None):
    config = load_config(["--config", str(CONFIGS / f"{name}.json"), *flags], world_size=world_size or WORLDS[name])
    return with_vocabulary(config.config, 4096, 0) if name == "v3_tiny" else config.config


@pytest.mark.parametrize("name", WORLDS)
def test_a_preset_is_what_the_formulas_count_and_fits(name):
    config = preset(name)
    model, moe = config.megatron_ds.model, config.megatron_ds.moe
    with torch.device("meta"):
        held = sum(p.numel() for p in Decoder(model, moe).parameters())
    assert held == cost.num_parameters(model, moe)
    print(f"\n{name}", *heading(config, WORLDS[name]), sep="\n  ")
    for share in rank_shares(config, WORLDS[name]):
        print(
            f"  pipe {share.pipe}: {' | '.join(share.layers)}: {sum(share.held):,} parameters per rank, "
            f"optimizer {share.states.optimizer / GB:.2f} GB, in all {share.total / GB:.1f} GB"
        )
        assert share.total <= ROOM * MEMORY


def test_v3_has_1_75_trillion_parameters():
    ours = preset("v3").megatron_ds
    assert cost.num_parameters(ours.model, ours.moe) == pytest.approx(1.75e12, rel=5e-3)


@pytest.mark.parametrize("name", ["v3_671b", "v3_671b_32k", "v3_671b_128k"])
def test_v3_671b_is_deepseek_v3(name):
    ours = preset(name).megatron_ds
    published = cost.without_mtp(ours.model)
    assert cost.num_parameters(published, ours.moe) == 671_026_404_352
    assert (ours.model.mtp_num_layers, ours.model.init_method_std) == (1, 0.006)


def test_v3_16b_is_deepseek_v2_lite_with_another_router():
    ours = preset("v3_16b").megatron_ds
    assert cost.num_parameters(cost.without_mtp(ours.model), ours.moe) == 15_706_484_224


@pytest.mark.parametrize("name", ["v3", "v3_671b", "v3_16b"])
def test_pipeline_ranks_have_equal_work(name):
    """The slowest rank has little more to do than the mean; 61 layers and a last rank with MTP leave no better cut."""
    ours = preset(name).megatron_ds
    costs = dict(zip(("embedding", *range(ours.model.num_layers)), cost.layer_costs(ours.model, ours.moe)))
    tail = sum(cost.layer_costs(ours.model, ours.moe)[1 + ours.model.num_layers :])
    work = []
    for share in rank_shares(preset(name), WORLDS[name]):
        layers = [word for chunk in share.layers for word in chunk.split(", ")]
        ranges = [[int(end) for end in word.split("-")] for word in layers if word[0].isdigit()]
        work.append(sum(costs[layer] for ends in ranges for layer in range(ends[0], ends[-1] + 1)))
        work[-1] += tail if "output" in layers else 0
    assert max(work) <= {"v3": 1.01, "v3_671b": 1.22, "v3_16b": 1.11}[name] * sum(work) / len(work)


TOPOLOGIES = [(tensor, pipe, expert) for tensor in (1, 2, 4) for pipe in (1, 2, 4) for expert in (1, 2, 4)]


@pytest.mark.parametrize(("tensor", "pipe", "expert"), TOPOLOGIES)
def test_v3_tiny_suits_every_small_topology(tensor, pipe, expert):
    """With at least as many micro-batches as pipeline ranks."""
    kind, chunks = ("interleaved", "2") if pipe == 2 else ("1f1b", "1")
    config = preset(
        "v3_tiny",
        "--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipe),
        "--expert-model-parallel-size", str(expert), "--num-virtual-stages-per-pipeline-rank", chunks,
        "--set", f"megatron_ds.parallel.schedule.kind={kind}",
        world_size=tensor * pipe * expert,
    )  # fmt: skip
    assert config.gradient_accumulation_steps >= pipe
