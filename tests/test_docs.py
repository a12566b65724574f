"""Every ```python block of README.md and docs/ runs, in its order, in an empty folder.

A page may prepare names that would only distract its reader, such as a model, in a comment: `<!-- python … -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from renorm import methods
from renorm.cli.base import catalogue as commands
from renorm.cli.parse import parse
from renorm.methods.base import catalogue

ROOT = Path(__file__).parents[1]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- |```)python(?: title=\"(?P<file>[^\"]+)\")?\n(?P<code>.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path) -> list[tuple[str | None, int, str]]:
    """File title (or None), line and code of every python block of `page`."""
    text = page.read_text(encoding="utf-8")
    return [(m["file"], text.count("\n", 0, m.start("code")), m["code"]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page, one story: the blocks share their names. A block with a title is a file, written where it says: in
    an empty folder, whose src/renorm/methods is scanned beside the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "src/renorm/methods")])
    catalogue.cache_clear()
    before = set(sys.modules)
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for file, line, code in blocks(page):
            if file:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).write_text(code, encoding="utf-8")
            else:
                # Empty lines before the code: a traceback then names the line of the page.
                exec(compile("\n" * line + code, page, "exec"), names)
    finally:
        catalogue.cache_clear()
        for module in set(sys.modules) - before:
            if module.startswith("renorm.methods."):
                del sys.modules[module]


def command_lines(page: Path) -> list[str]:
    """The lines of `page` that show the command line at work, without what a table says beside them."""
    found = re.findall(r"^    (?:find .*\| )?(renorm +[a-z]+ +\S.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [
        re.split(r" {3,}|  (?=[a-z\u4e00-\u9fff])", re.sub(r"^(renorm) +(\w+) {1,12}(?=\S)", r"\1 \2 ", line))[0]
        for line in found
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=lambda page: page.name)
def test_every_command_line_on_a_page_is_one_that_is_read(page: Path) -> None:
    for line in command_lines(page):
        name, *words = re.split(r" [>|] ", line)[0].split()[1:]
        if "--method" in words and words[words.index("--method") + 1] == "halfway":
            continue  # which the page itself adds
        given = [word.strip("[]") for word in words if word not in ("…", "--help")]
        assert parse(commands()[name], given).name == name, line


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def in_navigation() -> set[str]:
    """Every page that mkdocs.yml names."""

    def places(nav: Any) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        else:
            for entry in nav.values() if isinstance(nav, dict) else nav:
                yield from places(entry)

    return set(places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    missing = pages - in_navigation()
    assert not missing, f"nobody finds {', '.join(sorted(missing))}: name it under nav: in mkdocs.yml"


def test_both_readmes_say_the_same() -> None:
    """Sections, commands, code without its comments, and the numbers and names in every row of a table."""
    english, chinese = (page.read_text(encoding="utf-8") for page in READMES)
    marks = [re.findall(r"^#+ ", text, flags=re.MULTILINE) for text in (english, chinese)]
    assert marks[0] == marks[1]
    code = [
        [re.sub(r" *#.*", "", code) for _, _, code in blocks(page)]  # what follows # is said in each language
        for page in READMES
    ]
    assert code[0] == code[1]
    commands = [
        [
            re.split(r" {2,}", line.strip())[0]
            for line in re.findall(r"^    (?:renorm|make|pip) .*", text, flags=re.MULTILINE)
        ]
        for text in (english, chinese)
    ]
    assert commands[0] == commands[1]
    rows = [
        [re.findall(r"`[^`]+`|\d+(?:[.,]\d+)*", row) for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)]
        for text in (english, chinese)
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert sorted(ours) == sorted(theirs)


def test_the_map_of_the_house_names_every_room_that_stands() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "src" / "renorm").iterdir() if path.suffix == ".py"}
    folders = {path.name + "/" for path in (ROOT / "src" / "renorm").iterdir() if any(path.glob("*.py"))}
    assert {room for room in rooms | folders if f"\n    {room} " not in page} == set()
