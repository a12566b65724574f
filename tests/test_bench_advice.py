"""Suite `advice`: its grid, its tables with any part of the rows missing, and one cell of each kind."""

from __future__ import annotations

import math

import pytest
import torch

from renorm.bench import advice_table
from renorm.bench.advice import AdviceSuite, _error
from renorm.bench.base import Cell, Row
from tests.data import shared


def suite() -> AdviceSuite:
    return AdviceSuite(shared("nets.py").parent)


def plan(known: str, chosen: int, **errors: float) -> Row:
    cell = Cell.of(part="plan", bed="resnet20", shift="contrast", classes=10, known=known, seed=int(errors["leave"]))
    names = {"leave": advice_table.LEAVE, "recalibrate": "recalibrate"}
    values = {f"error, {names[name]}": value for name, value in errors.items()}
    values |= {f"seconds, {names[name]}": 1.0 + place for place, name in enumerate(errors)}
    return Row(cell, {"chosen": float(chosen), **values})


def test_the_grid_has_every_part_and_the_harm_that_one_class_does() -> None:
    cells = list(suite().cells())
    assert {cell["part"] for cell in cells} == {"settings", "plan", "time"}
    assert len({cell.key for cell in cells}) == len(cells)
    assert any(cell["part"] == "plan" and cell["classes"] == 1 for cell in cells)


def test_the_error_of_a_mean_is_that_of_groups_of_images() -> None:
    means = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    found = _error(means, torch.full((3,), 4.0), 25)
    assert found == pytest.approx(2 / 4 / 5, rel=0.1)
    assert math.isnan(_error(means, torch.ones(3), 1001))


def test_harm_and_the_best_that_nobody_could_know_are_counted() -> None:
    rows = [
        plan("labels", 1, leave=70.0, recalibrate=30.0),
        plan("labels", 1, leave=20.0, recalibrate=25.0),
        plan("labels", 0, leave=40.0, recalibrate=39.0),
    ]
    text = advice_table.table(rows)
    (line,) = (line for line in text.splitlines() if line.startswith("| labels | 3"))
    assert "-11.7 [" in line
    assert "+2.0 [" in line  # 0, 5 and 1 points behind the best
    assert "| 1 of 3 | +5.0 |" in line
    assert "| recalibrate | 2.0 | 2.0–2.0 | 3 |" in text
    assert advice_table.table([]) == advice_table.ABOUT


@pytest.mark.slow
def test_one_cell_of_settings_promises_what_is_measured() -> None:
    values = suite().run_cell(Cell.of(part="settings", bed="mobilenet_vww", shift="as_it_is", batch=8, seed=0))
    assert values["told"] == pytest.approx(values["true"], rel=0.4)
    assert values["near eps"] > 0.1
    text = advice_table.table(
        [Row(Cell.of(part="settings", bed="mobilenet_vww", shift="as_it_is", batch=8, seed=0), values)]
    )
    assert "| mobilenet_vww | as_it_is | 8 |" in text


@pytest.mark.slow
def test_one_plan_names_every_candidate_and_undoes_each() -> None:
    cell = Cell.of(part="plan", bed="mobilenet_vww", shift="contrast", classes=2, known="nothing", seed=0)
    values = suite().run_cell(cell)
    assert {"error, leave it as it is", "error, recalibrate", "error, recalibrate, source forgotten"} <= set(values)
    assert "| mobilenet_vww | contrast | nothing |" in advice_table.table([Row(cell, values)])
