"""The start-up self-test passes on right topologies, and finds and names what a fault breaks."""

import re
from contextlib import contextmanager, nullcontext
from importlib import import_module

import pytest
from ranks import RankError, run_ranks
from tiny import configuration, parallel

MOE = {
    "num_experts": 16, "moe_router_topk": 4, "moe_ffn_hidden_size": 48, "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": [0, 1, 1, 1], "moe_seq_aux_loss_coeff": 1e-2,
    "router": {"kind": "sigmoid", "fine": "bias", "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5},
}  # fmt: skip
MODEL = {
    "num_layers": 4, "num_attention_heads": 8, "num_query_groups": None, "qk_layernorm": False, "mtp_num_layers": 0,
    "attention": {"kind": "full"},
    "untie_embeddings_and_output_weights": True, "hidden_dropout": 0.1,
}  # fmt: skip
GQA = {"attention": {"kind": "full"}, "num_query_groups": 2, "mtp_num_layers": 0}


def check(groups, options, fault=None):
    from megatron_ds.train.self_test import self_test

    config = configuration(groups.world_size, **options)
    with patched(*FAULTS[fault]) if fault else nullcontext():
        return self_test(config, groups)


def run(world_size, fault=None, model=None, moe=MOE, **layout):
    options = {"model": MODEL | (model or {}), "moe": moe, "stage": 1, "batch": 16, **layout}
    return run_ranks(check, world_size, options, fault, parallel=parallel(**layout), timeout=240)


@contextmanager
def patched(place, replacement):
    """Put ``replacement(original)`` in place of a method, named as module:class.method."""
    module, _, path = place.partition(":")
    owner, name = path.split(".")
    target = getattr(import_module(module), owner)
    original = getattr(target, name)
    setattr(target, name, replacement(original))
    try:
        yield
    finally:
        setattr(target, name, original)


def skipped(original):
    """A reduction that does not happen."""
    return lambda self, *arguments: None


def own_experts_only(original):
    """DeepSpeed is told that the ranks that share experts all hold the same ones."""

    def tell(self):
        from deepspeed.utils import groups as deepspeed_groups

        original(self)
        if self.experts is not None:
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[self.expert_group_name] = self.data

    return tell


def divided_again(original):
    """Losses divided by the number of micro-batches once more, as DeepSpeed does by default."""
    return lambda self, loss: original(self, loss / self.gradient_accumulation_steps())


FAULTS = {
    "missing TP reduction": ("megatron_ds.parallel.tensor:TensorRanks.sum_gradients", skipped),
    "accumulation scaled": ("megatron_ds.engine.pipeline_engine:TableEngine.loss_backward", divided_again),
    "experts averaged": ("megatron_ds.parallel.groups:Groups.tell_deepspeed_about_experts", own_experts_only),
}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"ep": 2}),
        (3, {"model": GQA, "moe": None, "batch": 12}),
        (4, {"tp": 2, "sp": True, "pp": 2, "schedule": "interleaved"}),
        (8, {"tp": 2, "pp": 2, "ep": 2, "sp": True, "schedule": "zb_v"}),
        (4, {"tp": 4, "model": GQA, "moe": None}),
    ],
    ids=str,
)
def test_right_topologies_pass(world_size, layout):
    line, *others = run(world_size, **layout)
    assert all(other.split(",")[0] == line.split(",")[0] for other in others)
    assert line.startswith("self-test PASS") and float(re.search(r"error (\S+)", line)[1]) < 1e-5


@pytest.mark.parametrize(
    ("fault", "named", "layout"),
    [
        ("missing TP reduction", "sequence parallelism", {"tp": 2, "sp": True, "moe": None}),
        ("missing TP reduction", "tensor parallelism", {"tp": 2, "ep": 2}),
        ("accumulation scaled", "gradient accumulation", {"tp": 2, "pp": 2}),
        ("experts averaged", "expert parallelism", {"ep": 2, "pp": 2}),
    ],
)
def test_faults_are_found_and_named(fault, named, layout):
    with pytest.raises(RankError, match=f"self-test FAIL: {named} at fault"):
        run(4, fault, **layout)
