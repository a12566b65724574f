"""Room bench: rows survive interruption, shifts are the same bytes for the same seed, intervals cover, tables judge."""

from __future__ import annotations

import copy
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from renorm.bench import (
    compression,
    compression_table,
    corruptions,
    fold_table,
    peers,
    recalibrate_table,
    runner,
    speed_table,
    unrolled,
)
from renorm.bench.base import SIZES, Cell, Row, Suite, catalogue, vary
from renorm.bench.beds import BEDS
from renorm.bench.intervals import paired, ratio
from renorm.bench.resample import some_classes
from renorm.bench.runner import CellDone, Finished, Started, open_suite, run_suite
from renorm.bench.store import Store
from renorm.errors import DataError, MissingExtra, UnknownName, UsageError
from renorm.layers import BNLSTM
from tests import zoo
from tests.data import shared


class Squares(Suite):
    """Squares numbers; as a test's suite it counts how often each cell was run, and can fail at one of them."""

    name: ClassVar = "squares"
    revision: ClassVar = 1
    ran: ClassVar[list[int]] = []
    fails_at: ClassVar[int | None] = None
    breaks_at: ClassVar[tuple[int, ...]] = ()
    breaks_by: ClassVar[Exception | None] = None

    def cells(self) -> Iterator[Cell]:
        for number in range(5):
            yield Cell.of(number=number)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        if cell["number"] == self.fails_at:
            raise KeyboardInterrupt
        if cell["number"] in self.breaks_at:
            raise self.breaks_by or ZeroDivisionError(f"at {cell['number']}")
        self.ran.append(cell["number"])
        return {"square": cell["number"] ** 2}

    def table(self, rows: Sequence[Row]) -> str:
        return " ".join(str(int(row.values["square"])) for row in rows)


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Squares:
    monkeypatch.setattr(Squares, "ran", [])
    return Squares(data=tmp_path)


# ── the runner and its rows ──


def test_an_interrupted_run_goes_on_where_it_stopped(
    squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Squares, "fails_at", 3)
    with pytest.raises(KeyboardInterrupt):
        list(run_suite(squares, out=tmp_path, processes=1))
    monkeypatch.setattr(Squares, "fails_at", None)
    events = list(run_suite(squares, out=tmp_path, processes=1))
    assert squares.ran == [0, 1, 2, 3, 4], "a finished cell was run again, or one was left out"
    assert events[0] == Started("squares", total=5, done=3)
    assert [event.done for event in events if isinstance(event, CellDone)] == [4, 5]
    assert isinstance(events[-1], Finished)
    assert events[-1].report.read_text().endswith("0 1 4 9 16\n")


def test_a_row_torn_by_a_kill_is_run_again_and_spoils_no_other(squares: Squares, tmp_path: Path) -> None:
    list(run_suite(squares, out=tmp_path, processes=1))
    file = tmp_path / "squares-quick.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    squares.ran.clear()
    text = next(event.text for event in run_suite(squares, out=tmp_path, processes=1) if isinstance(event, Finished))
    assert squares.ran == [4]
    assert text.endswith("0 1 4 9 16\n")
    assert len(Store(file, 1).rows(squares.cells())) == 5, "the new row was glued to the torn one"


