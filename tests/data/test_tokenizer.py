"""Tokenizer: exact round trips, no special token out of a text, the same ids in stock transformers."""

import json
import random
import shutil

import pytest
from transformers import AutoTokenizer

from megatron_ds.data.tokenizer import END_OF_TEXT, PAD, Tokenizer, train_bpe
from megatron_ds.errors import DataError

INJECTION = f"a document that says {END_OF_TEXT} and {PAD}{END_OF_TEXT}"


def test_every_text_survives(tokenizer):
    generator = random.Random(0)
    texts = ["", " ", "\n\n\n", "\x00\x1b[31m", "\ud7ff\U0010ffff", "e\u0301", "a\r\nb\r", "1234567890", INJECTION]
    for _ in range(100):
        points = [generator.randrange(0x110000) for _ in range(generator.randrange(40))]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_cannot_spell_special_tokens(tokenizer):
    ids = tokenizer.encode(INJECTION)
    special = {tokenizer.backend.token_to_id(token) for token in (END_OF_TEXT, PAD)}
    assert special.isdisjoint(ids) and tokenizer.eod_id in special
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == INJECTION + END_OF_TEXT


def test_numbers_come_in_groups_of_three(tokenizer):
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("12345678")
    assert [piece for piece, _ in pieces] == ["123", "456", "78"]


def test_training_is_deterministic_and_bounded():
    texts = ["abc abd abe " * 50, "xyz " * 30]
    one, two = train_bpe(texts, 263), train_bpe(iter(texts), 263)
    assert one.backend.to_str() == two.backend.to_str()
    assert one.vocab_size == 263
    assert train_bpe(["ab ab"], 1000).vocab_size < 270


def test_training_errors():
    with pytest.raises(DataError, match=r"257 ids is too small.*set --vocab-size to 258 or more"):
        train_bpe(["text"], 257)
    with pytest.raises(DataError, match="too little text"):
        train_bpe([], 300)
    assert train_bpe([], 258).vocab_size == 258


def test_errors_of_the_text_source_come_through():
    def texts():
        yield "one"
        raise DataError("broken file")

    with pytest.raises(DataError, match="broken file"):
        train_bpe(texts(), 300)


def test_stock_transformers_reads_the_same_ids(tokenizer, tokenizer_dir):
    stock = AutoTokenizer.from_pretrained(tokenizer_dir)
    for text in ("The quick brown fox", "  for x in range(12345):\n\treturn\r\n", "漢字 and \N{GRINNING FACE} isn't"):
        assert stock(text)["input_ids"] == tokenizer.encode(text)
        assert stock.decode(tokenizer.encode(text)) == text
    assert (stock.eos_token_id, stock.bos_token_id) == (tokenizer.eod_id, tokenizer.eod_id)
    assert stock.convert_ids_to_tokens(stock.pad_token_id) == PAD
    assert len(stock) == tokenizer.vocab_size == 340


def test_the_files_are_those_of_old_transformers(tokenizer_dir):
    assert sorted(path.name for path in tokenizer_dir.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == config["bos_token"] == END_OF_TEXT
    assert (config["add_bos_token"], config["clean_up_tokenization_spaces"]) == (False, False)
    special = json.loads((tokenizer_dir / "special_tokens_map.json").read_text())
    assert special == {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}


def test_a_folder_that_transformers_saved(tokenizer, tokenizer_dir, tmp_path):
    stock = AutoTokenizer.from_pretrained(tokenizer_dir)
    stock.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    stock.save_pretrained(tmp_path / "stock")
    loaded = Tokenizer.load(tmp_path / "stock")
    assert loaded.encode(INJECTION) == tokenizer.encode(INJECTION) and loaded.eod_id == tokenizer.eod_id
    loaded.save(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.chat_template == stock.chat_template
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


@pytest.fixture
def edited(tokenizer_dir, tmp_path):
    """Load a copy of the tokenizer whose files were changed."""

    def edit(change=None, config=None):
        directory = shutil.copytree(tokenizer_dir, tmp_path / "edited")
        tree = json.loads((directory / "tokenizer.json").read_text())
        if change:
            change(tree)
            (directory / "tokenizer.json").write_text(json.dumps(tree))
        if config is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            (directory / "special_tokens_map.json").unlink()
        return Tokenizer.load(directory)

    return edit


def test_settings_of_a_server_do_not_touch_documents(edited, tokenizer):
    """Truncation, padding and a template that adds bos are for requests."""

    def change(tree):
        tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        tree["padding"] = {
            "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
            "pad_token": PAD,
        }  # fmt: skip
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
        }

    text = "a text of more than four tokens " * 3
    assert edited(change).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("declared", [PAD, {"content": PAD, "lstrip": False}])
def test_the_folder_names_the_end_of_document(edited, declared):
    assert edited(config={"eos_token": declared}).eod_id == 1


def test_gpt2s_folder_names_none(edited):
    assert edited(config={"model_max_length": 1024}).eod_id == 0


def test_a_missing_end_of_document_is_named(edited):
    with pytest.raises(DataError, match=r"no token '</s>' to end documents with; set eos_token"):
        _ = edited(config={"eos_token": "</s>"}).eod_id


def test_vocab_size_covers_ids_with_gaps(edited):
    def change(tree):
        tree["model"]["vocab"]["\u0120gap"] = 500

    assert edited(change).vocab_size == 501


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"model": {', "tokenizer.json: damaged"),
        ("tokenizer.json", "[1]", "tokenizer.json: is no JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json: has no model"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: damaged"),
    ],
)
def test_damaged_folders_are_named(tokenizer_dir, tmp_path, name, content, message):
    directory = shutil.copytree(tokenizer_dir, tmp_path / "damaged")
    (directory / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(directory)


def test_a_missing_folder_says_how_to_make_one(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"tokenizer\.json: not found; make it with megatron-ds train-tokenizer"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        tokenizer.save(tmp_path / "file")
