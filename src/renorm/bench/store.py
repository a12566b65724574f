"""The rows of a suite on disk: one line of JSON per cell, appended whole, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from renorm.bench.base import Cell, Row
from renorm.errors import DataError

__all__ = ["Store"]

UNSAID = "cpu x86_64"  # where the rows were made that were written before rows said so


class Store:
    """Rows of one suite at one revision in the file `path`; rows of other revisions stay there, unread."""

    def __init__(self, path: Path, revision: int) -> None:
        self.path: Path = path
        self.revision: int = revision
        self._rows = {row.cell.key: row for row in self._read()}

    def has(self, cell: Cell) -> bool:
        """Whether `cell` was run at this revision."""
        return cell.key in self._rows

    def rows(self, cells: Iterable[Cell]) -> list[Row]:
        """The rows of those `cells` that were run, in the order of `cells`."""
        return [self._rows[cell.key] for cell in cells if cell.key in self._rows]

    def add(self, row: Row) -> None:
        """Append `row` and make it lasting; a cell that is there already is superseded by its newest row."""
        line = json.dumps(
            {
                "revision": self.revision,
                "cell": dict(row.cell.factors),
                "values": dict(row.values),
                "seconds": round(row.seconds, 3),
                "code": row.code,
                "where": row.where,
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: a kill leaves at most one torn last line, which reading leaves out; it is ended
        # here before the next row, which would otherwise be glued to it.
        torn = self.path.exists() and not _ends_line(self.path)
        with self.path.open("ab", buffering=0) as file:
            file.write((("\n" if torn else "") + line + "\n").encode())
            os.fsync(file.fileno())
        self._rows[row.cell.key] = row

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), start=1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # an empty or torn line: its cell is run again
            try:
                if entry["revision"] == self.revision:
                    rows.append(_row(entry))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise DataError(
                    f"line {number} of {self.path} is no row of a benchmark; move the file away to start anew"
                ) from error
        return rows


def _row(entry: dict[str, Any]) -> Row:
    values = {name: float(value) for name, value in entry["values"].items()}
    cell, where = Cell(tuple(entry["cell"].items())), str(entry.get("where", UNSAID))
    return Row(cell, values, float(entry["seconds"]), str(entry["code"]), where)


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