def test_a_new_revision_runs_every_cell_again(
    squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(run_suite(squares, out=tmp_path, processes=1))
    monkeypatch.setattr(Squares, "revision", 2)
    list(run_suite(squares, out=tmp_path, processes=1))
    assert squares.ran == [0, 1, 2, 3, 4] * 2


def test_a_report_admits_rows_of_different_code(squares: Squares, tmp_path: Path) -> None:
    Store(tmp_path / "squares-quick.jsonl", 1).add(Row(Cell.of(number=0), {"square": 0}, code="0ld"))
    finished = list(run_suite(squares, out=tmp_path, processes=1))[-1]
    assert isinstance(finished, Finished)
    assert re.search(r"rows of 2 states of the code: ([0-9a-f]{8}, )?0ld(, |\.)", finished.text), "in either order"


def test_a_file_that_is_no_store_is_refused_by_line(squares: Squares, tmp_path: Path) -> None:
    (tmp_path / "squares-quick.jsonl").write_text('{"revision": 1, "cell": 3}\n')
    with pytest.raises(DataError, match=r"line 1 of .*squares-quick\.jsonl is no row of a benchmark"):
        list(run_suite(squares, out=tmp_path, processes=1))


def test_rows_keep_the_types_of_their_factors(tmp_path: Path) -> None:
    cell = Cell.of(images="all", classes=3, seed=0)
    Store(tmp_path / "rows.jsonl", 1).add(Row(cell, {"error": 1.5}, 0.25, "c0de", "cpu"))
    assert Store(tmp_path / "rows.jsonl", 1).rows([cell]) == [Row(cell, {"error": 1.5}, 0.25, "c0de", "cpu")]
    assert json.loads((tmp_path / "rows.jsonl").read_text())["cell"] == {"images": "all", "classes": 3, "seed": 0}


def test_the_report_says_how_it_was_made_and_nothing_about_this_machine(squares: Squares, tmp_path: Path) -> None:
    finished = list(run_suite(squares, out=tmp_path / "results", processes=1))[-1]
    assert isinstance(finished, Finished)
    assert "renorm bench squares --size quick --seeds 3" in finished.text
    assert "torch 2" in finished.text
    assert "torch threads" in finished.text
    assert re.search(r"minutes of computing, code [0-9a-f]{8}\.", finished.text)
    assert str(tmp_path) not in finished.text


def test_a_quick_run_leaves_the_table_of_a_full_one(squares: Squares, tmp_path: Path) -> None:
    names = [
        list(run_suite(Squares(data=tmp_path, size=size), out=tmp_path, processes=1))[-1].report.name
        for size in ("quick", "full", "quick", "full")
    ]
    assert names == ["squares.md", "squares.md", "squares-quick.md", "squares.md"]
    assert "--size full" in (tmp_path / "squares.md").read_text()
    assert "--size quick" in (tmp_path / "squares-quick.md").read_text()


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    finished = list(run_suite(Squares(data=tmp_path), out=tmp_path, processes=2))[-1]
    assert isinstance(finished, Finished)
    assert finished.text.endswith("0 1 4 9 16\n")
    assert not list(tmp_path.glob(".*")), "a part of a file was left behind"


def test_a_suite_that_measures_time_runs_alone(squares: Squares, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Squares, "timed", True)
    with pytest.raises(UsageError, match=r"'squares' measures time, which 2 processes would spoil"):
        next(run_suite(squares, processes=2))
    with pytest.raises(UsageError, match=r"processes=0 was asked for"):
        next(run_suite(squares, processes=0))


def test_a_cell_that_fails_costs_no_other(squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Squares, "breaks_at", (1, 3))
    with pytest.raises(ZeroDivisionError, match="at 1") as caught:
        list(run_suite(squares, out=tmp_path, processes=1))
    assert "renorm: in the cell 1 of suite squares." in caught.value.__notes__
    assert "renorm: 2 of 5 cells failed; the rows of the others are kept." in caught.value.__notes__
    text = (tmp_path / "squares.md").read_text()
    assert "Rows so far: 3 of 5 cells; the same command goes on from here." in text
    assert text.endswith("0 4 16\n")


def test_a_cell_whose_peer_is_not_installed_is_left_out(
    squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Squares, "breaks_at", (4,))
    monkeypatch.setattr(Squares, "breaks_by", MissingExtra("fastai", "fastai", "comparing"))
    finished = list(run_suite(squares, out=tmp_path, processes=1))[-1]
    assert isinstance(finished, Finished)
    assert "Rows so far: 4 of 5 cells" in finished.text
    assert "cells that need fastai, which is not installed, were left out" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_no_cell_is_begun_when_time_is_over(squares: Squares, tmp_path: Path, processes: int) -> None:
    Store(tmp_path / "squares-quick.jsonl", 1).add(Row(Cell.of(number=2), {"square": 4}, where="NVIDIA H100"))
    events = list(run_suite(squares, out=tmp_path, processes=processes, minutes=0))
    assert events[0] == Started("squares", total=5, done=1)
    assert squares.ran == []
    assert isinstance(events[-1], Finished)
    assert "Rows so far: 1 of 5 cells" in events[-1].text
    assert "Rows of: NVIDIA H100." in events[-1].text
    with pytest.raises(UsageError, match=r"0 or more; got minutes=-1"):
        next(run_suite(squares, minutes=-1))


def test_workers_look_at_the_clock_before_a_cell(squares: Squares) -> None:
    cell = next(squares.cells())
    assert runner._run(squares, cell, time() - 1) is None
    assert isinstance(runner._run(squares, cell, time() + 60), Row)


def test_a_row_says_where_it_was_computed(squares: Squares, tmp_path: Path) -> None:
    file = tmp_path / "squares-quick.jsonl"
    file.write_text('{"revision": 1, "cell": {"number": 0}, "values": {"square": 0}, "seconds": 0, "code": "c0de"}\n')
    Store(file, 1).add(Row(Cell.of(number=1), {"square": 1}, where="NVIDIA H100"))
    finished = list(run_suite(squares, out=tmp_path, processes=1))[-1]
    assert isinstance(finished, Finished)
    here = f"cpu {platform.machine()}"
    counts = {here: 3, "cpu x86_64": 1} if here != "cpu x86_64" else {here: 4}
    said = ", ".join(f"{where} ({count})" for where, count in sorted({"NVIDIA H100": 1, **counts}.items()))
    assert f"Rows of: {said}." in finished.text


def test_a_device_that_a_suite_or_torch_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'squares' computes on the processor, and device='cuda' was asked for"):
        Squares(data=tmp_path, device="cuda")
    monkeypatch.setattr(Squares, "moves", True)
    with pytest.raises(UsageError, match=r"device='nowhere' was asked for, and torch has none here: "):
        Squares(data=tmp_path, device="nowhere")
    assert Squares(data=tmp_path, device="meta").device == "meta"


# ── suites ──


def test_an_unknown_suite_or_size_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no suite 'recalibrat'; did you mean 'recalibrate'"):
        open_suite("recalibrat", data=tmp_path)
    with pytest.raises(UnknownName, match=r"no size 'small'"):
        Squares(data=tmp_path, size="small")  # type: ignore[arg-type]


def test_fewer_than_three_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs 3 seeds or more, and got seeds=2"):
        Squares(data=tmp_path, seeds=2)


def test_a_wrong_data_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reads nets\.py.* in --data, and .* holds no such file"):
        open_suite("recalibrate", data=tmp_path)
    with pytest.raises(DataError, match=r"absent is no folder"):
        open_suite("recalibrate", data=tmp_path / "absent")


def test_every_suite_of_the_folder_is_in_the_catalogue_with_unique_cells() -> None:
    suites = catalogue()
    assert {"recalibrate", "speed"} <= suites.keys()
    for suite in suites.values():
        cells = list(suite(data=shared("README.md").parent).cells())
        assert len({cell.key for cell in cells}) == len(cells) > 0


def test_a_grid_varies_one_factor_at_a_time() -> None:
    assert vary({"a": 1, "b": "x"}, a=(1, 2), b=("y",)) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "y"}]


