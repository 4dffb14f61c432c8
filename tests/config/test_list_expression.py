"""Megatron's list arithmetic: what it means, and that nothing else is read, let alone run."""

import pytest

from megatron_ds.config.list_expression import MAX_LENGTH, parse_integers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0, 1,1]", [0, 1, 1]),
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        (" 2*([0]+[1]*2) ", [0, 1, 1, 0, 1, 1]),
        ("[1]*2*3", [1] * 6),
        ("[0]*0", []),
        ("[]", []),
        (f"[1]*{MAX_LENGTH}", [1] * MAX_LENGTH),
    ],
)
def test_expressions(text, value):
    assert parse_integers(text) == value == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "2", "1+1", "[0", "[x]", "[True]", "[1.0]", "[[1]]", "[1]-[1]", "[1]*[2]", "[1]+1", "2*2", "[-1]", "f([1])",
        "__import__('os')", "[1]*9**9", f"[1]*{MAX_LENGTH + 1}", "[1]*999999999999", "[1]*5000+[1]*5001", "[1]\0",
    ],
)  # fmt: skip
def test_anything_else_is_no_list(text):
    assert parse_integers(text) is None
