"""The documentation's site: what is made says what the code does, links lead somewhere."""

from __future__ import annotations

import html
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import renorm
from renorm import layers
from renorm.cli.base import Command, catalogue, settings
from tests.test_docs import in_navigation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def made() -> Iterator[ModuleType]:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("made", DOCS / "made.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "made", module)
        spec.loader.exec_module(module)
        yield module


def test_the_navigation_names_no_page_that_is_not_there(made: ModuleType) -> None:
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(made.ELSEWHERE.values())
    assert {place for place in in_navigation() if not place.endswith("/*")} - there == set()


@pytest.mark.parametrize("name", catalogue())
def test_a_commands_page_names_every_option(made: ModuleType, name: str) -> None:
    kind: type[Command] = catalogue()[name]
    page = dict(made.commands())[f"commands/{name}.md"]
    for each in settings(kind):
        if each.key != "options":
            assert (f"<code>{each.key.upper()}<" if each.positional else each.flag) in page
            assert html.escape(each.help, quote=False).replace("|", "&#124;") in page
    assert kind.example in page


def test_the_api_names_every_public_name(made: ModuleType) -> None:
    text = "\n".join(page for _, page in made.api())
    paths = set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))
    for name in renorm.__all__:
        thing = getattr(renorm, name)
        assert f"{thing.__module__}.{thing.__qualname__}" in paths
    assert set(layers.BESIDES) <= paths
    for path in paths:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_links_are_turned_to_where_files_stand_on_the_site(made: ModuleType) -> None:
    assert made.led("[a](docs/fold.md#why) [b](https://x.y/z.md) [c](#here)", "index.md") == (
        "[a](fold.md#why) [b](https://x.y/z.md) [c](#here)"
    )
    assert made.led("[a](../benchmarks/results/fold.md) [b](rules.md)", "essay.md") == (
        "[a](benchmarks/fold.md) [b](rules.md)"
    )
    assert (
        made.led("[a](../LICENSE) [b](../docs/fold.md)", "benchmarks/index.md") == "[a](../licence.md) [b](../fold.md)"
    )
    assert made.led("[a](../src/renorm/fold.py)", "fold.md") == "[a](../src/renorm/fold.py)", (
        "left for MkDocs to refuse"
    )


def test_lined_up_fields_become_a_list(made: ModuleType) -> None:
    text = "One claim.\n\ncount   how many\nmean, var  what was\n        measured\nAnd more."
    assert made.listed(text) == (
        "One claim.\n\n\n- `count`: how many\n- `mean, var`: what was\n    measured\n\nAnd more."
    )


def test_how_to_choose_quotes_the_benchmarks() -> None:
    """Every decimal number in a line that links to a page of results stands on that page."""
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    for paragraph in re.split(r"\n\s*\n|\n(?=\|)", text):
        linked = re.findall(r"\.\./benchmarks/results/(\w+)\.md", paragraph)
        results = [(ROOT / "benchmarks" / "results" / f"{page}.md").read_text(encoding="utf-8") for page in linked]
        for number in re.findall(r"\d+\.\d+", paragraph) if linked else ():
            found = re.compile(rf"(?<![\d.]){re.escape(number)}(?![\d.])")
            assert any(found.search(result) for result in results), f"{number} is not in {' or '.join(linked)}.md"


def test_the_build_counts_its_warnings() -> None:
    """MkDocs logs nothing below an error with --quiet, and --strict counts what is logged: together they pass anything."""
    (line,) = (line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "mkdocs build" in line)
    assert "--strict" in line
    assert not re.search(r"--quiet|-q\b", line)
