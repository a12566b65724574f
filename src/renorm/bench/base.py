"""What a suite is: a grid of cells, a way to run one, and a table made of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from renorm.errors import DataError, UnknownName, UsageError
from renorm.family import members

__all__ = ["SIZES", "Cell", "Row", "Size", "Suite", "Value", "catalogue", "vary"]

Value = str | int | float | bool
Size = Literal["quick", "full"]
SIZES: tuple[Size, ...] = ("quick", "full")
FEWEST_SEEDS = 3  # fewer leave a paired interval no degrees of freedom to speak of


@dataclass(frozen=True)
class Cell:
    """One point of a grid: a value for each factor, in the order in which the suite names them."""

    factors: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, **factors: Value) -> Cell:
        """The cell with these factors."""
        return cls(tuple(factors.items()))

    def __getitem__(self, factor: str) -> Any:
        """The value of `factor`; KeyError where the cell has none by that name."""
        return dict(self.factors)[factor]

    @property
    def key(self) -> str:
        """The factors as text, sorted by name, so that a suite may reorder them without losing its rows."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.factors))

    def __str__(self) -> str:
        return " ".join(str(value) for _, value in self.factors)


@dataclass(frozen=True)
class Row:
    """What running one cell gave: a number for each name, the seconds it took, and which state of the code made it."""

    cell: Cell
    values: Mapping[str, float]
    seconds: float = 0.0
    code: str = ""


def vary(default: Mapping[str, Value], **others: Sequence[Value]) -> list[dict[str, Value]]:
    """The default point, then every point that differs from it in one factor only; repeats are left out."""
    points = [dict(default)]
    for factor, values in others.items():
        points += [{**default, factor: value} for value in values]
    return [point for index, point in enumerate(points) if point not in points[:index]]


@dataclass(frozen=True)
class Suite(ABC):
    """A benchmark: what it needs, which cells it has, how one is run and how the rows become a table.

    `data` is the folder of data sets and weights; `seeds` is how often every cell is repeated. Drop a file with a
    concrete subclass into this folder and `renorm bench` knows it by `name`. Raise `revision` when `run_cell` changes
    what it measures: rows of an older revision are run again.

    Raises:
        UsageError: a size that is unknown, or fewer than three seeds.
        DataError: `data` is no folder, or lacks one of the files in `needs`.
    """

    name: ClassVar[str]
    revision: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[bool] = False  # a suite that measures time runs its cells one after another, alone

    data: Path
    size: Size = "quick"
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UnknownName("size", self.size, SIZES)
        if self.seeds < FEWEST_SEEDS:
            raise UsageError(f"a paired interval needs {FEWEST_SEEDS} seeds or more, and got seeds={self.seeds}")
        if self.needs and (self.data == Path() or not self.data.is_dir()):
            found = "none was given" if self.data == Path() else f"{self.data} is no folder"
            raise DataError(f"--data should be the folder with {_some(self.needs)}; {found}")
        missing = [name for name in self.needs if not (self.data / name).is_file()]
        if missing:
            raise DataError(
                f"the suite {self.name!r} reads {_some(missing)} in --data, and {self.data} holds no such file; "
                "benchmarks/README.md says where they come from"
            )

    @abstractmethod
    def cells(self) -> Iterator[Cell]:
        """Every cell, cells that share data next to each other."""

    @abstractmethod
    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        """The numbers of one cell; the same cell gives the same numbers, times apart."""

    @abstractmethod
    def table(self, rows: Sequence[Row]) -> str:
        """The rows as markdown; it must stand with any part of the rows missing, as after an interruption."""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@cache
def catalogue() -> dict[str, type[Suite]]:
    """Every suite in this folder, by the name that the command line uses."""
    return members("renorm.bench", Suite)
