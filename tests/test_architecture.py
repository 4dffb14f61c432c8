"""The design as a test: sizes, import directions, where the big libraries may be imported, and module stories.

A limit that is not checked decays. An exception goes into ``EXCEPTIONS`` with its reason; there may be five at most.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_ds"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / name for name in ("pretrain.py", "setup.py"))])
SHOWN = [str(path.relative_to(ROOT)) for path in SOURCES]

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
EXCEPTIONS: dict[str, str] = {}
"""File or file:function -> why it may be longer."""

SELF_EXPLAINING = ("rules.py", "moe_rules.py", "parallel_rules.py", "schedule_rules.py", "training_rules.py")
"""Files whose functions are sentences: each is named after the rule it checks and returns that rule in words."""

BELOW = {
    "config": (),
    "parallel": ("config",),
    "model": ("config", "parallel"),
    "data": ("config", "parallel"),
    "optim": ("config", "parallel"),
    "pipeline": ("config",),
    "checkpoint": ("config", "parallel"),
    "hf": ("config", "parallel", "model", "data", "optim", "pipeline", "checkpoint"),
    "engine": ("config", "parallel", "model", "data", "optim", "pipeline", "checkpoint", "hf"),
    "train": ("config", "parallel", "model", "data", "optim", "pipeline", "checkpoint", "hf", "engine"),
    "inference": ("config", "parallel", "model", "data", "checkpoint", "hf"),
    "cli": ("config", "parallel", "model", "data", "pipeline", "checkpoint", "hf", "engine", "train", "inference"),
}
"""What each part may import of the package: only what lies below it."""

CONFINED = {
    "deepspeed": ("engine/", "model/moe/layer.py", "parallel/groups.py"),
    "torch.distributed": ("parallel/",),
    "wandb": ("train/monitor.py",),
    "transformers": ("hf/", "data/tokenizer.py", "inference/"),
}
"""Library -> the only places of the package that may import it."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path):
    """(line, dotted name) of everything a file imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def docstring_lines(node: ast.AST) -> int:
    """Lines of all strings that stand as statements: docstrings, and the documentation below fields."""
    return sum(
        child.end_lineno - child.lineno + 1
        for child in ast.walk(node)
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) and isinstance(child.value.value, str)
    )


def functions(path: Path):
    yield from (n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("path", SOURCES, ids=SHOWN)
def test_sizes(path):
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text().splitlines()) - docstring_lines(tree(path))
    assert lines <= MAX_FILE_LINES or name in EXCEPTIONS, f"{name}: {lines} lines without docstrings"
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1 - docstring_lines(function)
        assert length <= MAX_FUNCTION_LINES or f"{name}:{function.name}" in EXCEPTIONS, (
            f"{name}:{function.lineno}: {function.name} has {length} lines without docstrings"
        )


@pytest.mark.parametrize("path", SOURCES, ids=SHOWN)
def test_every_module_tells_its_story(path):
    assert ast.get_docstring(tree(path)), f"{path} has no module docstring"


@pytest.mark.parametrize("path", SOURCES, ids=SHOWN)
def test_public_functions_and_classes_are_documented(path):
    public = [
        node
        for owner in ast.walk(tree(path))
        if isinstance(owner, ast.Module | ast.ClassDef) and not getattr(owner, "name", "").startswith("_")
        for node in owner.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    told = {node.name for node in public if ast.get_docstring(node)}  # an override is told where it is declared
    bare = [n.name for n in public if n.name not in told and n.name not in ("forward", "backward", "main")]
    if path.name in SELF_EXPLAINING:
        bare = []
    assert not bare, f"{path.relative_to(ROOT)}: no docstring: {bare}"


@pytest.mark.parametrize("path", [p for p in SOURCES if PACKAGE in p.parents], ids=lambda p: p.name)
def test_imports_go_downwards(path):
    home = path.relative_to(PACKAGE).parts[0]
    for line, name in imports(path):
        parts = name.split(".")
        assert not name.startswith(".") or "remote_code" in path.parts, f"{path}:{line}: use absolute imports"
        if parts[0] == "megatron_ds" and len(parts) > 1 and parts[1] in BELOW and home in BELOW and parts[1] != home:
            assert parts[1] in BELOW[home], f"{path}:{line}: {home} must not import {parts[1]}"


@pytest.mark.parametrize("library", CONFINED)
def test_libraries_stay_where_they_belong(library):
    for path in PACKAGE.rglob("*.py"):
        place = str(path.relative_to(PACKAGE))
        for line, name in imports(path):
            if f"{name}.".startswith(f"{library}."):
                assert place.startswith(CONFINED[library]), f"{place}:{line}: {library} may not be imported here"


def test_the_list_of_exceptions_is_short_and_true():
    assert len(EXCEPTIONS) <= 5
    for name, reason in EXCEPTIONS.items():
        assert (ROOT / name.split(":")[0]).exists() and len(reason) > 20
