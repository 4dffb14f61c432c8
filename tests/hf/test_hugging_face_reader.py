"""Stock models read into our decoder, in parts and from every kind of file; what is not theirs is refused by name."""

import json
import shutil
from math import prod

import pytest
import torch
from importing import difference, edit_config, edit_tensors, imported, save_stock
from safetensors.torch import load_file, save_file
from tiny_checkpoint import random_tokens

from megatron_ds.checkpoint.pieces import contiguous_runs, whole
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf import tensors
from megatron_ds.hf.reader import open_hugging_face
from megatron_ds.hf.sections import read_sections, run_defaults
from megatron_ds.model.decoder import Decoder

TOLERANCE = 2e-5
MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
WINDOW = {"sliding_window": 6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5e3}
VARIANTS = {
    "llama": ("llama", {}),
    "llama, tied, one key head, YaRN": (
        "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": YARN},
    ),
    "qwen3, mixed layers": ("qwen3", MIXED | WINDOW | {"use_sliding_window": True, "hidden_size": 50}),
    "qwen3, last layers slide": ("qwen3", WINDOW | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, all layers full, tied": ("qwen3", {"tie_word_embeddings": True}),
    "cwm, its own pattern": ("cwm", WINDOW | {"rope_parameters": PLAIN_ROPE}),
    "cwm, its own rope": ("cwm", MIXED | WINDOW),
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def stock(request, tmp_path_factory):
    """(directory, the stock model that was saved there)."""
    family, settings = request.param
    directory = tmp_path_factory.mktemp("stock")
    return directory, save_stock(directory, family, **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(directory, stock model) of an untied llama; copied by tests that change it."""
    directory = tmp_path_factory.mktemp("llama")
    return directory, save_stock(directory, "llama")


@pytest.fixture
def changed(llama, tmp_path):
    """A copy of the llama's directory."""
    return shutil.copytree(llama[0], tmp_path / "model")


def same(one: Decoder, other: Decoder) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- what is read ---------------------------------------------------------------------------------------------------


def test_our_decoder_computes_the_stock_models_logits(stock):
    directory, model = stock
    assert difference(model, imported(directory), random_tokens()) <= TOLERANCE


def test_heads_are_turned_for_a_run_with_interleaved_pairs(stock):
    """The weights differ, the logits do not: query and key rows, and the weights of their norms, change places."""
    directory, model = stock
    decoder = imported(directory, rotary_interleaved=True)
    assert decoder.config.rotary_interleaved
    assert difference(model, decoder, random_tokens()) <= TOLERANCE
    query = "layers.1.attention.query.weight"
    assert not torch.equal(decoder.state_dict()[query], imported(directory).state_dict()[query])


def test_the_older_spelling_says_the_same(stock, tmp_path):
    directory = shutil.copytree(stock[0], tmp_path / "model")
    rope = dict(json.loads((directory / "config.json").read_text())["rope_parameters"])
    scaling = {"type": rope.pop("rope_type"), **rope}
    older = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": "float32"}
    edit_config(directory, rope_parameters=None, dtype=None, **older)
    old, new = read_sections(directory), read_sections(stock[0])
    assert (old.model, old.precision) == (new.model, new.precision)
    assert same(imported(directory), imported(stock[0]))


def test_a_missing_head_dim_is_the_quotient(changed):
    edit_config(changed, head_dim=None, num_attention_heads=3, num_key_value_heads=None)
    assert read_sections(changed).model.head_dim == 16
    assert read_sections(changed).model.num_kv_heads == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(tmp_path, dtype):
    model = save_stock(tmp_path, "llama", dtype=dtype)
    assert read_sections(tmp_path).precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert difference(model.float(), imported(tmp_path), random_tokens()) <= TOLERANCE


def test_shards(llama, tmp_path):
    directory, model = llama
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(imported(tmp_path), imported(directory))


def test_the_vocabulary_is_padded_with_zeros_as_at_initialisation(llama):
    for name in ("embedding.weight", "output.weight"):
        weight_VD = imported(llama[0], make_vocab_size_divisible_by=64).state_dict()[name]
        assert weight_VD.shape == (320, 48)
        assert weight_VD[:301].count_nonzero(1).all() and not weight_VD[301:].any()


def test_frequencies_in_old_files_are_passed_over(changed, llama):
    edit_tensors(changed, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert same(imported(changed), imported(llama[0]))


def test_a_run_may_add_a_balancing_bias(tmp_path):
    save_stock(tmp_path, "mixtral", num_local_experts=4)
    decoder = imported(tmp_path, {"router": {"kind": "softmax", "fine": "bias"}})
    assert decoder.layers[1].mlp.router.bias.tolist() == [0] * 4
    assert decoder.layers[1].mlp.balance.load_factor.tolist() == [1] * 4


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_range_of_any_box_is_that_of_the_whole(llama, interleaved):
    opened = open_hugging_face(llama[0])
    model = opened.model.model_copy(update={"rotary_interleaved": interleaved})
    source = opened.weights(model, None)
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for name, shape in source.shapes().items():
        full = source.read_range(name, "weight", whole(shape), 0, prod(shape)).view(shape)
        for _ in range(4):
            box = tuple((lo, draw(lo, size)) for size in shape for lo in (draw(0, size - 1),))
            part = full[tuple(slice(*side) for side in box)].flatten()
            start = draw(0, len(part))
            length = draw(0, len(part) - start)
            found = source.read_range(name, "weight", box, start, length)
            assert found.dtype == torch.float32 and torch.equal(found, part[start : start + length])


@pytest.mark.parametrize(
    ("name", "box", "start", "length", "elements"),
    [
        ("layers.0.mlp.up.weight", ((40, 80), (0, 48)), 0, 40 * 48, 40 * 48),
        ("layers.0.mlp.down.weight", ((0, 48), (20, 40)), 0, 48 * 20, 48 * 20),
        ("layers.0.mlp.up.weight", ((0, 80), (0, 48)), 1000, 7, 7),
        ("layers.0.attention.query.weight", ((16, 32), (0, 48)), 0, 16 * 48, 16 * 48),
        ("embedding.weight", ((192, 384), (0, 48)), 0, 192 * 48, (301 - 192) * 48),
        ("embedding.weight", ((320, 384), (0, 48)), 0, 64 * 48, 0),
    ],
    ids=["rows", "columns", "a range", "a turned head", "the end of the vocabulary", "padding"],
)
def test_only_the_bytes_of_a_part_are_read(llama, monkeypatch, name, box, start, length, elements):
    opened, read = open_hugging_face(llama[0]), []

    def counted(shape, box):
        for first, count in contiguous_runs(shape, box):
            read.append(count)
            yield first, count

    source = opened.weights(opened.model.model_copy(update={"rotary_interleaved": True}), None)
    monkeypatch.setattr(tensors, "contiguous_runs", counted)
    assert source.read_range(name, "weight", box, start, length).shape == (length,)
    assert sum(read) == elements


# --- FP8 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def float8(changed):
    """The llama with FP8 matrices in blocks of 32 rows and 20 columns, none of which divides the sizes; what it is."""
    exact, stored, block = {}, {}, (32, 20)
    for name, weight in load_file(changed / "model.safetensors").items():
        exact[name] = stored[name] = weight
        if "_proj" in name:
            grid = tuple(-(-size // side) for size, side in zip(weight.shape, block))
            factors = torch.rand(grid, generator=torch.Generator().manual_seed(len(name))) + 0.5
            stored[name], stored[f"{name}_scale_inv"] = weight.to(torch.float8_e4m3fn), factors
            spread = factors.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(20, 1)[:, : weight.shape[1]]
            exact[name] = stored[name].float() * spread
    save_file(stored, changed / "model.safetensors")
    edit_config(changed, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    return changed, exact


def test_fp8_weights_are_multiplied_block_by_block(float8):
    directory, exact = float8
    weights = imported(directory).state_dict()
    assert torch.equal(weights["layers.2.mlp.down.weight"], exact["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(weights["layers.3.attention.key.weight"], exact["model.layers.3.self_attn.k_proj.weight"])
    opened = open_hugging_face(directory)
    part = opened.weights(opened.model, None).read_range(
        "layers.0.mlp.up.weight", "weight", ((30, 70), (19, 45)), 26, 9
    )
    assert torch.equal(part, exact["model.layers.0.mlp.up_proj.weight"][31, 19:28])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: gptq weights cannot be read"),
        ({"quant_method": "fp8"}, "quantization_config: fp8 weights cannot be read; fp8 with a weight_block_size can"),
    ],
)
def test_other_quantizations_are_refused(changed, quantization, message):
    edit_config(changed, quantization_config=quantization)
    with pytest.raises(ConfigError, match=message):
        open_hugging_face(changed)


def test_fp8_weights_need_their_factors(float8):
    directory, _ = float8
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(directory, model__layers__1__mlp__up_proj__weight_scale_inv=torch.ones(2, 2))
    with pytest.raises(CheckpointError, match=rf"{name} is \[80, 48\] and {name}_scale_inv \[2, 2\]; .* \[3, 3\]"):
        open_hugging_face(directory)
    edit_tensors(directory, model__layers__1__mlp__up_proj__weight_scale_inv=None)
    with pytest.raises(CheckpointError, match=f"{name} is FP8, but there is no {name}_scale_inv"):
        open_hugging_face(directory)
    edit_config(directory, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"is FP8, but config\.json has no quantization_config"):
        open_hugging_face(directory)


# --- both ends ------------------------------------------------------------------------------------------------------


def test_a_tied_file_may_repeat_the_embedding(tmp_path):
    model = save_stock(tmp_path, "llama", tie_word_embeddings=True)
    embedding_VD = model.state_dict()["model.embed_tokens.weight"].clone()
    edit_tensors(tmp_path, lm_head__weight=embedding_VD)
    assert difference(model, imported(tmp_path), random_tokens()) <= TOLERANCE
    edit_tensors(tmp_path, lm_head__weight=embedding_VD.index_add(0, torch.tensor([300]), torch.ones(1, 48)))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, .* untie"):
        imported(tmp_path)
    untied = imported(tmp_path, untie_embeddings_and_output_weights=True).state_dict()
    assert torch.equal(untied["output.weight"][300], embedding_VD[300] + 1)


def test_a_run_may_untie_what_a_file_ties(tmp_path):
    save_stock(tmp_path, "llama", tie_word_embeddings=True)
    weights = imported(tmp_path, untie_embeddings_and_output_weights=True).state_dict()
    assert torch.equal(weights["output.weight"], weights["embedding.weight"])


def test_two_weights_are_not_made_one(llama):
    with pytest.raises(CheckpointError, match="differs"):
        imported(llama[0], untie_embeddings_and_output_weights=False)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(changed):
    edit_tensors(changed, model__norm__weight=None, model__layers__3__mlp__up_proj__bias=torch.ones(80))
    edit_tensors(changed, model__layers__0__input_layernorm__weight=torch.ones(47), lm_head__weight=None)
    with pytest.raises(CheckpointError) as caught:
        open_hugging_face(changed)
    assert str(caught.value) == (
        f"{changed}: does not hold the llama that its config.json describes: model.norm.weight is missing; "
        "lm_head.weight is missing; model.layers.3.mlp.up_proj.bias is unknown; and 1 more"
    )
    edit_tensors(changed, model__norm__weight=torch.ones(48), model__layers__3__mlp__up_proj__bias=None)
    edit_tensors(changed, lm_head__weight=torch.ones(301, 48))
    with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm\.weight is \[47\] instead of \[48\]$"):
        open_hugging_face(changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 5}, r"another model than the configured one: layers\.4\.attention_norm\.weight is missing"),
        ({"num_layers": 3}, r"model\.layers\.3\.input_layernorm\.weight is not zero; .* and 6 more"),
        ({"hidden_size": 64}, r"embedding\.weight is \[301, 48\], the configured model's \[301, 64\]"),
        ({"vocab_size": 300}, r"embedding\.weight is \[301, 48\], the configured model's \[300, 48\]"),
        ({"qk_layernorm": True}, r"layers\.0\.attention\.query_norm\.weight is missing"),
    ],
)
def test_another_model_than_the_runs(llama, settings, message):
    with pytest.raises(CheckpointError, match=message):
        imported(llama[0], **settings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "lama"}, "model_type lama is not a family that can be read; did you mean llama?"),
        ({"model_type": "bert"}, "model_type bert is not a family that can be read; known are qwen3, llama"),
        ({"model_type": None}, "names no model_type"),
        ({"attention_bias": True}, "attention_bias is true, but megatron_ds has only false"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", but megatron_ds has only "silu"'),
        ({"hidden_size": "48"}, 'hidden_size is "48", but must be an integer, 1 or more'),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is longrope, but megatron_ds has only default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "gives rope_scaling.linear.factor"),
        ({"rope_parameters": {"full_attention": {}}}, "not one set of settings for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but megatron_ds has only 1.0"),
        ({"rms_norm_eps": "small"}, "gives norm_epsilon = 'small'"),
    ],
)
def test_what_our_model_cannot_be_is_refused_by_key(changed, keys, message):
    edit_config(changed, **keys)
    with pytest.raises(ConfigError) as caught:
        read_sections(changed)
    assert str(caught.value).startswith(f"{changed / 'config.json'}: ") and message in str(caught.value)