# ── shifts ──


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", list(corruptions.SMALL))
def test_a_corruption_of_small_images_changes_them_the_same_way_every_time(
    kind: str, images: NDArray[np.uint8]
) -> None:
    once, again = corruptions.small(images, kind, seed=1), corruptions.small(images, kind, seed=1)
    assert once.dtype == np.uint8
    np.testing.assert_array_equal(once, again)
    assert np.array_equal(once, images) == (kind == corruptions.CLEAN)


@pytest.mark.parametrize("kind", corruptions.PHOTOGRAPHS)
def test_a_corruption_of_photographs_is_seeded_and_leaves_numpy_as_it_was(kind: str, images: NDArray[np.uint8]) -> None:
    pytest.importorskip("cv2")
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    once = corruptions.photographs(images, kind, seed=1)
    assert np.random.get_state()[1].tolist() == before
    np.testing.assert_array_equal(corruptions.photographs(images, kind, seed=1)[1:2], once[1:2])
    assert np.array_equal(once, images) == (kind == corruptions.CLEAN)


def test_brightness_and_saturation_are_those_of_hsv(images: NDArray[np.uint8]) -> None:
    color = pytest.importorskip("skimage.color")
    images[0, 0, :2] = [[0, 0, 0], [128, 128, 128]]
    for kind, channel, scale, offset in (("brightness", 2, 1.0, 0.3), ("saturate", 1, 2.5, 0.2)):
        hsv = color.rgb2hsv(images / 255)
        hsv[..., channel] = np.clip(scale * hsv[..., channel] + offset, 0, 1)
        wanted = color.hsv2rgb(hsv) * 255
        assert np.abs(corruptions.small(images, kind) - wanted).max() <= 1.001, kind  # the fraction is cut off


