"""The value that every face renders: a verdict in plain words, blocks of words and tables, and the numbers for machines.

A face (terminal, JSON, HTML) knows these few types and no command; a command knows no face.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


Block = Words | Table


@dataclass(frozen=True)
class Report:
    """All that one run of a command says.

    `verdict` comes first and stands alone; `result` holds the numbers, in builtins only, under names that the JSON
    schema fixes; `notes` say how model and data were read; `exit_code` is 0 when all is well, 1 when something was found.
    """

    command: str
    model: str
    data: str
    verdict: Words
    blocks: tuple[Block, ...]
    result: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    exit_code: int = 0