def test_only_hugging_face_directories_have_defaults_for_a_run(llama, tmp_path):
    assert run_defaults(llama[0])["model"]["num_layers"] == 4
    assert run_defaults(tmp_path) is None
    (tmp_path / "config.json").write_text('{"megatron_ds": {}}')
    assert run_defaults(tmp_path) is None
    with pytest.raises(ConfigError, match="unreadable"):
        read_sections(tmp_path / "nowhere")


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(llama, tmp_path):
    """(directory, its index, a function that writes the index) of the llama in shards, with a file beside it."""
    directory = tmp_path / "inside" / "model"
    llama[1].save_pretrained(directory, max_shard_size="100KB")
    path = directory / "model.safetensors.index.json"
    shutil.copy(llama[0] / "model.safetensors", directory.parent / "outside.safetensors")
    return directory, json.loads(path.read_text()), lambda content: path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{}/outside.safetensors", "..", "", "a/b.safetensors", "link.safetensors"]
)
def test_names_that_lead_out_of_the_directory_are_refused_unopened(sharded, monkeypatch, name):
    directory, index, write = sharded
    (directory / "link.safetensors").symlink_to(directory.parent / "outside.safetensors")
    index["weight_map"]["model.norm.weight"] = name.format(directory.parent)
    write(index)
    monkeypatch.setattr(tensors, "safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(CheckpointError, match="only plain files inside the directory are read"):
        open_hugging_face(directory)


def test_what_an_index_promises_must_be_there(sharded):
    directory, index, write = sharded
    shards = sorted(set(index["weight_map"].values()))
    write({"weight_map": index["weight_map"] | {"model.norm.weight": shards[0]}})
    with pytest.raises(CheckpointError, match=r"tensors are not in their shards: model\.norm\.weight"):
        open_hugging_face(directory)
    for shard in shards[1:]:
        (directory / shard).unlink()
    more = f"; and {len(shards) - 4} more" if len(shards) > 4 else ""
    with pytest.raises(CheckpointError, match=f"shards are missing: {'; '.join(shards[1:4])}{more}"):
        open_hugging_face(directory)
    for content in ([], {"weight_map": 3}, {"weight_map": {"model.norm.weight": 3}}, {}):
        write(content)
        with pytest.raises(CheckpointError, match=r"index\.json: unreadable"):
            open_hugging_face(directory)


def test_damaged_files(changed, llama):
    path = changed / "model.safetensors"
    opened = open_hugging_face(changed)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unreadable"):
        open_hugging_face(changed)
    with pytest.raises(CheckpointError, match="has become shorter than its header says"):
        opened.weights(opened.model, None).read_range("norm.weight", "weight", ((0, 48),), 0, 48)
    path.unlink()
    with pytest.raises(CheckpointError, match="has no weights; it needs model"):
        open_hugging_face(changed)
    save_file(
        load_file(llama[0] / "model.safetensors") | {"model.norm.weight": torch.ones(48, dtype=torch.int64)}, path
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I64; only F32, BF16, F16, F8_E4M3 can be read"):
        open_hugging_face(changed)


# --- pickles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(changed):
    """The llama's directory without its safetensors, and its weights."""
    weights = load_file(changed / "model.safetensors")
    (changed / "model.safetensors").unlink()
    return changed, weights


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("pytorch_model.bin", lambda weights: weights),
        ("mp_rank_00_model_states.pt", lambda weights: {"module": weights, "dp_world_size": 1, "ds_version": "0.19"}),
        ("consolidated.pth", lambda weights: weights),
    ],
)
def test_one_pickle(pickled, llama, name, wrap):
    directory, weights = pickled
    torch.save(wrap(weights), directory / name)
    assert same(imported(directory), imported(llama[0]))


def test_sharded_pickles(pickled, llama):
    directory, weights = pickled
    places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(weights)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in weights if places[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(imported(directory), imported(llama[0]))


def test_parts_of_tensor_ranks_are_refused(pickled):
    directory, weights = pickled
    for rank in range(2):
        torch.save({"module": weights}, directory / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(CheckpointError, match="holds one tensor-parallel part of the model"):
        open_hugging_face(directory)


def test_no_guess_among_several_pickles(pickled):
    directory, weights = pickled
    for name in ("a.pt", "b.pt"):
        torch.save(weights, directory / name)
    with pytest.raises(CheckpointError, match=r"has several files of weights \(a\.pt; b\.pt\)"):
        open_hugging_face(directory)


def test_number_formats_of_pickles(pickled):
    directory, weights = pickled
    torch.save(weights | {"model.norm.weight": torch.ones(48, dtype=torch.float64)}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.float64; only F32"):
        open_hugging_face(directory)