def test_corruptions_refuse_unknown_kinds_and_other_images(images: NDArray[np.uint8]) -> None:
    with pytest.raises(UnknownName, match=r"no corruption 'fogg'; did you mean 'fog'"):
        corruptions.small(images, "fogg")
    with pytest.raises(UsageError, match=r"want uint8 images \(N, H, W, 3\), and got float64 \(3, 32, 32, 3\)"):
        corruptions.small(images / 255, "fog")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"severity of a corruption is 1 to 5, and 6"):
        corruptions.photographs(images, "contrast", severity=6)


def test_label_shift_keeps_the_same_classes_in_every_part() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    first, second = labels[:600], labels[600:]
    for count in (1, 3, 5):
        kept = some_classes(first, count, seed=2)
        assert len(set(first[kept])) == count
        assert set(first[kept]) == set(second[some_classes(second, count, seed=2)])
    assert not np.array_equal(some_classes(first, 3, seed=0), some_classes(first, 3, seed=1))
    with pytest.raises(UsageError, match=r"11 classes of 10 were asked for"):
        some_classes(labels, 11, seed=0)


# ── beds, on real data ──


@pytest.mark.parametrize("name", list(BEDS))
def test_images_that_adapt_are_never_measured_nor_known_to_the_source(name: str) -> None:
    bed = BEDS[name](shared("nets.py").parent, 300, 150)
    for seed in (0, 1):
        parts = [bed.source(seed=seed), *(part(corruptions.CLEAN, seed=seed) for part in (bed.pool, bed.held_out))]
        images = [{x.numpy().tobytes() for x in part.inputs} for part in parts]
        assert [len(part.labels) for part in parts[1:]] == [300, 150]
        assert not (images[0] & images[1])
        assert not (images[0] & images[2])
        assert not (images[1] & images[2])
    assert not torch.equal(bed.pool(corruptions.CLEAN, seed=0).inputs, bed.pool(corruptions.CLEAN, seed=1).inputs)


def test_a_cell_of_real_data_finds_re_estimation_to_help_at_low_contrast() -> None:
    suite = catalogue()["recalibrate"](data=shared("nets.py").parent)
    images = {"source": "all", "prior_0": 64}
    cells = [
        Cell.of(bed="resnet20", shift="contrast", images=count, classes=10, seed=0, way=way)
        for way, count in images.items()
    ]
    source, ours = (suite.run_cell(cell) for cell in cells)
    assert set(cells) <= set(suite.cells())
    assert ours["images"] == 64
    assert ours["error"] < source["error"] - 20


# ── intervals and tables ──


def test_a_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [paired(rng.normal(1.0, 2.0, 6)) for _ in range(2000)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in found])
    assert 0.935 <= covered <= 0.965
    assert paired([2.0]).high == np.inf
    assert paired([1.0, 1.0, 1.0]).text() == "+1.0 [+1.0, +1.0]"
    with pytest.raises(UsageError, match="at least one pair"):
        paired([])


def test_a_ratio_of_means_is_no_mean_of_ratios() -> None:
    found = ratio([1.0, 9.0], [2.0, 10.0])
    assert found.mean == pytest.approx(10 / 12)
    assert found.low <= found.mean <= found.high
    with pytest.raises(UsageError, match="2 numerators and 1 denominators"):
        ratio([1.0, 2.0], [1.0])


def _row(way: str, error: float, *, shift: str = "fog", classes: int = 10, images: str | int = "all", seed: int) -> Row:
    cell = Cell.of(bed="resnet20", shift=shift, images=images, classes=classes, seed=seed, way=way)
    return Row(cell, {"error": error})


def test_the_table_of_recalibrate_computes_its_verdicts() -> None:
    rows = []
    for seed in range(3):
        errors = {"source": 60, "update_bn": 32, "fvcore": 33, "auto": 30 + seed / 10, "check": 31, "check_32": 58}
        rows += [_row(way, error, seed=seed) for way, error in errors.items()]
        harm = {"source": 20.0, "update_bn": 50.0, "check": 21.0, "profile": 20.0 - seed / 10}
        rows += [_row(way, error, shift="as_it_is", classes=3, seed=seed) for way, error in harm.items()]
    lines = recalibrate_table.table(rows).splitlines()

    def verdict(start: str) -> str:
        return next(line for line in lines if line.startswith(f"| {start}"))

    assert verdict("all images: auto 1 point ahead").endswith("| -1.9 [-2.1, -1.7] against torch `update_bn` | pass |")
    assert "1 of 1 cases above; worst +1.0 [+1.0, +1.0]" in verdict("harm cases")
    assert verdict("harm cases").endswith("**miss** |")
    assert verdict("auto, `check=` unlabelled: at least 70 %").endswith("pass |")
    assert verdict("auto, `check=` 32 labels: at least 80 %").endswith("**miss** |")
    assert verdict("`source=profile`: never worse").endswith("pass |")
    assert verdict("some classes only").endswith("| -30.1 [-30.3, -29.9] against torch `update_bn` | pass |")


