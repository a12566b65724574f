"""Which classes were found, and what the others were taken for: a table, and a square for every pair of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from renorm.report.base import Bar, Block, Matrix, Table
from renorm.said import Said, follow, say

ROWS = 10
DRAWN = 60  # classes; more of them are dots
NONE = "–"


def blocks(confusion: Tensor | None, names: Sequence[str] | None) -> tuple[Block, ...]:
    """The classes that have samples, worst first, and the matrix; nothing where classes are not what was learnt."""
    if confusion is None or not int(confusion.sum()):
        return ()
    called = _called(len(confusion), names)
    return (_table(confusion, called), *_matrix(confusion, called))


def result(confusion: Tensor | None, names: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """The numbers, for machines: for each class its samples, and how many of them were given each answer."""
    if confusion is None:
        return None
    called = _called(len(confusion), names)
    rows: list[list[int]] = confusion.tolist()
    return [{"class": name, "count": sum(row), "answers": row} for name, row in zip(called, rows, strict=True)]


def _called(classes: int, names: Sequence[str] | None) -> Sequence[str]:
    return names if names is not None and len(names) == classes else [str(label) for label in range(classes)]


def _table(confusion: Tensor, names: Sequence[str]) -> Table:
    counts: list[list[int]] = confusion.tolist()
    said: list[int] = confusion.sum(0).tolist()
    known = [label for label, row in enumerate(counts) if sum(row)]
    worst = sorted(known, key=lambda place: counts[place][place] / sum(counts[place]))
    rows = []
    for place in worst[:ROWS]:
        right, total = counts[place][place], sum(counts[place])
        precision = f"{right / said[place]:.1%}" if said[place] else NONE
        found = Bar(right / total, f"{right / total:.1%}")
        rows.append((names[place], found, precision, f"{total:,}", _mistake(place, counts[place], names)))
    note: Said = say("Recall: of its samples, those found. Precision: of the answers with its name, the right ones.")
    if hidden := len(worst) - len(rows):
        note = follow(note, say("{hidden} more in --format json.", hidden=hidden))
    if empty := len(counts) - len(known):
        note = follow(note, say("{count} classes had no sample.", count=empty))
    label = say("class")
    columns = (label, say("recall"), say("its precision"), say("samples"), say("taken for"))
    return Table(say("Classes on val, worst first"), columns, tuple(rows), words=(label,), note=note)


def _mistake(label: int, row: Sequence[int], names: Sequence[str]) -> str:
    others = [(count, -other) for other, count in enumerate(row) if other != label and count]
    if not others:
        return NONE
    count, other = max(others)
    return f"{names[-other]} ({count:,})"


def _matrix(confusion: Tensor, names: Sequence[str]) -> tuple[Block, ...]:
    if len(confusion) > DRAWN:
        return ()
    counts: list[list[int]] = confusion.tolist()
    note = say("A row is the samples of one class, a column one answer; the darker, the larger the share of the row.")
    return (
        Matrix(
            say("What was taken for what"),
            across=say("answer"),
            up=say("class"),
            note=note,
            names=tuple(names),
            counts=tuple(map(tuple, counts)),
        ),
    )
