"""The generated pages are up to date and complete, and the page of exit codes tells what the errors have."""

from pathlib import Path

import pytest

from megatron_ds import errors
from megatron_ds.config.flags import FLAGS
from megatron_ds.config.reference import PAGES
from megatron_ds.config.tree import LEAVES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_schema_says(name):
    command = f"python -m megatron_ds.config.reference {name} > docs/{name}.md"
    assert (DOCS / f"{name}.md").read_text() == PAGES[name](), f"behind the schema; run {command}"


def test_the_pages_are_complete():
    page = PAGES["configuration"]()
    for leaf in LEAVES:
        assert f"| `{leaf.path[-1]}` |" in page
    for name in FLAGS:
        assert f"`{name}`" in page
        assert name in PAGES["from_megatron"]()


def test_the_exit_codes_are_documented():
    page = (DOCS / "exit_codes.md").read_text()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MegatronError)
    ]
    assert len(kinds) >= 4
    for kind in kinds:
        assert f"| {kind.exit_code} |" in page
