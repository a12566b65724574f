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
    """What running one cell gave: a number for each name, the seconds it took, which state of the code made it, and where."""

    cell: Cell
    values: Mapping[str, float]
    seconds: float = 0.0
    code: str = ""
    where: str = ""


def vary(default: Mapping[str, Value], **others: Sequence[Value]) -> list[dict[str, Value]]:
    """The default point, then every point that differs from it in one factor only; repeats are left out."""
    points = [dict(default)]
    for factor, values in others.items():
        points += [{**default, factor: value} for value in values]
    return [point for index, point in enumerate(points) if point not in points[:index]]


@dataclass(frozen=True)
class Suite(ABC):
    """A benchmark: what it needs, which cells it has, how one is run and how the rows become a table.

    `data` is the folder of data sets and weights; `seeds` is how often every cell is repeated; `device` is where torch
    computes. Drop a file with a concrete subclass into this folder and `renorm bench` knows it by `name`. Raise `revision`
    when `run_cell` changes what it measures: rows of an older revision are run again.

    Raises:
        UsageError: a size that is unknown, fewer than three seeds, or a device that the suite or this machine does not know.
        DataError: `data` is no folder, or lacks one of the files in `needs`.
    """

    name: ClassVar[str]
    revision: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()
    timed: ClassVar[bool] = False  # a suite that measures time runs its cells one after another, alone
    moves: ClassVar[bool] = False  # whether `run_cell` puts models and data on `device`; without, it is the processor

    data: Path
    size: Size = "quick"
    seeds: int = 3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UnknownName("size", self.size, SIZES)
        if self.seeds < FEWEST_SEEDS:
            raise UsageError(f"a paired interval needs {FEWEST_SEEDS} seeds or more, and got seeds={self.seeds}")
        self._refuse_other_device()
        if self.needs and (self.data == Path() or not self.data.is_dir()):
            found = "none was given" if self.data == Path() else f"{self.data} is no folder"
            raise DataError(f"--data should be the folder with {_some(self.needs)}; {found}")
        missing = [name for name in self.needs if not (self.data / name).is_file()]
        if missing:
            raise DataError(
                f"the suite {self.name!r} reads {_some(missing)} in --data, and {self.data} holds no such file; "
                "benchmarks/README.md says where they come from"
            )

    def _refuse_other_device(self) -> None:
        if self.device == "cpu":
            return
        if not self.moves:
            raise UsageError(
                f"the suite {self.name!r} computes on the processor, and device={self.device!r} was asked for; leave it out"
            )
        import torch

        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first = str(error).partition("\n")[0]
            raise UsageError(f"device={self.device!r} was asked for, and torch has none here: {first}") from error

    def device_of(self, cell: Cell) -> str:
        """Where this cell is computed; a cell that measures the processor stays there."""
        return self.device

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
