"""The configuration file as text: positions of slips, double keys, names that do not exist."""

import re

import pytest

from megatron_ds.config.load import load_config
from megatron_ds.errors import ConfigError

FLAGS = ["--data-path", "a", "--tokenizer", "t"]


def report(file, *flags) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(["--deepspeed_config", str(file), *FLAGS, *flags], world_size=1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "fix"),
    [
        ('{\n  "bf16": {"enabled": true},\n}', 3, "delete the last comma"),
        ('{\n  "bf16": {}\n  "fp16": {}\n}', 3, "put a comma between"),
        ('{\n  // no\n  "bf16": {}\n}', 2, "no comments"),
        ('{"a": [1, 2,]}', 1, "delete the last comma"),
        ("", 1, "the file is empty"),
        ("{'a': 1}", 1, "correct it there"),
        ('{"a": 1}}', 1, "correct it there"),
        ('{"megatron_ds": \n', 2, "ends too early"),
        ('{"a": 1,\n\n', 3, "ends too early"),
    ],
)
def test_syntax_errors_have_their_position(tmp_path, text, line, fix):
    file = tmp_path / "run.json"
    file.write_text(text)
    message = report(file)
    assert message.startswith("1 problem")
    assert re.search(rf"is not JSON: {re.escape(str(file))}:{line}:\d+: .+; ", message)
    assert fix in message


def test_a_broken_file_does_not_hide_broken_flags(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("{")
    message = report(file, "--num-layers", "x", "--nonsense")
    assert message.startswith("3 problems")
    assert "num_layers" in message
    assert "--nonsense" in message


def test_keys_given_twice_are_reported_with_their_path(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"megatron_ds": {"model": {"num_layers": 2, "num_layers": 3}}, "bf16": {}, "bf16": {}}')
    message = report(file)
    assert message.startswith("2 problems")
    assert "megatron_ds.model.num_layers = 3: the key is given twice; keep one of the two" in message
    assert "bf16 = {}: the key is given twice" in message


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "v1_tiny.json").write_text("{}")
    assert f"no such file; did you mean {tmp_path / 'v1_tiny.json'}?" in report(tmp_path / "v1_tny.json")
    assert "has v1_tiny.json" in report(tmp_path / "quite_another")
    assert "does not exist either" in report(tmp_path / "nowhere" / "v1.json")
    assert "cannot be read" in report(tmp_path)


def test_what_is_no_object_or_no_text(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("[1]")
    assert "must hold one object" in report(file)
    file.write_bytes(b'{"a": "\xff"}')
    assert "must be UTF-8 text, but byte 7 is not" in report(file)
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert load_config(["--config", str(file), *FLAGS], world_size=1).config
