"""The suites of the layers: cells that run, tables that stand with any rows, misses that are left standing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from renorm.bench import device, layers, training
from renorm.bench.base import Cell, Row, catalogue
from renorm.layers.base import catalogue as every_layer
from tests.data import shared


def test_a_cell_of_layers_times_every_layer_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "TURNS", {"quick": 1})
    suite = catalogue()["layers"](data=tmp_path)
    values = suite.run_cell(Cell.of(part="eager", dtype="bfloat16", channels=8, side=5, seed=0))
    ways = {"torch", "a pass per domain", *every_layer()}
    assert values.keys() == {f"{way} {pass_}" for way in ways for pass_ in ("both", "forward")}
    assert all(0 < seconds < 60 for seconds in values.values())
    assert len({cell.key for cell in suite.cells()}) == len(list(suite.cells())) == 3 * (2 * 3 + 1)


def test_one_pass_a_domain_gives_what_one_pass_for_all_gives() -> None:
    ways, x = layers.ways_of(4), torch.randn(16, 4, 5, 5)
    for norm in ways[layers.ONE_BY_ONE].args[0]:
        norm.eval()
    layer = ways["per_domain"].args[0].eval()
    torch.testing.assert_close(ways[layers.ONE_BY_ONE](x), layer(x, torch.arange(16)))


@pytest.mark.slow
def test_compiled_layers_are_timed_beside_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "_compiled", lambda run: torch.compile(run, backend="eager"))
    monkeypatch.setattr(layers, "TURNS", {"quick": 1})
    suite = catalogue()["layers"](data=tmp_path)
    cell = Cell.of(part="compiled", dtype="float32", channels=8, side=5, seed=0)
    values = suite.run_cell(cell)
    assert {"torch compiled both", "shrink both", "per_domain compiled forward"} <= values.keys()
    table = suite.table([Row(cell, values)])
    assert "| shrink | " in table.partition("## Compiled")[2]


def test_the_table_of_layers_shows_ratios_and_leaves_a_miss(tmp_path: Path) -> None:
    suite = catalogue()["layers"](data=tmp_path)
    rows = [
        Row(
            cell,
            {
                f"{way} {p}": s
                for way, s in (("torch", 2.0), ("frozen", 1.0), ("shrink", 2.7))
                for p in ("both", "forward")
            },
        )
        for cell in suite.cells()
        if cell["part"] == "eager"
    ]
    table = suite.table(rows)
    spread = "1.35 (1.35–1.35)"
    assert f"| shrink | {spread} | {spread} | {spread} | {spread} | **miss** |" in table
    assert table.count("| pass |") == 1
    assert "2048 × 7² bfloat16" in table
    assert "## Targets" in suite.table([])


def test_a_cell_of_training_counts_steps_and_the_table_takes_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = catalogue()["training"](data=shared("mnist15k.npz").parent)
    cells = list(suite.cells())
    assert {cell["on"] for cell in cells} == {"digits", "mnist15k"}
    values = suite.run_cell(Cell.of(on="digits", batch=64, way="batch", rate=0.1, seed=0))
    assert values["reached"] == 1
    assert 5 <= values["steps"] <= 200
    monkeypatch.setattr(training, "STEPS", {"digits": 2, "mnist15k": 2})
    never = suite.run_cell(Cell.of(on="mnist15k", batch=64, way="none", rate=0.02, seed=0))
    assert (never["reached"], never["steps"]) == (0, 2)
    rows = [
        Row(
            Cell.of(on="digits", batch=2, way="batch", rate=rate, seed=seed),
            {"steps": steps, "seconds": 1.0, "reached": seed > 0},
        )
        for rate, steps in ((0.02, 300.0), (0.1, 40.0))
        for seed in range(3)
    ]
    assert "| batch | 40 (40–40) | 1.0 (1.0–1.0) | 1 | 0.1 |" in suite.table(rows)
    assert "## digits" in suite.table([])


def test_the_suite_of_a_device_times_each_part_beside_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"NETWORKS": ("resnet18",), "SIDE": {"quick": 32}, "STREAMED": (1, 16), "DENSE": 64, "ESTIMATED": 64}
    for name, value in (small | {"SHAPES": ((8, 5),), "TURNS": {"quick": 1}, "SEQUENCE": (4, 5, 8)}).items():
        monkeypatch.setattr(device, name, value)
    suite = catalogue()["device"](data=tmp_path)
    cells = [cell for cell in suite.cells() if cell["seed"] == 0 and dict(cell.factors).get("dtype") != "float16"]
    assert [cell["part"] for cell in cells] == [*["stream"] * 2, *["estimate"] * 2, *["layers"] * 2, "recurrent"]
    rows = [Row(cell, suite.run_cell(cell)) for cell in cells]
    assert all(0 < seconds < 60 for row in rows for seconds in row.values.values())
    table = suite.table(rows)
    for wanted in ("| plain, ms |", "| shrink+guard |", "| ours auto |", "| per_domain |", "| BNLSTM |"):
        assert wanted in table
    assert suite.table([]).count("## ") == 4
