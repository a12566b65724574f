"""Pages of the site that are made while it is built, so that they cannot go stale: commands, API, benchmarks, READMEs.

MkDocs calls the functions `on_…`; nothing here is part of the package. A page of the repository links to files as they lie
there, so that the links work on the forge too; here they are turned to where those files stand on the site.
"""

from __future__ import annotations

import html
import inspect
import posixpath
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

import renorm
from renorm import layers
from renorm.cli.base import Command, Setting, catalogue, members_settings, methods, settings, summary
from renorm.cli.help import usage
from renorm.cli.parse import placeholder
from renorm.family import members
from renorm.layers.base import Layer
from renorm.methods.base import Method
from renorm.online.base import Online
from renorm.regularisers.base import Regulariser

ROOT = Path(__file__).parents[1]
HIDDEN = re.compile(r"^<!-- python\n.*?^-->\n", re.DOTALL | re.MULTILINE)  # what tests run and a reader need not see
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
# Pages of the repository that lie outside docs/, and where they stand on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "licence.md",
    "examples/essay.py": "examples/essay.md",
    "benchmarks/README.md": "benchmarks/index.md",
} | {
    f"benchmarks/results/{page.name}": f"benchmarks/{page.name}"
    for page in sorted((ROOT / "benchmarks" / "results").glob("*.md"))
}
# Public things that stand in no family and not at the top: who reads the pages meets them.
BESIDES = (
    *("renorm.models.load_model", "renorm.models.open_model", "renorm.datasets.load.load_data"),
    *("renorm.conventions.to_torch", "renorm.conventions.foreign_conventions"),
    *("renorm.finetune.training", "renorm.recipe.Recipe", "renorm.log.LOGGER"),
)


