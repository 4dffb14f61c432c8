"""Which target can hold which router and which layers with experts, why another cannot, and what config.json says."""

import pytest

from megatron_ds.config.model_schema import ModelConfig
from megatron_ds.config.moe_schema import MoEConfig
from megatron_ds.errors import ConfigError
from megatron_ds.hf.targets import TARGETS, choose_target
from megatron_ds.hf.targets.common import SpecialIds
from megatron_ds.hf.targets.ernie4_5_moe import sparse_range

IDS = SpecialIds(bos=1, eos=2, pad=None)
FULL, HYBRID, GATE = {"kind": "full"}, {"kind": "hybrid", "pattern": "LG"}, {"kind": "soft_gate"}
ERNIE = {"attention": FULL, "qk_layernorm": False, "rotary_interleaved": True}
QWEN = {"attention": FULL, "qk_layernorm": True}
MIXTRAL = {"attention": FULL, "qk_layernorm": False}
EXAMPLES = {"ernie4_5_moe": ERNIE, "qwen3_moe": QWEN, "mixtral": MIXTRAL, "mds_moe": ERNIE}
"""A model section that each family of usual attention can express; DeepSeek's have tests of their own."""


def decoder(**settings) -> ModelConfig:
    """A small model section."""
    sizes = {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99, "ffn_hidden_size": 160}
    return ModelConfig.model_validate(sizes | settings)


def experts(router=None, **settings) -> MoEConfig:
    """A small moe section; the router is a softmax one unless it says otherwise."""
    sizes = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    return MoEConfig.model_validate(sizes | settings | {"router": {"kind": "softmax"} | (router or {})})


PLAIN = {"fine": "none"}


@pytest.mark.parametrize(
    ("model", "moe", "able"),
    [
        (ERNIE, experts(), ["ernie4_5_moe", "mds_moe"]),
        (ERNIE, experts(PLAIN, moe_shared_expert_intermediate_size=96), ["ernie4_5_moe", "mds_moe"]),
        (QWEN, experts(PLAIN), ["qwen3_moe", "mds_moe"]),
        (QWEN, experts(PLAIN | {"norm_topk_prob": False}, moe_layer_freq=3), ["qwen3_moe", "mds_moe"]),
        (MIXTRAL, experts(PLAIN), ["mixtral", "mds_moe"]),
        (QWEN, experts(), ["mds_moe"]),
        (ERNIE, experts({"fine": "refine"}), ["mds_moe"]),
        (ERNIE, experts({"kind": "sigmoid"}), ["mds_moe"]),
        (ERNIE | {"attention": HYBRID}, experts(), ["mds_moe"]),
        (ERNIE | {"attention": GATE}, experts(), []),
    ],
)
def test_which_targets_hold_a_model(model, moe, able):
    model = decoder(**model)
    assert [name for name, target in TARGETS.items() if not target.reasons(model, moe)] == able
    for name in able:
        assert choose_target(model, moe, name).model_type == name
    if able:
        assert choose_target(model, moe).model_type == able[0]


@pytest.mark.parametrize(
    ("target", "model", "moe", "reason"),
    [
        ("qwen3", QWEN, experts(), "qwen3 has no experts: moe.num_experts is 8"),
        ("mds_dense", ERNIE, experts(), "mds_dense has no experts: moe.num_experts is 8"),
        ("ernie4_5_moe", ERNIE, experts({"kind": "sigmoid"}), "scores experts by softmax: moe.router.kind is sigmoid"),
        ("ernie4_5_moe", ERNIE, experts({"fine": "refine"}), "has no refine stage: moe.router.fine is refine"),
        (
            "ernie4_5_moe",
            ERNIE,
            experts({"num_groups": 4, "group_topk": 2}),
            "has no groups of experts: moe.router.num_groups is 4",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            experts({"scaling_factor": 2.5}),
            "does not scale the experts' weights: moe.router.scaling_factor is 2.5",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            experts({"norm_topk_prob": False}),
            "always normalises the experts' weights: moe.router.norm_topk_prob is false",
        ),
        ("ernie4_5_moe", ERNIE | {"qk_layernorm": True}, experts(), "has no query and key norm: model.qk_layernorm is"),
        (
            "ernie4_5_moe",
            ERNIE | {"rotary_interleaved": False},
            experts(),
            "turns neighbouring channels as pairs: model.rotary_interleaved is false",
        ),
        (
            "ernie4_5_moe",
            ERNIE | {"attention": HYBRID},
            experts(),
            "has no per-layer windows: model.attention.kind is hybrid",
        ),
        (
            "ernie4_5_moe",
            ERNIE | {"attention": GATE},
            experts(),
            "has no gate on far keys: model.attention.kind is soft_gate",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            experts(moe_shared_expert_intermediate_size=48),
            "has shared experts as wide as the routed ones (32) or a multiple: "
            "moe.moe_shared_expert_intermediate_size is 48",
        ),
        (
            "ernie4_5_moe",
            ERNIE,
            experts(moe_layer_freq=2),
            "divides each layer's number plus one: moe.moe_layer_freq is 2",
        ),
        ("ernie4_5_moe", ERNIE, experts(moe_layer_freq=[1, 1, 0, 1, 0]), "moe.moe_layer_freq is [1, 1, 0, 1, 0]"),
        ("qwen3_moe", QWEN, experts(), "qwen3_moe has no balancing bias: moe.router.fine is bias"),
        ("qwen3_moe", QWEN | {"qk_layernorm": False}, experts(PLAIN), "always normalises queries and keys: model.qk"),
        (
            "qwen3_moe",
            QWEN | {"rotary_interleaved": True},
            experts(PLAIN),
            "turns channels half a head apart as pairs: model.rotary_interleaved is true",
        ),
        (
            "qwen3_moe",
            QWEN,
            experts(PLAIN, moe_shared_expert_intermediate_size=32),
            "has no shared expert: moe.moe_shared_expert_intermediate_size is 32",
        ),
        ("mixtral", MIXTRAL, experts(), "mixtral has no balancing bias: moe.router.fine is bias"),
        ("mixtral", MIXTRAL, experts(PLAIN | {"norm_topk_prob": False}), "always normalises the experts' weights"),
        (
            "mixtral",
            MIXTRAL,
            experts(PLAIN, moe_layer_freq=2),
            "mixtral has experts in every layer: moe.moe_layer_freq leaves layers [1, 3] dense",
        ),
        ("mds_moe", ERNIE | {"attention": GATE}, experts(), "mds_moe has no gate on far keys"),
    ],
)
def test_a_target_is_refused_with_the_setting_and_its_value(target, model, moe, reason):
    """Each model differs from one that the target holds in one setting, and the target says so."""
    found = TARGETS[target].reasons(decoder(**model), moe)
    assert len(found) == 1 and reason in found[0]
    with pytest.raises(ConfigError) as error:
        choose_target(decoder(**model), moe, target)
    assert found[0] in str(error.value)