def test_the_table_of_recalibrate_stands_with_rows_missing() -> None:
    assert "## resnet20" in recalibrate_table.table([_row("source", 60.0, seed=0)])
    assert "gain kept" not in recalibrate_table.table([])


def test_the_table_of_speed_takes_medians_against_the_faster_peer() -> None:
    rows = [
        Row(
            Cell.of(part="equal images", on="resnet18", seed=seed),
            {"update_bn": 4.0, "fvcore": 2.0, "ours_off": 1.9, "ours_on": on, "ours_auto": 2.0},
        )
        for seed, on in enumerate((2.0, 2.4, 3.0))
    ]
    values = {"update_bn seconds": 10.0, "update_bn images": 4000, "update_bn error": 30.0}
    values |= {"0.05 seconds": 1.0, "0.05 images": 200, "0.05 error": 30.5}
    rows += [Row(Cell.of(part="equal error", on="fog", seed=seed), values) for seed in range(3)]
    for part, way in (("recurrent", "ours"), ("recurrent, compiled", "compiled")):
        rows += [
            Row(
                Cell.of(part=part, on="64 steps of 1", seed=seed),
                {"loop": 0.06, way: 0.04, "lstm": 0.01, "warm_up": 70.0},
            )
            for seed in range(3)
        ]
    lines = speed_table.table(rows).splitlines()
    assert next(x for x in lines if "at least 1.4 times" in x).split("|")[2].strip().startswith("1.50 (1.50–1.50)")
    assert next(x for x in lines if "at least 3.0 times" in x).endswith("| 1.50 (1.50–1.50), after 70 s | **miss** |")
    assert "| 64 steps of 1 | 60 | 1.50 (1.50–1.50) | 6.00 (6.00–6.00) |" in lines
    assert next(x for x in lines if "certainty off" in x).endswith(
        "| 0.95 (0.95–0.95) against fvcore, 3 turns | pass |"
    )
    assert next(x for x in lines if "certainty on" in x).endswith(
        "| 1.20 (1.00–1.50) against fvcore, 3 turns | **miss** |"
    )
    assert next(x for x in lines if "tolerance 0.05" in x).endswith(
        "| 10.00 (10.00–10.00) times; +0.50 [+0.50, +0.50] points | **miss** |"
    )
    assert "## Targets" in speed_table.table([])


def test_a_loop_of_modules_with_the_same_weights_is_what_ours_is_compared_with() -> None:
    shape = unrolled.Shape(6, 3, 2, 4)
    loop, ours = unrolled.Unrolled(shape), BNLSTM(2, 4, steps=3, batch_first=True)
    with torch.no_grad():
        ours.weight_ih_l0.copy_(loop.from_input.weight)
        ours.weight_hh_l0.copy_(loop.from_hidden.weight)
        for bias in (ours.bias_ih_l0, ours.bias_hh_l0):
            bias.zero_()
    x = torch.randn(6, 3, 2)
    torch.testing.assert_close(loop(x), ours(x)[0], rtol=1e-4, atol=1e-5)
    found = unrolled.eager(shape, 1)
    assert found.keys() == {"loop", "ours", "lstm"}
    assert min(found.values()) > 0


# ── suite fold ──


def _answer(name: str, **values: float) -> Row:
    usual = {"norms": 10, "folded": 10, "error": 1e-6, "site error": 1e-6, "own rounding": math.nan, "seconds": 1}
    mmcv = {"mmcv folded": 10, "mmcv error": 3.0, "mmcv failed": 0}
    fx = {"fx folded": 0, "fx error": math.nan, "fx failed": 1}
    return Row(Cell.of(part="answers", on=name), {**usual, **mmcv, **fx, **values})


