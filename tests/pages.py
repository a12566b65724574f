"""Reports as pages: one with everything in it, hostile names included, and a reader of what a page shows."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from renorm.report.base import Bar, Bars, Heat, Matrix, Report, Spans, Table, Told, Words
from renorm.said import say

# What a file, a class or a layer may be called, and what a page would make of it unescaped.
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><svg onload=alert(1)>",
    "${7*7}{{7*7}}{% raw %}",
    r"$\frac{1}{",
    "a&amp;b&lt;",
    "\x1b[31m\u202egpj.exe\x00",
    "javascript:alert(1)//" + "very_long_name_without_any_break" * 8,
)


def everything(name: str = "layer1.0.bn2") -> Report:
    """A report with every block and every tone, `name` in every place that a user's name can reach."""
    return Report(
        command="doctor",
        model=name,
        data=name,
        verdict=Words(say("At {site}: {value:.2g} {unit}", site=name, value=0.7, unit=say("source sd")), "bad", name),
        blocks=(
            Words(
                say("No batch reached {names}; nothing can be said of them.", names=name), "plain", say("Not looked at")
            ),
            Words(f"{name}\nrenorm doctor {name}", "doubt", say("Untouched")),
            Words(say("Written to {output}.", output=name), "good", say("Undone exactly")),
            Bars(
                name,
                items=((name, 0.4, "doubt"), ("b", 0.9, "bad"), ("c", 0.1, "good")),
                limits=((0.3, "doubt"), (0.5, "bad")),
                across=name,
                up=name,
                note=name,
            ),
            Heat(name, rows=((name, name, (1.0, 0.5, 0.1)), ("b", "0.2", (0.2,))), top=1.0, across=name, up=name),
            Spans(
                name,
                items=((name, name, 50.0, 40.0, 61.0, "plain"), ("b", "70", 70.0, 66.0, 73.0, "good")),
                across=name,
            ),
            Matrix(name, names=(name, "class b"), counts=((3, 1), (0, 250)), across=name, up=name, note=name),
            Table(
                name,
                ("", name, "95 %", "n", "why", "kept"),
                (
                    (name, Bar(1.0, "0.87"), "1 to 2", "3", name, Told(name, "bad")),
                    ("bn2", Bar(0.5, name), "1", "2", "a long sentence " * 5, Told("yes", "good")),
                ),
                words=("why",),
                note=name,
            ),
            Table("", ("site", "distance"), ((name, "1"),)),
        ),
        result={"name": name},
        notes=(name, say("{name}: {note}", name=name, note=say("no class folders, hence no labels"))),
        origin={
            "command": f"renorm doctor {name}",
            "created": "2026-01-01T00:00:00+00:00",
            "model": "0" * 64,
            "data": name,
            "checkpoint": None,
        },
    )


class Page(HTMLParser):
    """What a browser would find in a page: its tags with attributes, and its text without style."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "path", "use", "image", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and data.strip():
            self.text.append(data.strip())

    def said(self, *leaving_out: str) -> str:
        """All text."""
        return "\n".join(self.text)
