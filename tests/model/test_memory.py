"""What a rank holds against the layers that it would build; the states of ZeRO; the shape of the estimates."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from ranks import run_ranks

from megatron_ds.cli.plan import rank_shares
from megatron_ds.config.model_schema import FullAttention, LatentAttention, ModelConfig, SoftGateAttention
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.config.schema import ParallelConfig
from megatron_ds.model.decoder import Decoder, layer_list
from megatron_ds.model.memory import Activations, Held, entry_activations, stage_parameters, state_bytes
from megatron_ds.parallel.tensor import ALONE, TensorRanks
from megatron_ds.parallel.topology import Topology

LATENT = LatentAttention(q_lora_rank=24, kv_lora_rank=20, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=12)
MODELS = {
    "groups": {"num_query_groups": 2, "attention": FullAttention()},
    "gate": {"attention": SoftGateAttention(), "qk_layernorm": False},
    "biases": {"num_query_groups": 2, "attention": FullAttention(), "add_qkv_bias": True},
    "latent": {"attention": LATENT, "qk_layernorm": False, "mtp_num_layers": 2},
    "untied": {"attention": LATENT, "qk_layernorm": False, "untie_embeddings_and_output_weights": True},
}
EXPERTS = MoEConfig(
    moe_layer_freq=(0, 1, 0, 1, 1), moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=24, dispatcher="local"
)
BOUNDS, STAGES = [0, 3, 4, 5, None], [[0, 2], [1, 3]]


def model(kind):
    settings = {
        "num_layers": 5, "hidden_size": 64, "ffn_hidden_size": 80, "num_attention_heads": 4, "vocab_size": 100,
        "seq_length": 32,
    }  # fmt: skip
    return ModelConfig(**settings | MODELS[kind])


def ranks(parallel):
    """What layers ask of ``Groups``, without processes."""
    size, cutting = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    tensor = TensorRanks(1 % size, size, None, parallel.sequence_parallel)
    expert = parallel.expert_model_parallel_size
    return SimpleNamespace(
        tensor=tensor,
        expert_tensor=tensor if cutting > 1 else ALONE,
        experts=None,
        topology=Topology(tensor=size, data=expert, expert=expert),
        index=lambda axis: 0,
    )


def held_by_building(config, moe, parallel, bounds, stages):
    """(dense, experts) of the modules that a pipeline rank would build; one embedding, however often it is used."""
    entries = layer_list(config, moe, ranks(parallel))
    own = [entry for stage in stages for entry in entries[bounds[stage] : bounds[stage + 1]]]
    with torch.device("meta"):
        modules = [entry.build() for entry in own if not entry.tied]
        modules += [entry.build() for entry in own if entry.tied][:1]
    sizes = [(".experts." in name, p.numel()) for module in modules for name, p in module.named_parameters()]
    return tuple(sum(size for is_expert, size in sizes if is_expert == wanted) for wanted in (False, True))


@pytest.mark.parametrize("experts", [None, EXPERTS])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("tensor", "expert", "cutting"), [(1, 1, 1), (2, 4, 1), (4, 2, 4), (4, 8, 1)])
def test_a_rank_holds_what_it_builds(kind, experts, tensor, expert, cutting):
    config = model(kind)
    if experts is None:
        expert = cutting = 1
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=2, expert_model_parallel_size=expert,
        expert_tensor_parallel_size=cutting,
    )  # fmt: skip
    bounds = [*BOUNDS[:-1], len(layer_list(config, experts))]
    held = stage_parameters(config, experts, parallel, bounds, STAGES)
    assert held == [held_by_building(config, experts, parallel, bounds, stages) for stages in STAGES]
    [whole] = stage_parameters(config, experts, ParallelConfig(), bounds, [[0, 1, 2, 3]])
    with torch.device("meta"):
        assert sum(whole) == sum(p.numel() for p in Decoder(config, experts).parameters())


RUN = {
    "model": {"attention": LATENT.model_dump(), "qk_layernorm": False, "mtp_num_layers": 1, "num_layers": 5},
    "moe": EXPERTS.model_dump() | {"num_experts": 4, "dispatcher": "ring"},
}


def held_by_a_run(groups, options):
    """(dense, experts) of this rank, and its pipeline rank."""
    from megatron_ds.engine.initialize import stage_module

    config = tiny.configuration(groups.world_size, **options)
    sizes = [0, 0]
    for name, tensor in stage_module(config.megatron_ds, groups).logical_names().items():
        if isinstance(tensor, torch.nn.Parameter):
            sizes[".experts." in name] += tensor.numel()
    return groups.index("pipe"), tuple(sizes)


@pytest.mark.parametrize(
    "axes",
    [
        {"pp": 2, "tp": 2, "sp": True, "schedule": "interleaved", "chunks": 2},
        {"pp": 2, "ep": 2, "schedule": "zb_v"},
        {"pp": 2, "tp": 2, "etp": 2, "layout": [2, 3]},
    ],
    ids=str,
)
def test_a_rank_of_a_run_holds_what_is_planned(axes):
    options = RUN | axes
    shares = rank_shares(tiny.configuration(4, **options), 4)
    for pipe, held in run_ranks(held_by_a_run, 4, options, parallel=tiny.parallel(**axes)):
        assert held == shares[pipe].held


@pytest.mark.parametrize(
    ("dtype", "stage", "expected"),
    [
        ("fp32", 0, (4 * 900, 4 * 900, 8 * 900)),
        ("fp32", 1, (4 * 900, 4 * 900, 12 * (600 / 8 + 300 / 2))),
        ("bf16", 1, (2 * 900, 4 * 900, 12 * (600 / 8 + 300 / 2))),
        ("fp16", 1, (2 * 900, 2 * 900, 12 * (600 / 8 + 300 / 2))),
        ("bf16", 2, (2 * 900, 4 * (600 / 8 + 300 / 2), 12 * (600 / 8 + 300 / 2))),
        ("bf16", 3, (2 * (600 / 8 + 300 / 2), 4 * (600 / 8 + 300 / 2), 12 * (600 / 8 + 300 / 2))),
    ],
)
def test_states_of_each_zero_stage(dtype, stage, expected):
    assert state_bytes(Held(600, 300), data=8, expert=4, dtype_name=dtype, zero_stage=stage) == expected


def estimates(kind="latent", moe=EXPERTS, recompute=None, tokens=32, **axes):
    return entry_activations(model(kind), moe, ParallelConfig(**axes), tokens=tokens, element=4, recompute=recompute)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("moe", [None, EXPERTS])
def test_estimates_follow_the_layer_list_and_the_tokens(kind, moe):
    small, large = estimates(kind, moe), estimates(kind, moe, tokens=64)
    assert len(small) == len(layer_list(model(kind), moe))
    assert [2 * entry.kept for entry in small] == [entry.kept for entry in large]
    assert [2 * entry.deferred for entry in small] == [entry.deferred for entry in large]


def test_recompute_trades_what_is_kept_for_work():
    nothing, selective, full = (estimates(recompute=recompute)[1] for recompute in (None, "selective", "full"))
    assert nothing.kept > selective.kept > full.kept == 32 * 4 * 64
    assert full.working == nothing.kept and nothing.working == selective.working == 0
    assert nothing.kept - selective.kept == 32 * 4 * 4 * (2 * 16 + 10 + 12)  # queries and keys, and what made the rest


def test_tensor_ranks_share_what_lies_between_regions():
    axes = {"tensor_model_parallel_size": 4, "recompute": "full"}
    whole, stretch = (estimates(sequence_parallel=on, **axes)[1].kept for on in (False, True))
    assert whole == 4 * stretch == 32 * 4 * 64


def test_layers_are_worked_on_one_at_a_time():
    assert Activations(1, 2, 3) + Activations(10, 20, 2) == Activations(11, 22, 3)


@pytest.mark.parametrize("kind", ["groups", "latent"])
def test_the_estimate_is_near_what_autograd_keeps(kind):
    """Of a dense layer in one process: storages that are saved, each counted once, without weights."""
    config = model(kind).model_copy(update={"mtp_num_layers": 0, "num_layers": 1, "seq_length": 256})
    decoder, saved = Decoder(config), {}
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        logits = decoder(torch.zeros(1, 256, dtype=torch.long))
    kept = sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in weights)
    estimate = entry_activations(config, None, ParallelConfig(), tokens=256, element=4, recompute=None)
    assert logits.shape[1] == 256
    assert sum(entry.kept for entry in estimate) == pytest.approx(kept, rel=0.15)