def test_the_table_of_fold_computes_its_verdicts() -> None:
    rows = [_answer("resnet50"), _answer("densenet121", folded=7, **{"why other": 3})]
    rows.append(_answer("wild", error=1e-2, **{"own rounding": 1e-2}))
    rows.append(_answer("off", error=1e-2))
    for turn, seconds in enumerate((1.0, 2.0, 1.0)):
        values = {"eager": seconds, "folded": seconds / 2, "compiled": seconds / 4}
        rows.append(Row(Cell.of(part="time", on="resnet50", seed=turn), values))
    lines = fold_table.table(rows).splitlines()
    assert "| ≥ 90 % of the batch norms of the named families | 85.0 % of 20 in 2 networks | **miss** |" in lines
    assert "| right on ≥ 100 families | 3 of 4 | **miss** |" in lines
    assert "| ResNet-50, channels last: ≥ 1.2 times eager | 2.00 (2.00–2.00) | pass |" in lines
    assert "| renorm | 92.5 % | 1 | 0 | 4 |" in lines
    assert "| mmcv's rule | 100.0 % | 4 | 0 | 4 |" in lines
    assert "| torch.fx | 0.0 % | 0 | 4 | 4 |" in lines
    assert "| wild | 10 | 10 | 1e-02 (own 1e-02) | 1.0 | 10, **3e+00** | – |" in lines
    assert "| other | 3 |" in lines
    assert "| resnet50 | 0.50 (0.50–0.50) | – | 0.25 (0.25–0.25) | – |" in lines
    assert "## Targets" in fold_table.table([])


def test_reasons_are_counted_under_a_few_words() -> None:
    assert fold_table.kind("what it reads comes from relu_ in a.b") == "no layer writes what it reads"
    assert fold_table.kind("something new") == "other"


def test_the_table_of_compression_computes_shares_and_verdicts() -> None:
    def row(how: str, seed: int, compressed: float, repaired: float, **more: Any) -> Row:
        cell = {"bed": "resnet20", "how": how, "amount": 4, "images": 64, "form": "norms", "seed": seed, **more}
        values = {"source": 20.0, "compressed": compressed, "prior_0": 30.0, "repaired": repaired}
        if how == "averaged":
            values = {f"two starts: {way}": value for way, value in values.items()}
        return Row(Cell.of(**cell), values)

    rows = [row("bits", seed, 40.0, 25.0) for seed in range(3)] + [row("sparsity", 0, 20.5, 22.0, amount=0.7)]
    rows += [row("averaged", seed, 60.0, 50.0, bed="digits", form="both") for seed in range(3)]
    lines = compression_table.table(rows).splitlines()
    assert "| low bit: most of the loss returned | 75 % (resnet20, 4 bits) | pass |" in lines
    assert "| merged or averaged: most of the loss returned | 25 % (digits, two starts) | **miss** |" in lines
    assert (
        "| `repair_` never costs more than 0.5 points | 1 of 3 cases; worst +1.5 (resnet20, 70% pruned) | **miss** |"
        in lines
    )
    assert "| 4 bits | 20.0 | 40.0 | 30.0 | – | – | 25.0 | 75 % [75, 75] | 3 |" in lines
    assert "| 70% pruned | 20.0 | 20.5 | 30.0 | – | – | 22.0 | no loss | 1 |" in lines
    assert "| digits, two starts | 20.0 | 60.0 | 30.0 | – | – | 50.0 | 25 % [25, 25] | 3 |" in lines
    first = [row for row in rows if row.cell["seed"] == 0]
    assert any(line.endswith("| open: 1 of 3 seeds |") for line in compression_table.table(first).splitlines())
    assert "## Targets" in compression_table.table([])


@pytest.mark.slow
def test_two_digit_networks_from_different_starts_collapse_and_come_back() -> None:
    values = compression._merged_digits(0, 64)
    for case in ("two starts", "two starts, folded"):
        lost, back = (values[f"{case}: compressed"] - values[f"{case}: {way}"] for way in ("source", "repaired"))
        assert lost > 2
        assert back > 0.5 * lost


def test_weights_are_rounded_to_the_grid_by_torchao() -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    for how, grids in (("bits", 4), ("bits, one grid a layer", 1)):
        made = compression.COMPRESSIONS[how](copy.deepcopy(model), 3)
        for channel in made[0].weight.detach().reshape(grids, -1):
            steps = channel / (channel.unique().diff().min())
            torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
            assert len(channel.unique()) <= 8


def test_peers_fold_by_order_and_by_graph() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.norm(x)))

    model, x = zoo.lived(Crossed()), torch.randn(2, 3, 4, 4)
    before = model.state_dict()
    in_order, by_graph = peers.fuse_in_order(model), peers.fuse_by_graph(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(m) for m in (in_order.norm, in_order.b[1])] == [nn.Identity, nn.Identity]
    with torch.no_grad():
        torch.testing.assert_close(by_graph(x), model(x))
        torch.testing.assert_close(in_order.b(x), model.b(x))
        assert not torch.allclose(in_order(x), model(x)), "mmcv's rule takes the norm before a conv for one behind it"


