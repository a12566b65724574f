"""`renorm adapt`: what it writes for folders, files and standard input, what it says, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import renorm as library
from renorm.cli.base import catalogue
from renorm.cli.incoming import stopping
from renorm.cli.parse import parse
from renorm.errors import BatchError, MissingExtra
from renorm.online.base import catalogue as methods
from renorm.report import pictures, stream
from renorm.report.base import Lines, Table, Words, thinned
from renorm.stream import Step
from tests.test_cli import NETS, Ran, refused, renorm

__all__ = ["renorm"]  # a fixture

image = pytest.importorskip("PIL.Image")

MORE = """
def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.LayerNorm(6), nn.Linear(6, 2))

def dense():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file, arrays with and without labels, and the same images as files in two classes."""
    (tmp_path / "nets.py").write_text(NETS + MORE)
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(24) % 2
    np.savez(tmp_path / "near.npz", images=images, labels=labels)
    np.savez(tmp_path / "plain.npz", images=images)
    np.savez(tmp_path / "strange.npz", images=images, labels=labels + 5)
    for place, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "photos" / "ab"[label]).mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(tmp_path / "photos" / "ab"[label] / f"{place:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ── what is written ──


def test_every_sample_has_its_row_in_the_order_of_the_file(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("adapt nets.py:net near.npz -o out.csv --batch-size 5 --no-guard --format json")
    assert (ran.code, ran.err) == (0, "")
    found = rows("out.csv")
    assert list(found[0]) == ["index", "path", "class", "class_name", "confidence", "believed", "step"]
    assert [int(row["index"]) for row in found] == list(range(24))
    assert [int(row["step"]) for row in found] == [k // 5 + 1 for k in range(24)]
    assert {row["believed"] for row in found} == {"true"}

    held = np.load("near.npz")
    model = _net()
    streamed = library.adapt_(model, guard=False)
    pixels = torch.from_numpy(held["images"]).movedim(3, 1) / 255
    answers = torch.cat([streamed(part) for part in pixels.split(5)])
    sure, chosen = answers.softmax(1).max(1)
    assert [int(row["class"]) for row in found] == chosen.tolist()
    assert [float(row["confidence"]) for row in found] == pytest.approx(sure.tolist(), abs=1e-6)

    result = ran.json["result"]
    wrong = (chosen != torch.from_numpy(held["labels"])).double()
    home = (_net()(pixels).argmax(1) != torch.from_numpy(held["labels"])).double()
    assert result["errors"]["stream"] == pytest.approx(wrong.mean().item())
    assert result["errors"]["source"] == pytest.approx(home.mean().item())
    assert result["errors"]["difference"]["mean"] == pytest.approx((wrong - home).mean().item())
    assert (result["samples"], result["steps"], len(result["log"])) == (24, 5, 5)
    assert result["log"][0]["weight"] == streamed.log[0].weight


def _net() -> nn.Module:
    return library.models.load_model("nets.py:net")


def test_the_same_rows_in_every_format(folder: Path, renorm: Callable[[str], Ran]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        assert renorm(f"adapt nets.py:net photos -o {name} --batch-size 8 --no-guard").code == 0
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert lines[0]["path"] == "a/00.png"
    assert lines[-1]["path"] == "b/23.png"
    assert {line["class_name"] for line in lines} <= {"a", "b"}
    table = parquet.read_table("out.parquet").to_pylist()
    for line, row in zip(lines, table, strict=True):
        assert row == {**line, "confidence": pytest.approx(line["confidence"], rel=1e-6)}
    for line, cells in zip(lines, rows("out.csv"), strict=True):
        assert cells["path"] == line["path"]
        assert float(cells["confidence"]) == line["confidence"]


def test_a_guard_that_does_not_believe_is_exit_code_1(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("adapt nets.py:net near.npz -o out.csv --batch-size 24 --method source --format json")
    assert ran.code == int(not ran.json["result"]["believed"])
    ran = renorm("adapt nets.py:net plain.npz -o out.csv --batch-size 8 --force")
    believed = rows("out.csv")[-1]["believed"] == "true"
    assert ran.code == int(not believed)
    assert ("not believed" in " ".join(ran.out.split())) != believed
    assert "What it was worth" not in ran.out  # there are no labels


def test_labels_of_other_classes_count_no_error(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("adapt nets.py:net strange.npz -o out.csv --no-guard --format json")
    assert ran.json["result"]["errors"] is None
    assert any("no error was counted" in note for note in ran.json["result"]["notes"])


def test_a_random_order_only_when_asked_for(folder: Path, renorm: Callable[[str], Ran]) -> None:
    renorm("adapt nets.py:net near.npz -o out.csv --shuffle --no-guard")
    found = [int(row["index"]) for row in rows("out.csv")]
    assert found != sorted(found)
    assert sorted(found) == list(range(24))


# ── the state ──


def test_two_halves_with_a_state_are_the_whole(folder: Path, renorm: Callable[[str], Ran]) -> None:
    held = np.load("plain.npz")["images"]
    np.savez("first.npz", images=held[:16])
    np.savez("second.npz", images=held[16:])
    for data in ("first", "second"):
        assert (
            renorm(f"adapt nets.py:net {data}.npz -o {data}.csv --batch-size 8 --no-guard --state s.safetensors").code
            == 0
        )
    renorm("adapt nets.py:net plain.npz -o whole.csv --batch-size 8 --no-guard")
    halves = [row["confidence"] for row in rows("first.csv") + rows("second.csv")]
    assert halves == [row["confidence"] for row in rows("whole.csv")]
    wrong = "adapt nets.py:net plain.npz -o new.csv --state s.safetensors --no-guard"
    refused(renorm(f"{wrong} --method ema"), "another method (shrink, here ema)")
    refused(renorm(wrong.replace("--no-guard", "")), "does not fit it")
    Path("s.safetensors").write_bytes(b"nothing")
    refused(renorm(wrong), "s.safetensors cannot be read", "Remove it to begin anew")
    refused(renorm(wrong.replace("s.safetensors", "s.pt")), "--state is a .safetensors file; got s.pt")
    assert not Path("new.csv").exists()


# ── standard input ──


class Typed:
    """Standard input that gives these lines, and then does what `after` does."""

    def __init__(self, lines: list[str], after: Callable[[], None] = lambda: None) -> None:
        self.lines, self.after = lines, after

    def __iter__(self) -> Iterator[str]:
        yield from (f"{line}\n" for line in self.lines)
        self.after()


def paths() -> list[str]:
    return sorted(map(str, Path("photos").rglob("*.png")))


def test_paths_come_on_standard_input(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Typed(paths()))
    assert renorm("adapt nets.py:net - -o piped.csv --batch-size 5 --no-guard").code == 0
    renorm("adapt nets.py:net photos -o read.csv --batch-size 5 --no-guard")
    piped, read = rows("piped.csv"), rows("read.csv")
    assert [row["confidence"] for row in piped] == [row["confidence"] for row in read]
    assert [row["path"] for row in piped] == [f"photos/{row['path']}" for row in read]


def test_bytes_of_standard_input_are_paths(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = "\n".join(paths()).encode() + b"\n\xff.png\r\n\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    for name in ("out.csv", "out.jsonl"):
        ran = renorm(f"adapt nets.py:net - -o {name} --no-guard --limit 25 --force --format json")
        assert ran.code == (0 if name == "out.csv" else 2)  # what was read once is gone
    assert len(rows("out.csv")) == 24


def test_what_is_no_image_is_skipped_and_counted(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = paths()
    lines = [*given[:3], "missing.png", "photos", *given[3:6], "nets.py", "gone.png"]
    monkeypatch.setattr(sys, "stdin", Typed(lines))
    ran = renorm("adapt nets.py:net - -o out.csv --batch-size 4 --no-guard --format json")
    assert ran.code == 0
    skipped = ran.json["result"]["skipped"]
    assert skipped["count"] == 4
    assert [(each["line"], each["path"]) for each in skipped["first"]] == [
        *[(3, "missing.png"), (4, "photos"), (8, "nets.py"), (9, "gone.png")]
    ]
    assert "missing.png cannot be read as an image" in skipped["first"][0]["why"]
    assert any(note.startswith("skipped 4 lines") for note in ran.json["result"]["notes"])
    assert [int(row["index"]) for row in rows("out.csv")] == [0, 1, 2, 5, 6, 7]  # the line that named it
    monkeypatch.setattr(sys, "stdin", Typed(["missing.png"]))
    refused(renorm("adapt nets.py:net - -o new.csv"), "named no image that could be read", "missing.png")
    assert not Path("new.csv").exists()


def test_images_that_change_size_are_answered_size_by_size(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.random.default_rng(1).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    image.fromarray(large).save("large.png")
    lines = [*paths()[:3], "large.png", *paths()[3:6]]
    monkeypatch.setattr(sys, "stdin", Typed(lines))
    assert renorm("adapt nets.py:net - -o out.csv --no-guard").code == 0
    assert [row["step"] for row in rows("out.csv")] == ["1", "1", "1", "2", "3", "3", "3"]


def test_ctrl_c_ends_the_stream_with_what_was_answered(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press() -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stdin", Typed(paths()[:10], press))
    before = signal.getsignal(signal.SIGINT)
    ran = renorm("adapt nets.py:net - -o out.csv --batch-size 4 --no-guard --state s.safetensors")
    assert ran.code == 130
    assert "Stopped by Ctrl-C." in " ".join(ran.out.split())
    assert len(rows("out.csv")) == 8  # two whole batches
    assert Path("s.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(sys, "stdin", Typed([], press))
    ran = renorm("adapt nets.py:net - -o none.csv")
    assert (ran.code, ran.err) == (130, "renorm: interrupted; nothing was written.\n")
    assert not Path("none.csv").exists()


def test_a_batch_at_work_is_answered_first_and_a_second_ctrl_c_does_not_wait() -> None:
    with stopping() as stop:
        seen = []
        for part in stop.until([1, 2, 3]):  # type: ignore[list-item]
            signal.raise_signal(signal.SIGINT)
            seen.append(part)
        assert (seen, stop.asked) == ([1], True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_no_signal_is_heard() -> None:
    found: list[Any] = []

    def work() -> None:
        with stopping() as stop:
            found.extend(stop.until([1, 2]))  # type: ignore[list-item]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1, 2]


# ── what is refused ──


def test_what_cannot_be_streamed_is_refused_by_name(folder: Path, renorm: Callable[[str], Ran]) -> None:
    np.savez("four.npz", images=np.zeros((4, 5, 8, 8), np.float32))
    Path("there.csv").write_text("")
    adapt = "adapt nets.py:net near.npz -o new.csv"
    refused(renorm(f"{adapt} --method shrik"), "there is no method 'shrik'", "'shrink'")
    refused(renorm(f"{adapt} --options.flor 0.1"), "'--options.flor'", "'--options.floor'")
    refused(renorm(f"{adapt} --options.floor 2"), "floor of shrink is a share in [0, 1]; got 2.0")
    refused(renorm(f"{adapt} --batch-size 0"), "batch_size=0")
    refused(renorm(adapt.replace("new.csv", "there.csv")), "there.csv stands there already")
    refused(
        renorm(adapt.replace("new.csv", "new.xlsx")), "predictions are written as .parquet, .csv, .jsonl; got new.xlsx"
    )
    refused(renorm("adapt"), "renorm adapt needs MODEL")
    refused(renorm("adapt nets.py:layer near.npz -o new.csv"), "'shrink' needs batch norm", "tent, eata")
    refused(renorm("adapt nets.py:dense near.npz -o new.csv"), "one class per sample", "(24, 2, 6, 6)")
    refused(renorm("adapt nets.py:net four.npz -o new.csv"), "to have 3 channels, but got 5")
    refused(renorm(f"{adapt} --method hybrid"), "needs to know the source")
    assert not Path("new.csv").exists()
    assert not list(Path().glob(".new*"))  # no half-written file either


def test_a_layer_norm_takes_the_methods_that_train(folder: Path, renorm: Callable[[str], Ran]) -> None:
    assert renorm("adapt nets.py:layer near.npz -o new.csv --method tent --no-guard").code == 0


def test_parquet_without_pyarrow_is_refused_before_any_work(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    ran = renorm("adapt nets.py:net near.npz -o new.parquet")
    assert ran.code == MissingExtra.exit_code
    assert "renorm[tables]" in ran.err


def test_a_model_left_in_train_mode_with_dropout_answers_as_if_in_evaluation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2)
    ).train()
    streamed = library.adapt_(model, guard=False)
    x = torch.randn(8, 3, 8, 8)
    first = streamed.predict(x)
    assert torch.equal(first, streamed.predict(x))
    assert model.training
    learnt = streamed.state_dict()
    with pytest.raises(BatchError, match="no samples"):
        streamed(x[:0])
    assert all(torch.equal(value, learnt[name]) for name, value in streamed.state_dict().items())


def test_the_command_line_is_written_without_what_goes_without_saying() -> None:
    words = ["m.py:f", "d.npz", "-o", "o.csv", "--options.floor", "0.5"]
    assert parse(catalogue()["adapt"], words).written() == "renorm adapt m.py:f d.npz -o o.csv --options.floor 0.5"


# ── the report ──

STEP = Step(
    step=1,
    samples=4,
    left_out=0,
    believed=True,
    weight=0.5,
    moved=float("nan"),
    drift={},
    evidence=0.25,
    confidence=(0.8, 0.7),
    action="",
    why="",
)


def streamed(*believed: bool, **changes: Any) -> stream.Streamed:
    log = tuple(replace(STEP, step=k + 1, believed=yes) for k, yes in enumerate(believed))
    usual = {"method": "shrink", "guarded": True, "interrupted": False, "samples": 4 * len(log), "unanswered": 0}
    return stream.Streamed(**{**usual, "steps": len(log), "log": log, "errors": None, **changes})


def test_phases_are_steps_in_a_row_with_one_who_answers() -> None:
    found = stream.phases(streamed(False, False, True, False).log)
    assert [(phase.believed, phase.samples) for phase in found] == [(False, 8), (True, 4), (False, 4)]
    table = next(block for block in stream.blocks(streamed(False, True, True)) if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["1", "2–3"]


def test_the_verdict_says_who_is_believed_and_what_it_was_worth() -> None:
    errors = stream.Errors(0.5, 0.25, (0.25, 0.1, 0.4), 8, ((0.5, 0.25), (0.5, 0.25)))
    assert stream.verdict(streamed(False, True), output="o").tone == "good"
    assert stream.verdict(streamed(True, False), output="o").tone == "doubt"
    assert stream.verdict(streamed(True, guarded=False), output="o").tone == "plain"
    said = stream.verdict(streamed(True, True, errors=errors), output="o")
    assert said.tone == "bad"
    assert "Error 50.0 %, where the source has 25.0 %" in said.text


def test_alarms_and_unanswered_samples_are_told() -> None:
    given = streamed(True, True, True, unanswered=3, steps=20_000)
    log = (*given.log[:2], replace(given.log[2], action="back", why="the source was surer"))
    blocks = stream.blocks(replace(given, log=log))
    tables = {block.title: block for block in blocks if isinstance(block, Table)}
    assert tables["Alarms"].rows == (("3", "back to the last good state", "the source was surer"),)
    assert "Only the last 3 steps are known." in tables["Who answered"].note
    assert any(isinstance(block, Words) and "3 samples held numbers" in block.text for block in blocks)
    result = stream.result(replace(given, log=log))
    assert result["alarms"] == [{"step": 3, "action": "back", "why": "the source was surer"}]


def test_layers_are_drawn_apart_the_first_the_last_and_two_between() -> None:
    names = [f"layer{k}" for k in range(8)]
    given = streamed(True, True)
    log = tuple(replace(step, drift={name: k + step.step for k, name in enumerate(names)}) for step in given.log)
    drawn = next(p for p in stream.pictures(replace(given, log=log)) if "single layers" in p.title)
    assert isinstance(drawn, Lines)
    assert [name for name, *_ in drawn.items] == ["layer0", "layer2", "layer5", "layer7"]
    assert drawn.items[3][2] == ((1.0, 8.0), (2.0, 9.0))
    result = stream.result(replace(given, log=log))
    assert result["drift"]["layer2"] == {"first": 3, "largest": 4, "last": 4}
    assert "drift" not in result["log"][0]


def test_lines_are_drawn_where_they_lie_with_bands_and_marks() -> None:
    pytest.importorskip("matplotlib")
    drawn = Lines(
        "",
        items=(("a", "good", ((1, 0.5), (2, float("nan")), (3, 1.0))), ("b", "plain", ((1, 0.0),))),
        bands=((0.5, 1.5, "doubt"),),
        marks=((2.0, "bad"),),
        full=(0, 1),
    )
    (axes,) = pictures.figure([drawn]).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[2.0, 2.0], [1, 2, 3], [1]]
    assert len(axes.patches) == 1
    assert axes.get_ylim()[0] < 0 < 1 < axes.get_ylim()[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert "nan" not in pictures.svg(pictures.figure([drawn])).lower().replace("nance", "")


def test_a_stream_is_drawn_as_far_as_it_is_known() -> None:
    errors = stream.Errors(0.5, 0.25, (0.25, 0.1, 0.4), 8, ((0.5, 0.25), (0.5, 0.25)))
    drawn = stream.pictures(streamed(False, True, errors=errors))
    titles = [picture.title for picture in drawn]
    assert len(titles) == 3  # how far it moved is not known
    assert all(isinstance(picture, Lines) and picture.bands == ((0.5, 1.5, "doubt"),) for picture in drawn)


def test_a_long_line_is_thinned_to_means_of_neighbours() -> None:
    nan = float("nan")
    assert thinned([(1, 1.0), (2, 3.0), (3, nan), (4, 5.0)], most=2) == ((1.5, 2.0), (3.5, 5.0))
    assert len(thinned([(k, 0.0) for k in range(10_000)])) == 200


# ── the docs ──


def test_the_docs_list_every_method_in_the_words_of_its_file() -> None:
    rows = ["| method | what it does | needs `source=` | without batch norm |", "|---|---|---|---|"]
    for name, kind in methods().items():
        said = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
        needs, other = ("yes" if flag else "" for flag in (kind.needs_source, kind.any_norm))
        rows.append(f"| `{name}` | {said} | {needs} | {other} |")
    page = (Path(__file__).parents[1] / "docs" / "online.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page


def test_the_guard_is_set_by_name(folder: Path, renorm: Callable[..., Ran]) -> None:
    words = "adapt nets.py:net plain.npz -o out.csv --batch-size 8"
    ran = renorm(f"{words} --guard.first 8 --format json")
    assert ran.code in (0, 1), ran.err
    refused(renorm(f"{words} --guard.zeroth 8 --force"), "there is no setting of the guard 'zeroth'", "first")
    refused(renorm(f"{words} --guard.first 8 --no-guard --force"), "--no-guard leaves nothing for --guard to set")
