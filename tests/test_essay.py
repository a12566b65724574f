"""examples/essay.py runs, shows what its six steps claim, and prints the numbers that both READMEs and its page have."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md", "docs/essay.md")
ROW = re.compile(r"^\| ([24-6]) \| .* \| ([\d.]+)(?: → ([\d.]+))? \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def essay() -> ModuleType:
    spec = importlib.util.spec_from_file_location("essay", ROOT / "examples" / "essay.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "essay", module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def told(essay: ModuleType) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        told = essay.tell()
    torch.set_num_threads(threads)
    return told


def test_the_layer_normalises_by_the_formula(told: Any) -> None:
    mean, variance, gap = told.layer
    assert mean < 1e-6
    assert 0 < variance < 1e-4  # eps makes it a little less than 1
    assert gap < 1e-5


def test_training_and_evaluation_part(told: Any) -> None:
    assert told.formula > 1


def test_what_may_move_decides_the_transfer(told: Any) -> None:
    assert told.transfer["all"] < told.transfer["from scratch"]
    assert told.transfer["head-only"] > told.transfer["recalibrate-then-freeze"] + 10


def test_recalibration_mends_every_shift(told: Any) -> None:
    assert all(after < before - 10 for before, after in told.code.values())


def test_few_images_need_the_source(told: Any) -> None:
    forgotten, kept = told.choosing[4]
    assert kept < forgotten


def test_missing_classes_hurt_and_both_guards_notice(told: Any) -> None:
    assert told.hurts["re-estimated"] > told.hurts["source"] + 3
    assert max(told.hurts["with a check"], told.hurts["with a profile"]) <= told.hurts["source"] + 1


@pytest.mark.parametrize("readme", READMES)
def test_the_pages_print_what_is_measured(readme: str, told: Any) -> None:
    """To within three points: other processors round otherwise, and a network trained on them errs elsewhere."""
    printed = [[float(n) for n in row[1:] if n] for row in ROW.findall((ROOT / readme).read_text(encoding="utf-8"))]
    measured: list[list[float]] = [
        *([error] for error in told.transfer.values()),
        *(list(pair) for pair in told.code.values()),
        *(list(pair) for pair in told.choosing.values()),
        *([error] for error in told.hurts.values()),
    ]
    assert len(printed) == len(measured)
    for row, found in zip(printed, measured, strict=True):
        assert row == pytest.approx(found, abs=3)


def test_what_it_prints_is_what_it_measured(
    essay: ModuleType, told: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(essay, "tell", lambda: told)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    essay.main()
    out = capsys.readouterr().out
    assert [line[:2] for line in out.splitlines() if line[0].isdigit()] == [f"{step}." for step in range(1, 7)]
    for before, after in (*told.code.values(), *told.choosing.values()):
        assert re.search(rf" {before:.1f} +{after:.1f}$", out, flags=re.MULTILINE)
    for error in (*told.transfer.values(), *told.hurts.values()):
        assert re.search(rf" {error:.1f}$", out, flags=re.MULTILINE)