def test_a_cell_of_fold_measures_ours_and_theirs() -> None:
    pytest.importorskip("timm")
    from renorm.bench.fold import _answers

    values = _answers("mobilenetv3_large_100")
    assert values["norms"] == values["folded"] == 46
    assert values["error"] < 1e-4
    assert values["mmcv error"] > 1e-2


def _transferred(**errors: float) -> list[Row]:
    """Rows of one task and share, three seeds that differ by nothing else."""
    names = {"plain": "plain", "auto": "auto", "frozen": "frozen-statistics"}
    return [
        Row(Cell.of(task="tinyimagenet20", share=0.15, seed=seed, way=names[way]), {"error": value + seed})
        for seed in range(3)
        for way, value in errors.items()
    ]


def test_the_table_of_transfer_computes_its_verdicts() -> None:
    table = catalogue()["transfer"].table
    better = table(None, _transferred(plain=66.0, auto=63.0, frozen=64.0))  # type: ignore[arg-type]
    assert "| +3.0 [+3.0, +3.0] | yes |" in better
    assert "| 1 of 1 | yes |" in better
    assert "| tinyimagenet20 | 15% | 67.0 | 64.0 | 65.0 |" in better
    worse = table(None, _transferred(plain=64.0, auto=63.0, frozen=60.0))  # type: ignore[arg-type]
    assert "| +1.0 [+1.0, +1.0] | no |" in worse
    assert "| 0 of 1 | no |" in worse
    table(None, _transferred(plain=64.0))  # type: ignore[arg-type]
    table(None, [])  # type: ignore[arg-type]


def test_adapters_are_judged_on_near_domains_and_on_usps_as_it_is_too() -> None:
    errors = {"usps": (16.0, 27.0), "usps in one frame": (9.0, 10.0), "gas batch 3": (1.0, 1.5)}
    rows = [
        Row(Cell.of(task=task, share=0.15, seed=seed, way=way), {"error": error + seed})
        for task, pair in errors.items()
        for way, error in zip(("all", "affine-and-head"), pair, strict=True)
        for seed in range(3)
    ]
    table = catalogue()["transfer"].table(None, rows)  # type: ignore[arg-type]
    near, whole = (line for line in table.splitlines() if line.startswith("| an adapter within 2 points"))
    assert near.endswith(": usps in one frame +1.0, gas batch 3 +0.5 | yes |")
    assert near.startswith("| an adapter within 2 points of `all` on near domains at 15 % | +0.8 ")
    assert "USPS as its files are | +5.8 " in whole
    assert whole.endswith("| no |")


def test_quick_cells_of_transfer_are_cells_of_full_and_leave_no_task_out() -> None:
    from renorm.bench.transfer_tasks import TASKS

    data = shared("nets.py").parent
    quick, full = (list(catalogue()["transfer"](data=data, size=size).cells()) for size in SIZES)
    # rows of the one are rows of the other, and what is timed comes last in both
    assert full[: len(quick) - 3] == quick[:-3]
    assert quick[-3:] == full[-3:] == [cell for cell in full if cell["way"] == "cost"]
    assert len({cell.key for cell in full}) == len(full)
    compared = {(cell["task"], cell["way"]) for cell in quick if dict(cell.factors).get("share") == 0.15}
    assert compared >= {(task, way) for task in TASKS for way in ("plain", "plain, BN in eval", "Lightning", "auto")}
    # about 13 seconds each of a large network on one core: of more than these quick would be none
    assert sum(not TASKS[cell["task"]].near for cell in quick) < 70


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "plain, BN in eval", "Lightning", "fastai", "auto", "affine-and-head"])
def test_a_cell_of_transfer_learns_a_new_task(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm.bench import transfer

    if way in ("Lightning", "fastai"):
        pytest.importorskip(way.lower())
    monkeypatch.setattr(transfer, "STEPS", 10)
    suite = catalogue()["transfer"](data=shared("nets.py").parent)
    values = suite.run_cell(Cell.of(task="gas batch 5", share=0.15, seed=0, way=way))
    assert 0 <= values["error"] < (75 if way == "fastai" else 60), (
        "of five classes; ten steps are few for fastai's rate"
    )
    assert values["labels"] == 16
    assert ("norm_numbers" in values) == (way == "affine-and-head")


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["plain", "Lightning", "auto", "+ stochnorm", "+ delta", "average, ema"])
def test_a_cell_of_transfer_is_computed_on_a_gpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm.bench import transfer

    monkeypatch.setattr(transfer, "STEPS", 10)
    suite = catalogue()["transfer"](data=shared("nets.py").parent, size="full", device="cuda")
    row = runner._run(suite, Cell.of(task="gas batch 5", share=0.15, seed=0, way=way))
    assert isinstance(row, Row)
    assert 0 <= row.values["error"] < 60
    assert row.where == torch.cuda.get_device_name()