def test_auto_names_the_reasons_of_families_with_experts_only():
    with pytest.raises(
        ConfigError, match="--target auto: no target can express this model: ernie4_5_moe has no"
    ) as error:
        choose_target(decoder(**ERNIE | {"attention": GATE}), experts())
    assert "mds_moe has no gate on far keys" in str(error.value) and "llama" not in str(error.value)


@pytest.mark.parametrize(
    ("frequency", "said"),
    [
        (1, (0, 4, 1)),
        ([0, 1, 1, 1, 1], (1, 4, 1)),
        ([0, 1, 1, 0, 0], (1, 2, 1)),
        ([0, 1, 0, 1, 0], (1, 3, 2)),
        ([0, 0, 1, 0, 0], (2, 2, 1)),
        ([0, 0, 0, 0, 0], None),
        ([0, 1, 0, 0, 1], None),
        ([1, 0, 1, 0, 1], None),
    ],
)
def test_layers_with_experts_as_ernie_says_it(frequency, said):
    moe = experts(moe_layer_freq=frequency)
    assert sparse_range(decoder(), moe) == said
    if said:
        start, end, interval = said
        assert [moe.is_moe_layer(layer) for layer in range(5)] == [
            (layer + 1) % interval == 0 and start <= layer <= end for layer in range(5)
        ]


@pytest.mark.parametrize(("name", "model"), EXAMPLES.items())
def test_no_setting_is_left_to_a_familys_default(name, model):
    scaling = {"kind": "linear", "factor": 4.0}
    model = decoder(**model, rope_scaling=scaling, norm_epsilon=3e-6, untie_embeddings_and_output_weights=True)
    moe = experts(PLAIN, moe_aux_loss_coeff=0.02)
    config = TARGETS[name].config(model, moe, IDS, "bfloat16")
    assert config["model_type"] == name and config["architectures"][0].endswith("ForCausalLM")
    assert (config["num_experts"], config["num_local_experts"], config["num_experts_per_tok"]) == (8, 8, 2)
    assert (config["router_aux_loss_coef"], config["output_router_logits"]) == (0.02, False)
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert (config["tie_word_embeddings"], config["rms_norm_eps"], config["head_dim"]) == (False, 3e-6, 16)
    if name != "mds_moe":  # its code needs transformers 5
        assert (config["rope_theta"], config["torch_dtype"]) == (1e4, "bfloat16")
        assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    if name == "mixtral":
        assert (config["intermediate_size"], config["router_jitter_noise"]) == (32, 0.0)
    else:
        assert (config["intermediate_size"], config["moe_intermediate_size"]) == (160, 32)


def test_ernie_counts_shared_experts_in_routed_widths():
    config = TARGETS["ernie4_5_moe"].config(
        decoder(**ERNIE), experts(moe_shared_expert_intermediate_size=96), IDS, "float32"
    )
    assert config["moe_num_shared_experts"] == 3
    assert (config["moe_num_experts"], config["moe_k"], config["moe_norm_min"]) == (8, 2, 1e-12)
    config = TARGETS["ernie4_5_moe"].config(decoder(**ERNIE), experts(), IDS, "float32")
    assert config["moe_num_shared_experts"] == 0


def test_mds_moe_names_every_stage_of_the_router():
    router = {
        "kind": "sigmoid", "fine": "refine", "num_groups": 4, "group_topk": 2, "norm_topk_prob": False,
        "scaling_factor": 2.5,
    }  # fmt: skip
    config = TARGETS["mds_moe"].config(decoder(**QWEN), experts(router, moe_layer_freq=2), IDS, "float32")
    assert config["refine_candidates"] == 4, "twice the chosen, as in training"
    stages = {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "norm_topk_prob": False}
    assert stages.items() <= config.items() and config["routed_scaling_factor"] == 2.5
    assert (config["mlp_only_layers"], config["use_qk_norm"], config["rope_interleaved"]) == ([1, 3], True, False)
    assert TARGETS["mds_moe"].config(decoder(**QWEN), experts(), IDS, "float32")["refine_candidates"] is None
