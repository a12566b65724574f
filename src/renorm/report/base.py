"""The value that every face renders: a verdict in plain words, blocks of words and tables, and the numbers for machines.

A face (terminal, JSON, HTML) knows these few types and no command; a command knows no face.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any, Literal

POINTS = 200  # of a line: more than a picture has room for
Tone = Literal["good", "doubt", "bad", "plain"]


@dataclass(frozen=True)
class Words:
    """A paragraph; `tone` is what a reader should feel before reading it, `title` a few words in front."""

    text: str
    tone: Tone = "plain"
    title: str = ""


@dataclass(frozen=True)
class Bar:
    """A number drawn as a length: `share` of the full width, 0 to 1, with `text` written beside it."""

    share: float
    text: str


@dataclass(frozen=True)
class Told:
    """A cell with a tone of its own."""

    text: str
    tone: Tone


Cell = str | Bar | Told


@dataclass(frozen=True)
class Table:
    """Rows of cells under `columns`; columns named in `words` hold prose and may wrap, all others hold numbers or names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """Numbers to be drawn; faces without pictures leave it out, so a table says what matters too.

    `across` and `up` name the axes, `note` says how to read it.
    """

    title: str
    across: str = ""
    up: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars(Picture):
    """One upright bar for each (name, value, tone), in the order given; `limits` are lines across at (value, tone)."""

    items: tuple[tuple[str, float, Tone], ...]
    limits: tuple[tuple[float, Tone], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Heat(Picture):
    """One strip for each (name, text, values): values from 0 to `top` as shades; the values are sorted, largest first."""

    rows: tuple[tuple[str, str, tuple[float, ...]], ...]
    top: float


@dataclass(frozen=True, kw_only=True)
class Spans(Picture):
    """One point with its interval for each (name, text, value, low, high, tone), all on one scale: `full` where it ends."""

    items: tuple[tuple[str, str, float, float, float, Tone], ...]
    full: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Lines(Picture):
    """One line for each (name, tone, points (x, y)), broken where y is no number.

    `bands` shade from x to x, `marks` are upright lines at x; `full` says where the scale of y begins and ends.
    """

    items: tuple[tuple[str, Tone, tuple[tuple[float, float], ...]], ...]
    bands: tuple[tuple[float, float, Tone], ...] = ()
    marks: tuple[tuple[float, Tone], ...] = ()
    full: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Curves(Picture):
    """One line for each (name, points, tone), points as (x, y); both axes are logarithmic; `limits` as of bars."""

    series: tuple[tuple[str, tuple[tuple[float, float], ...], Tone], ...]
    limits: tuple[tuple[float, Tone], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Matrix(Picture):
    """One square for each pair of `names`, row by row: shaded by its share of its row, with its count written in it."""

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


Block = Words | Table | Picture


@dataclass(frozen=True)
class Report:
    """All that one run of a command says.

    `verdict` comes first and stands alone; `result` holds the numbers, in builtins only, under names that the JSON
    schema fixes; `notes` say how model and data were read; `exit_code` is 0 when all is well, 1 when something was found;
    `origin` says where it came from, as `provenance.provenance` does, for faces that are kept.
    """

    command: str
    model: str
    data: str
    verdict: Words
    blocks: tuple[Block, ...]
    result: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    exit_code: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict)


def thinned(points: Sequence[tuple[float, float]], *, most: int = POINTS) -> tuple[tuple[float, float], ...]:
    """At most so many points: the means of neighbours; what is no number counts only where all of them are none."""
    each = max(1, -(-len(points) // most))
    parts = [points[start : start + each] for start in range(0, len(points), each)]
    return tuple((mean([x for x, _ in part]), mean([y for _, y in part])) for part in parts)


def mean(values: Iterable[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    finite = [value for value in values if isfinite(value)]
    return sum(finite) / len(finite) if finite else nan


def plainly(value: float, digits: int = 2) -> str:
    """So many digits that count; of larger numbers, below a billion, all those before the point."""
    return f"{value:,.0f}" if 10**digits - 0.5 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def clean(text: str) -> str:
    """`text` without control characters, so that a name in a file can neither steer a terminal nor turn a page around."""
    return "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else "�" for c in text)
