"""Mistakes planted in the columns of a table of gas sensors: how many are found and named, and what is blamed wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from renorm.columns import Columns
from renorm.units import UNITS, mistakes_in

__all__ = ["BY_SD", "MET", "PLANTED", "planted"]

MET = ("2", "3", "4", "5", "6")  # batches: the second was trained on, by other rows; the later ones are years younger
UNIT = ("x10", "/10", "x1000", "/1000", "°F for °C", "K for °C", "x60", "x2.54", "negated")
PLANTED = ("nothing", "nothing, one gas", *UNIT, "swapped", "constant")
BY_SD = ("nothing", "nothing, one gas", "x1000", "/1000", "swapped")  # what mean and sd alone can tell
ROWS, EVERY = 256, 4  # rows that are looked at; every fourth column is spoilt, one at a time, others for another seed


def planted(mistake: str, batch: str, *, seed: int, data: Path, recorded: bool = True) -> Mapping[str, float]:
    """`mistake` in one column after another: how many were tried, found and named; how often others were blamed.

    Blamed columns are counted as errors and warnings. Without `recorded`, mean and sd are all that is known of the columns, as
    of a batch norm that reads the table.
    """
    known, tables = _tables(data, batch, seed)
    known = known if recorded else known.alone()
    if mistake.startswith("nothing"):
        found = [
            mistakes_in(known, Columns.measure([rows])) for rows in (tables[1:] if "gas" in mistake else tables[:1])
        ]
        sure = sum(any(each.sure for each in every) for every in found)
        return {"tried": len(found), "errors": sure, "warnings": sum(map(bool, found)) - sure}
    return _one_by_one(mistake, known, tables[0], seed)


def _one_by_one(mistake: str, known: Columns, rows: Tensor, seed: int) -> Mapping[str, float]:
    rng = np.random.default_rng(seed)
    total = {"tried": 0, "found": 0, "named": 0, "errors": 0, "warnings": 0}
    for column in range(seed % EVERY, rows.shape[1], EVERY):
        other = int((column + rng.integers(1, rows.shape[1])) % rows.shape[1])
        wrong, spoilt = rows.clone(), {known.names[column]}
        if mistake == "swapped":
            wrong[:, [column, other]] = rows[:, [other, column]]
            spoilt.add(known.names[other])
        else:
            wrong[:, column] = CHANGES[mistake](rows[:, column])
        found = mistakes_in(known, Columns.measure([wrong]))
        total["tried"] += 1
        total["found"] += spoilt <= {name for each in found for name in each.columns}
        total["named"] += any(set(each.columns) == spoilt and mistake in (each.unit, each.kind) for each in found)
        blamed = [each for each in found if not spoilt.intersection(each.columns)]
        total["errors"] += any(each.sure for each in blamed)
        total["warnings"] += any(not each.sure for each in blamed)
    return total


def _in(name: str) -> Callable[[Tensor], Tensor]:
    return lambda column: UNITS[name].scale * column + UNITS[name].offset


CHANGES: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{name: _in(name) for name in UNIT},
    "constant": lambda column: torch.full_like(column, float(column[0])),
}


@lru_cache(maxsize=1)
def _tables(data: Path, batch: str, seed: int) -> tuple[Columns, list[Tensor]]:
    """What is known of the columns from batches 1 and 2; rows of a batch, then of each gas in it alone."""
    with np.load(data / "gas_drift.npz", allow_pickle=False) as file:
        x, labels, owner = (torch.from_numpy(file[name]) for name in ("X", "labels", "batch"))
    shuffled = torch.randperm(len(x), generator=Generator().manual_seed(seed))
    x, labels, owner = x[shuffled].double(), labels[shuffled], owner[shuffled]
    trained = owner <= 2
    held_out = (owner == int(batch)).nonzero()[:, 0]
    if batch in ("1", "2"):
        trained[held_out[:ROWS]] = False
    rows, gas = x[held_out], labels[held_out]
    alone = [rows[gas == each][:ROWS] for each in range(6) if int((gas == each).sum()) >= 32]
    return Columns.measure([x[trained]]), [rows[:ROWS], *alone]
