"""Suite `doctor`: its patients are what they are said to be, and its tables stand with any part of the rows missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from renorm.bench import doctor_table
from renorm.bench.base import Cell, Row
from renorm.bench.doctor import REAL, DoctorSuite
from renorm.bench.patients import DISEASES, HEALTHY, SICK
from renorm.bench.planted import PLANTS, run
from renorm.bench.threads import THREADS
from renorm.rules.base import catalogue
from tests.data import shared

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "doctor-quick.jsonl"

pytest.importorskip("timm")
pytest.importorskip("torchvision")


def suite() -> DoctorSuite:
    return DoctorSuite(shared("nets.py").parent)


def test_every_rule_that_is_planted_exists_and_there_are_enough_models() -> None:
    named = {disease.rule for disease in DISEASES.values()} | {plant.rule for plant in PLANTS.values()}
    named |= {rule for thread in THREADS.values() for rule in thread.rules}
    assert named <= set(catalogue())
    assert len(HEALTHY) >= 40
    assert len(SICK) >= 3
    assert set(SICK) <= set(HEALTHY)
    assert len(THREADS) >= 10


def test_the_grid_has_every_part() -> None:
    parts = {cell["part"] for cell in suite().cells()}
    assert parts == {"sick", "healthy", "planted", "real", "thread", "cost"}


def test_what_the_rules_page_says_of_planted_strengths_is_what_was_measured() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    planted = [(row["cell"], row["values"]["found"]) for row in rows if row["cell"]["part"] == "planted"]
    for name, plant in PLANTS.items():
        assert plant.sure in plant.certain
        for cell, found in planted:
            if cell["plant"] == name and cell["strength"] in plant.certain:
                assert found == 1.0, cell
            if cell["plant"] == name and cell["strength"] == plant.strengths[0]:
                assert found == 0.0, cell


@pytest.mark.slow
def test_a_sick_and_a_healthy_cell_say_so() -> None:
    values = suite().run_cell(Cell.of(part="sick", model="hf:ResNet", disease="variance NaN"))
    assert values["found"] == values["first"] == 1.0
    assert suite().run_cell(Cell.of(part="healthy", model="hf:ResNet"))["data error"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["means of a layer moved, sd", "padded steps, share"])
def test_what_is_planted_strongest_is_found(plant: str) -> None:
    values = run(shared("nets.py").parent, plant, PLANTS[plant].strengths[-1], 0)
    assert values["found"] == 1.0
    assert values["value"] > 0


def test_a_table_stands_with_rows_missing(tmp_path: Path) -> None:
    assert "## Targets" in doctor_table.table([])
    sick = Row(
        Cell.of(part="sick", model="a", disease="variance NaN"), {"found": 1, "first": 1, "others": 0, "audit": 0}
    )
    missed = Row(Cell.of(part="sick", model="b", disease="variance NaN"), {"found": 0, "first": 0, "others": 0})
    text = doctor_table.table([sick, missed])
    assert "| variance NaN | BN108 | 1 of 2 | 1 of 2 | 0 | 0 of 1 |" in text
    assert "**miss**" in text
    silent = {"found": 0.0, "value": math.nan, "limit": math.nan}
    planted = Row(Cell.of(part="planted", plant="images in all", strength=128.0, seed=0), silent)
    assert "| 128 | 0 of 1 | – | – |" in doctor_table.table([planted])
    values = {"named": 1.0, "rule": 108.0, "before": 90.0, "after": 1.5}
    thread = Row(Cell.of(part="thread", thread="NaN poisoning", seed=0), values)
    assert "| NaN poisoning | pytorch/pytorch#88474 | BN108 | error, % | by its fix | 90.00 | 1.50 |" in (
        doctor_table.table([thread])
    )
    values = {"error": 80.0, "home": 10.0, "recalibrated": 20.0, "distance": 0.8, "first": 0.0}
    values |= {"error said": 0.0, "warning said": 0.0}
    real = Row(Cell.of(part="real", bed=next(iter(REAL)), shift="fog", classes=10, seed=0), values)
    text = doctor_table.table([real])
    assert "| something said | 0 of 1 |" in text.replace("real shifts that cost ≥ 10 points: ", "")
    assert "| nothing | – | 0.80 | 10.0 | 80.0 | 20.0 |" in text
