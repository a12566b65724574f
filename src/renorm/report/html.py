"""The face for people who were not there: one HTML page that fetches nothing, runs nothing and shows every name as text.

`render` makes the page; `fragment` the words and tables alone, for notebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from renorm.report import pictures
from renorm.report.base import Bar, Block, Picture, Report, Table, Told, clean
from renorm.report.language import LANGUAGES, translated
from renorm.report.terminal import MARK
from renorm.said import Said, say

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup

# The page's own words; everything else comes with the report.
LABELS: Mapping[str, Said] = {
    "model": say("model"),
    "data": say("data"),
    "notes": say("How model and data were read"),
    "origin": say("Where this comes from"),
    "again": say("To run it again:"),
    "good": say("good"),
    "doubt": say("doubtful"),
    "bad": say("bad"),
    "plain": say("note"),
}
ORIGIN: Mapping[str, Said] = {
    "created": say("made (UTC)"),
    "renorm": say("renorm version"),
    "torch": say("torch version"),
    "model": say("fingerprint of the model before any change (SHA-256 of its tensors)"),
    "checkpoint": say("checkpoint file (SHA-256)"),
    "data": say("fingerprint of the data"),
}


def render(report: Report, *, lang: str = "en") -> str:
    """`report` as one page of HTML in `lang`, in UTF-8.

    Raises MissingExtra without matplotlib.
    """
    pictures.available()
    shown = translated(report, lang)
    return _template("page.html").render(
        report=shown,
        lang=LANGUAGES[lang],
        labels={key: translated(text, lang) for key, text in LABELS.items()},
        origin=[
            (translated(label, lang), report.origin[key]) for key, label in ORIGIN.items() if report.origin.get(key)
        ],
        style=_style(),
    )


def fragment(*blocks: Block) -> str:
    """`blocks` as a piece of HTML that can stand in any page, without their pictures."""
    said = [block for block in blocks if not isinstance(block, Picture)]
    return _template("fragment.html").render(blocks_shown=said, style=_style(), labels=LABELS)


def _template(name: str) -> Template:
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        autoescape=True,
        loader=PackageLoader("renorm.report", "page"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalised,
    )
    made.tests |= {"table": _is(Table), "picture": _is(Picture), "bar": _is(Bar), "told": _is(Told)}
    made.filters["svg"] = _svg
    made.globals["mark"] = MARK
    return made


def _is(kind: type[Any]) -> Any:
    return lambda value: isinstance(value, kind)


def _finalised(value: Any) -> Any:
    """What reaches the page: text without control characters; what is markup already stays."""
    return clean(str(value)) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _svg(picture: Picture, name: str) -> Markup:
    from markupsafe import Markup

    drawn = pictures.figure([picture], titles=False)
    return Markup(pictures.svg(drawn, label=picture.title, name=name))


@cache
def _style() -> Markup:
    from markupsafe import Markup

    return Markup(files("renorm.report").joinpath("page", "style.css").read_text(encoding="utf-8"))