def test_domains_without_labels_are_told_in_both_frames() -> None:
    suite = catalogue()["transfer"](data=shared("nets.py").parent, size="full")
    cells = [cell for cell in suite.cells() if cell["way"] in ("as it came", "per_domain") and "usps" in cell["task"]]
    assert len(cells) == 2 * 2 * 3
    table = suite.table([Row(cell, {"error": 20.0 + cell["seed"]}) for cell in cells if cell["task"].count("frame")])
    assert "| error on USPS in % | mnist to usps in one frame, unlabelled |" in table
    assert "| per_domain | 21.0 (20.0–22.0) |" in table


def test_averaged_weights_are_measured_under_both_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm.bench import transfer

    monkeypatch.setattr(transfer, "STEPS", 10)
    suite = catalogue()["transfer"](data=shared("nets.py").parent, size="full")
    cell = Cell.of(task="gas batch 6", share=0.15, seed=0, way="average, swa")
    assert cell in list(suite.cells())
    values = suite.run_cell(cell)
    assert 0 <= values["error"] < 60
    assert values["error_copied"] != values["error"]
    table = suite.table([Row(cell, {"error": 4.0, "error_copied": 7.5})])
    assert "| gas batch 6 | swa | 4.0 | 7.5 | -3.5" in table


def test_the_cost_of_the_loop_is_measured_beside_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from renorm.bench import transfer

    monkeypatch.setattr(transfer, "COST_STEPS", 3)
    monkeypatch.setattr(transfer, "COST_TURNS", 1)
    suite = catalogue()["transfer"](data=shared("nets.py").parent)
    values = suite.run_cell(Cell.of(task="gas batch 5", seed=0, way="cost"))
    assert 0 < values["plain"] < 1
    assert 0 < values["ours"] < 1


def test_sixteen_domains_are_served_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from renorm.bench import serve

    monkeypatch.setitem(serve.NETWORKS["quick"], "resnet18", 32)
    monkeypatch.setitem(serve.TURNS, "quick", 1)
    monkeypatch.setattr(serve, "DOMAINS", 2)
    suite = catalogue()["serve"](data=Path())
    rows = [
        Row(cell, suite.run_cell(cell))
        for cell in suite.cells()
        if (cell["on"], cell["layout"], cell["seed"]) == ("resnet18", "channels last", 0)
    ]
    assert all(row.values["apart"] < 1e-5 for row in rows)
    assert "| resnet18 | channels last |" in suite.table(rows)


def test_a_lean_step_keeps_less_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from renorm.bench import memory

    monkeypatch.setitem(memory.NETWORKS["quick"], "resnet18", 64)
    monkeypatch.setattr(memory, "TURNS", 1)
    suite = catalogue()["memory"](data=Path())
    rows = [Row(cell, suite.run_cell(cell)) for cell in list(suite.cells())[:2]]
    for row in rows:
        assert row.cell["on"] == "resnet18"
        assert row.values["lean_bytes"] < 0.8 * row.values["normal_bytes"]
        assert row.values["lean_gradients"] == row.values["lean_statistics"] == 0
    assert rows[0].values["switch_statistics"] > 0.01, "timm's switch moves statistics twice"
    assert rows[1].values["switch_statistics"] == 0, "frozen ones do not move"
    assert "| resnet18 | frozen-statistics |" in suite.table(rows)


def test_bytes_are_counted_for_as_long_as_they_live() -> None:
    from renorm.bench.memory import Alive

    x = torch.zeros(1000)
    with Alive() as alive:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100) * 2  # a view is no more, its double is
        assert (alive.now, alive.peak) == (8000, 8000)
        del y, z
        assert alive.now == 0
        y = x.clone()
    assert alive.peak == 8000
    del y
    assert alive.now == 0