# ── what MkDocs calls ──


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the made pages where the navigation says `folder/*`."""
    made = {"commands": list(commands()), "api": list(api()), "benchmarks": list(benchmarks())}
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # headings in Chinese have names too
    config.nav = [_filled(entry, made) for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages, and those that lie elsewhere in the repository."""
    for place, text in (*commands(), *api()):
        files.append(File.generated(config, place, content=text))
    for source, place in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".py"):
            text = f"# {source}\n\n```python\n{text}```\n"
        elif source == "LICENSE":
            text = f"# Licence\n\n```text\n{text}```\n"
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out what only tests run, and turn links to where files stand on the site."""
    return led(HIDDEN.sub("", markdown), page.file.src_uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch anything when it is opened."""
    fetched = re.search(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>", output)
    if fetched and 'rel="canonical"' not in fetched[0]:
        raise PluginError(f"{page.file.src_uri} would fetch {fetched[0]}")
    return output


def led(markdown: str, place: str) -> str:
    """The text of the page at `place` with its links as they lead on the site."""
    source = next((file for file, there in ELSEWHERE.items() if there == place), f"docs/{place}")

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        there = ELSEWHERE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if there is None:
            return link[0]  # MkDocs will say that it leads nowhere
        return f"]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{link[2] or ''})"

    return LINK.sub(turned, markdown)


def _filled(entry: Any, made: dict[str, list[tuple[str, str]]]) -> Any:
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if isinstance(value, list):
        return {title: [_filled(each, made) for each in value]}
    folder, _, rest = value.partition("/")
    return {title: [place for place, _ in made[folder]]} if rest == "*" else entry


# ── commands ──


def commands() -> Iterator[tuple[str, str]]:
    """Place and text of one page for each command, after one that lists them."""
    rows = [f"| [`renorm {name}`]({name}.md) | {summary(kind)} |" for name, kind in catalogue().items()]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    exits = (
        "Exit codes: 0 all well, 1 something was found or did not hold up, 2 the command could not be carried out, 130 "
        "interrupted. Made from the commands themselves; `renorm COMMAND --help` says the same."
    )
    yield "commands/index.md", f"# Commands\n\n{table}\n\n{exits}\n"
    for name, kind in catalogue().items():
        yield f"commands/{name}.md", command(kind)


def command(kind: type[Command]) -> str:
    """The page of one command: how it is called, what it does, an example, every option."""
    everywhere = {each.name for each in fields(Command)}
    known = [s for s in settings(kind) if s.key != "options"]
    own, general = ([s for s in known if (s.key in everywhere) == shared] for shared in (False, True))
    parts = [
        f"# renorm {kind.name}",
        f"    {usage(kind)}",
        inspect.getdoc(kind) or "",
        f"For example:\n\n    {kind.example}",
        *([f"## Its own options\n\n{_options(own)}"] if own else []),
        f"## As every command\n\n{_options(general)}",
        "`--config FILE` reads options from a YAML file, over which words on the command line win; `--print-config` prints "
        "the options as such a file, and does nothing else.",
    ]
    if any(s.key == kind.chooses for s in known):
        parts += [
            f"## With `--{kind.chooses} {name}`\n\n{_first(member)}\n\n{_options(members_settings(kind, name))}"
            for name, member in methods(kind).items()
        ]
    return "\n\n".join(parts) + "\n"


def _options(known: list[Setting]) -> str:
    rows = []
    for each in known:
        value = "" if each.type is bool or each.positional else f" {placeholder(each)}"
        name = each.key.upper() if each.positional else f"{each.short + ', ' if each.short else ''}{each.flag}{value}"
        shown = "needed" if each.required else "" if each.default in (None, "", (), False) else f"`{each.default}`"
        rows.append(f"| <code>{_cell(name)}</code> | {_cell(each.help)} | {shown} |")
    return "\n".join(["| option | what it does | default |", "|---|---|---|", *rows]) if rows else "It has no options."


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def _first(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


# ── API ──


def api() -> Iterator[tuple[str, str]]:
    """Place and text of the pages of the API: the public names by the part of the house they stand in, then families."""
    parts = _parts()
    pages: dict[str, list[str]] = {title: [] for title in dict.fromkeys(parts.values())}
    for public in renorm.__all__:
        path = _path(getattr(renorm, public))
        pages[parts[path.split(".")[1]]].append(path)
    for path in BESIDES:
        pages[parts[path.split(".")[1]]].append(path)
    of_layers = [*_paths("renorm.layers", Layer), *layers.BESIDES]
    families = {
        "Layers": ("What stands where a batch norm stood; `convert_` puts them there.", of_layers),
        "Methods": ("Ways to adapt without labels, by `method=`.", _paths("renorm.methods", Method)),
        "Online methods": ("Ways to adapt on a stream, by `adapt_(method=)`.", _paths("renorm.online", Online)),
        "Regularisers": ("What keeps fine-tuning near its source.", _paths("renorm.regularisers", Regulariser)),
    }
    written = {
        **{title: ("", paths) for title, paths in pages.items() if paths},
        **families,
    }
    rows = []
    for title, (_, paths) in written.items():
        names = ", ".join("`" + path.rpartition(".")[2] + "`" for path in paths)
        rows.append(f"| [{title}]({_slug(title)}.md) | {names} |")
    intro = "Every public name, from its docstring. A trailing `_` changes its argument in place, and can be undone."
    table = "\n".join(["| part | names |", "|---|---|", *rows])
    yield "api/index.md", f"# API\n\n{intro}\n\n{table}\n"
    for title, (about, paths) in written.items():
        body = "\n\n".join(f"::: {path}" for path in paths)
        yield f"api/{_slug(title)}.md", f"# {title}\n\n{about}\n\n{body}\n"


def _parts() -> dict[str, str]:
    """Room → the part of the house it stands in, as docs/architecture.md draws it."""
    found, part = {}, ""
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"\s+── (.*) ──$", line):
            part = heading[1].partition(":")[0].replace(";", " and").replace("+", "and").capitalize()
        elif part and (room := re.match(r"    (\w+)(?:\.py|/) ", line)):
            found[room[1]] = part
    return found


def _paths(package: str, interface: type) -> list[str]:
    return [_path(each) for each in members(package, interface).values()]


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


class Fields(griffe.Extension):
    """Docstrings line up fields as `name   words`, which Markdown would run together: they become lists."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Called for every object that was read."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """`text` with every block of lined-up fields as a list."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        field = re.match(r"(\w[\w.]*(?:(?:, | \| )\w+)*) {2,}(\S.*)$", line)
        if field:
            out += [] if inside else [""]
            out.append(f"- `{field[1]}`: {field[2]}")
            inside = True
        elif inside and re.match(r" +\S", line):
            out.append(f"    {line.strip()}")
        else:
            out += [""] if inside and line.strip() else []
            inside = False
            out.append(line)
    return "\n".join(out)


# ── benchmarks ──


def benchmarks() -> Iterator[tuple[str, str]]:
    """Place and source of the benchmarks' pages, the one on how they are measured first."""
    for source, place in ELSEWHERE.items():
        if place.startswith("benchmarks/"):
            yield place, source
