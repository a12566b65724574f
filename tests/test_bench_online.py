"""Suite `online`: its grids, real streams, and what its table makes of rows whose verdicts are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from renorm.bench import online_table
from renorm.bench.base import Cell, Row
from renorm.bench.online import WAYS, Online
from renorm.bench.series import SERIES
from tests.data import shared


@pytest.fixture
def data() -> Path:
    for file in Online.needs:
        folder = shared(file).parent
    return folder.parent if folder.name == "weights" else folder


def test_both_sizes_name_every_cell_once_and_begin_with_our_own_ways(data: Path) -> None:
    for size in ("quick", "full"):
        cells = list(Online(data=data, size=size, seeds=3).cells())
        assert len({cell.key for cell in cells}) == len(cells)
        assert {cell["way"] for cell in cells[:20]} <= {"batch", "source", *(way for way in WAYS if "shrink" in way)}
        assert all(cell["way"] in WAYS for cell in cells)
    assert {cell["bed"] for cell in cells} >= set(SERIES)


def test_gas_comes_in_time_and_is_answered(data: Path) -> None:
    came = SERIES["gas"].make(data, "in time", 0, 1000).came
    assert len(came.labels) == len(came.inputs) == 4244
    suite = Online(data=data, size="quick", seeds=3)
    cell = next(c for c in suite.cells() if c["bed"] == "gas" and c["way"] == "source")
    assert 15 < suite.run_cell(cell)["error"] < 30


def rows(errors: Mapping[tuple[str, str], float], *, shift: str = "contrast") -> list[Row]:
    """Rows of ResNet-20 on three seeds, each a tenth apart, from {(stream, way): error}."""
    return [
        Row(
            Cell.of(bed="resnet20", shift=shift, stream=stream, batch=64, long=False, seed=seed, way=way),
            {"error": error + seed / 10, "milliseconds": 1.0, "state_bytes": 0.0, "believed": 1.0},
        )
        for (stream, way), error in errors.items()
        for seed in range(3)
    ]


def test_the_table_judges_what_it_is_given() -> None:
    errors = {("iid", "source"): 60.0, ("iid", "batch"): 33.0, ("iid", "shrink+guard"): 32.0}
    errors |= {("bursts", "source"): 60.0, ("bursts", "shrink+guard"): 36.0}
    errors |= {("sorted", "source"): 60.0, ("sorted", "batch"): 70.0, ("sorted", "shrink+guard"): 62.5}
    text = online_table.table(rows(errors), WAYS)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "-16.5" in lines["shrink+guard: mean regret at most 0"]
    assert "pass" in lines["resnet20, iid, batches of 64: shrink+guard within 1 of the best of 1 other ways"]
    assert "**miss**" in lines["resnet20, sorted, batches of 64: shrink+guard within 0 of the best of 2 other ways"]
    worse = "shrink+guard: worse by more than 0.5 beyond the interval in at most 5 % of streams, never by more than 2"
    assert "1 of 3" in lines[worse]
    bursts = "resnet20, shrink+guard: bursts, batches of 64, within 3 of random order in batches of 64"
    assert "+4.0" in lines[bursts]
    assert "**miss**" in lines[bursts]


def test_published_orders_are_told_apart_from_chance() -> None:
    errors = {("iid", "source"): 60.0, ("iid", "batch"): 33.0, ("iid", "tent"): 35.0, ("sorted", "source"): 60.0}
    errors |= {("sorted", "batch"): 70.0, ("sorted", "lame"): 60.0}
    found = {(line[0], line[1], line[2]): line[-1] for line in online_table._published_orders(points(errors))}
    assert found["iid", "batch", "source"] == "the same"
    assert found["iid", "tent", "batch"] == "**another**"
    assert found["sorted", "lame", "source"] == "not the other way beyond chance"


def points(errors: Mapping[tuple[str, str], float]) -> list[online_table.Point]:
    return online_table._points(rows(errors))
