"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first `words` columns are words, on the left, and whose others are numbers, on the right."""
    rules = ["---" if column < words else "--:" for column in range(len(head))]
    lines = [list(head), rules, *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
