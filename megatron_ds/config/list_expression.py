"""Megatron's arithmetic for long lists of integers: ``([0]*3+[1]*57)``, read without evaluating any code.

A list in brackets, ``+`` joins two of them, ``* n`` repeats one, parentheses group. Whether the list suits a setting is
not judged here.
"""

import ast

MAX_LENGTH = 10_000
"""Longest list that is read; no model has as many layers."""


def parse_integers(text: str) -> list[int] | None:
    """The list that an expression stands for; None when the text is no such expression."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr) -> list[int]:
    """The list of one node of the syntax tree; ValueError for any node that does not belong here."""
    match node:
        case ast.List(elts=elements):
            return [_integer(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _limited(_value(left), _value(right))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            items, times = (right, left) if isinstance(left, ast.Constant) else (left, right)
            return _limited(*[_value(items)] * min(_integer(times), MAX_LENGTH + 1))
    raise ValueError(ast.dump(node))


def _integer(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError(ast.dump(node))


def _limited(*parts: list[int]) -> list[int]:
    """The parts in one list."""
    if sum(map(len, parts)) > MAX_LENGTH:
        raise ValueError(f"more than {MAX_LENGTH} integers")
    return [item for part in parts for item in part]
