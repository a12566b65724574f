"""Tables: which column becomes what, row groups larger than memory, and every way a table can be wrong."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from renorm.cli import main
from renorm.datasets import Dataset, load_data, tables
from renorm.errors import DataError, MissingExtra, UnknownName, UsageError
from renorm.files import sha256
from renorm.preprocessing import Preprocessing

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def frame(rows: int = 20) -> Any:
    rng = np.random.default_rng(0)
    return pandas.DataFrame(
        {
            "age": rng.integers(20, 80, rows),
            "pulse": rng.normal(80, 10, rows),
            "smokes": rng.random(rows) > 0.5,
            "hospital": np.array(["north", "south", "east"])[np.arange(rows) % 3],
            "note": [f"patient {k}" for k in range(rows)],
            "label": np.arange(rows) % 2,
        }
    )


def written(path: Path, table: Any, **options: Any) -> Path:
    if path.name.endswith(".parquet"):
        table.to_parquet(path, **options)
    else:
        table.to_csv(path, index=False, **({"sep": "\t"} if path.suffix == ".tsv" else {}))
    return path


def inputs(data: Dataset) -> Tensor:
    return torch.cat([batch[0] for batch in data.batches])


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_numbers_are_the_input_and_named_columns_are_not(name: str, tmp_path: Path) -> None:
    table = frame()
    path = written(tmp_path / name, table)
    data = load_data(path, group="hospital", batch_size=6)
    assert data.count == 20
    assert [len(batch[0]) for batch in data.batches] == [6, 6, 6, 2]
    wanted = table[["age", "pulse", "smokes"]].to_numpy(dtype=np.float64)[data.order]
    assert np.allclose(inputs(data).numpy(), wanted, rtol=1e-6)
    assert data.labels is not None
    assert data.labels.tolist() == table.label[data.order].tolist()
    assert data.groups == tuple(table.hospital[data.order])
    assert data.fingerprint == f"sha256:{sha256(path)}"
    assert "columns left out: note" in data.notes
    assert "the input is 3 columns of numbers, as they are: age, pulse, smokes" in data.notes
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.batches, data.batches, strict=True))


def test_labels_are_found_named_or_left_away(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", frame())
    by_name = load_data(path, labels="hospital", seed=None)
    assert by_name.classes == ("east", "north", "south")
    assert by_name.labels is not None
    assert by_name.labels.tolist()[:3] == [1, 2, 0]
    assert "label" in by_name.notes[-2] or inputs(by_name).shape == (20, 4)
    regression = load_data(path, labels="pulse", seed=None)
    assert regression.labels is not None
    assert regression.labels.dtype == torch.float32
    assert load_data(path, labels=None).labels is None
    without = load_data(written(tmp_path / "b.csv", frame().drop(columns="label")))
    assert without.labels is None
    assert (
        "no labels: no column is called labels, y, targets, target, label (--labels NAME says which)" in without.notes
    )
    with pytest.raises(UnknownName, match=r"column of .*a\.csv: 'hospitl'; did you mean 'hospital'"):
        load_data(path, labels="hospitl")
    with pytest.raises(UnknownName, match=r"column of .*a\.csv: 'ward'"):
        load_data(path, group="ward")
    with pytest.raises(UnknownName, match=r"column of .*a\.csv: 'agee'; did you mean 'age'"):
        load_data(path, inputs="agee")


# ── larger than memory ──


def large(folder: Path, rows: int = 400, group: int = 20) -> tuple[Path, Any]:
    """A table of twenty row groups, sorted by its label as exports often are."""
    rng = np.random.default_rng(1)
    table = pandas.DataFrame({"a": rng.normal(size=rows), "b": rng.normal(size=rows), "y": np.arange(rows) // 100})
    return written(folder / "large.parquet", table, row_group_size=group), table


def test_a_parquet_file_larger_than_the_window_is_read_a_window_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table = large(tmp_path)
    about = parquet.ParquetFile(path).metadata.row_group(0)
    monkeypatch.setattr(tables, "WINDOW", 4 * sum(about.column(k).total_uncompressed_size for k in (0, 1)))
    reads: list[tuple[int, str]] = []
    read = tables._Parquet._column
    monkeypatch.setattr(
        tables._Parquet, "_column", lambda self, k, name: (reads.append((k, name)), read(self, k, name))[1]
    )
    data = load_data(path, batch_size=16)
    assert sorted(data.order.tolist()) == list(range(400))
    assert any(note.endswith("and rows among 4 of 20 at a time") for note in data.notes)
    reads.clear()
    found = inputs(data).numpy()
    assert np.allclose(found, table[["a", "b"]].to_numpy()[data.order], atol=1e-6)
    assert len(reads) == len(set(reads)) == 40, "every row group is read once, and its two columns alone"
    labels = torch.cat([batch[1] for batch in data.batches])
    assert labels.tolist() == table.y.to_numpy()[data.order].tolist()
    first = [set(labels[k : k + 64].tolist()) for k in range(0, 384, 64)]
    assert np.mean([len(classes) for classes in first]) > 2, "windows mix row groups of different places"
    held = max(len(window) for window in [list(data.batches.fetch.rows._held)])
    assert held <= 8, "no more than a window is held"
    assert load_data(path, limit=30).count == 30


def test_row_groups_in_order_and_small_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = large(tmp_path)
    assert not any("larger than" in note for note in load_data(path).notes)
    monkeypatch.setattr(tables, "WINDOW", 1)
    straight = load_data(path, seed=None)
    assert straight.order.tolist() == list(range(400))
    assert np.allclose(inputs(straight).numpy(), table[["a", "b"]].to_numpy(), atol=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """64 MB of numbers are read by a process that may hold 30 MB more than after its first batch."""
    columns = {f"c{k}": pyarrow.array(np.random.default_rng(k).normal(size=200_000)) for k in range(40)}
    path = tmp_path / "big.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=5_000, compression="none")
    code = (
        "import resource, sys, pyarrow\n"
        "from renorm.datasets import load_data, tables\n"
        "tables.WINDOW = 4 << 20\n"
        "pyarrow.set_memory_pool(pyarrow.system_memory_pool())\n"
        "data = load_data(sys.argv[1], batch_size=512, seed=0)\n"
        "batches = iter(data.batches); next(batches)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "total = sum(len(batch[0]) for batch in batches)\n"
        "print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(tables.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    total, grown = done.stdout.split()
    assert int(total) == 200_000 - 512
    assert float(grown) < 30


# ── texts, images, lists ──


def test_texts_go_through_the_models_tokenizer(tmp_path: Path) -> None:
    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[len(text)] for text in texts])}

    table = pandas.DataFrame({"text": ["a", "bcd", "ef"], "title": ["x"] * 3, "y": [0, 1, 0]})
    path = written(tmp_path / "a.parquet", table)
    data = load_data(path, inputs="text", tokenize=tokenize, seed=None, batch_size=2)
    batches = list(data.batches)
    assert batches[0][0]["input_ids"].tolist() == [[1], [3]]
    assert batches[0][1].tolist() == [0, 1]
    only = load_data(written(tmp_path / "b.csv", table.drop(columns="title")), tokenize=tokenize, seed=None)
    assert next(iter(only.batches))[0]["input_ids"].tolist() == [[1], [3], [2]]
    with pytest.raises(
        DataError, match=r"several columns of texts for the model's input: text \(text\), title \(text\)"
    ):
        load_data(path, tokenize=tokenize)
    with pytest.raises(
        DataError, match=r"row 0 of 'text' is 'a', and there is no such image file.*need a model with a tok"
    ):
        load_data(path, inputs="text", seed=None)


def image(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(image(seed)).save(held, "png")
    return held.getvalue()


def test_images_by_path_as_bytes_and_as_the_hub_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(4):
        (tmp_path / "photos" / f"{k}.png").write_bytes(png(k))
    names = [f"photos/{k}.png" for k in range(4)]
    table = pandas.DataFrame({"file": names, "y": [0, 1, 0, 1], "clinic": ["a", "a", "b", "b"]})
    wanted = torch.stack([torch.from_numpy(image(k)).permute(2, 0, 1) / 255 for k in range(4)])
    by_path = load_data(written(tmp_path / "a.csv", table), inputs="file", group="clinic", seed=None)
    assert torch.equal(inputs(by_path), wanted)
    assert by_path.groups == ("a", "a", "b", "b")
    encoded = pandas.DataFrame({"image": [png(k) for k in range(4)], "y": [0, 1, 0, 1]})
    assert torch.equal(inputs(load_data(written(tmp_path / "b.parquet", encoded), seed=None)), wanted)
    structs = [{"bytes": None, "path": name} for name in names[:2]] + [{"bytes": png(k), "path": None} for k in (2, 3)]
    hub = pyarrow.table({"image": structs, "y": [0, 1, 0, 1]})
    parquet.write_table(hub, tmp_path / "c.parquet")
    data = load_data(tmp_path / "c.parquet", preprocessing=RGB, seed=None)
    assert inputs(data).shape == (4, 3, 8, 8)
    assert any(note.startswith("input 3 × 8 × 8") for note in data.notes)
    (tmp_path / "photos" / "2.png").write_bytes(png(2)[:60])
    with pytest.raises(DataError, match=r"2\.png cannot be read as an image"):
        list(by_path.batches)
    (tmp_path / "photos" / "2.png").unlink()
    with pytest.raises(DataError, match=r"row 2 of 'file' is 'photos/2\.png', and there is no such image file in"):
        list(by_path.batches)


def test_lists_of_numbers_are_the_input(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 4, 3))
    parquet.write_table(pyarrow.table({"signal": values.tolist(), "y": list(range(6))}), tmp_path / "a.parquet")
    assert np.allclose(inputs(load_data(tmp_path / "a.parquet", seed=None)).numpy(), values)
    parquet.write_table(pyarrow.table({"signal": [[1.0], [1.0, 2.0]]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match=r"'signal' holds lists of 2 shapes, \(.*Give lists of numbers, all of one shape"
    ):
        list(load_data(tmp_path / "b.parquet").batches)


# ── what cannot be used ──


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_gaps_and_what_is_not_finite_are_counted_and_placed(suffix: str, tmp_path: Path) -> None:
    table = frame()
    table.loc[3:5, "pulse"] = None
    table.loc[7, "hospital"] = None
    path = written(tmp_path / f"a{suffix}", table)
    with pytest.raises(DataError, match=r"of 20 rows some hold nothing in columns that are needed: 'pulse' in 3"):
        load_data(path)
    with pytest.raises(DataError, match=r"'hospital' in 1"):
        load_data(path, group="hospital", inputs="age")
    assert load_data(path, inputs="age").count == 20
    table = frame()
    table.loc[4, "pulse"] = np.inf
    data = load_data(written(tmp_path / f"b{suffix}", table), seed=None)
    with pytest.raises(DataError, match=r"row 4 holds NaN or infinity \(in float32\) in 'pulse', and 1 of the 20 rows"):
        list(data.batches)


def test_names_with_dots_are_names(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1.0, 2.0], "a.b": [3.0, None], "s": [[1.0], [2.0]], "y": [0, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"some hold nothing in columns that are needed: 'a\.b' in 1"):
        load_data(tmp_path / "a.parquet")
    assert inputs(load_data(tmp_path / "a.parquet", inputs="a", seed=None)).tolist() == [[1], [2]]


def test_columns_that_cannot_be_the_input(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", pandas.DataFrame({"name": ["a", "b"], "y": [0, 1]}))
    with pytest.raises(
        DataError, match=r"no column of numbers for the model's input: name \(text\)\. Say which column"
    ):
        load_data(path)
    with pytest.raises(UsageError, match=r"the column 'y' was to be the input, but it holds the labels or the groups"):
        load_data(path, inputs="y")
    parquet.write_table(
        pyarrow.table({"when": pyarrow.array([1, 2], pyarrow.date32()), "y": [0, 1]}), tmp_path / "d.parquet"
    )
    with pytest.raises(UsageError, match=r"'when' was to be the input, but it holds neither numbers, texts nor images"):
        load_data(tmp_path / "d.parquet", inputs="when")
    with pytest.raises(UsageError, match=r"a\.csv is one table, without splits, and split 'test' was asked for"):
        load_data(path, split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"cannot be read as a table \(No columns to parse from file\)"),
        ("a.csv", b"x,y\n", r"holds no rows\. Give a table with at least one"),
        ("a.csv", b"x,y\n1,2,3\n4,5,6,7\n", r"cannot be read as a table \(Error tokenizing"),
        ("a.csv", b"\xff\xfe\x00x", r"cannot be read as a table \(.*codec"),
        ("a.csv.gz", b"x,y\n1,2\n", r"cannot be read as a table \(Not a gzipped file"),
        ("a.parquet", b"PAR1 half", r"is damaged, or no parquet file \("),
        ("a.parquet", b"", r"is damaged, or no parquet file \("),
    ],
)
def test_files_that_are_no_tables_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / name)


def test_a_torn_archive_and_a_torn_row_group_are_named(tmp_path: Path) -> None:
    text = frame(5000).to_csv(index=False).encode()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text)[:-400])
    with pytest.raises(DataError, match=r"a\.csv\.gz cannot be read as a table \(Compressed file ended"):
        load_data(tmp_path / "a.csv.gz")
    path, _ = large(tmp_path)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"large\.parquet is damaged, or no parquet file"):
        list(load_data(path).batches)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array([1.0]), pyarrow.array([2.0])], names=["a", "a"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(DataError, match=r"has several columns called 'a'\. Name them apart"):
        load_data(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "package"), [("a.csv", "pandas"), ("a.parquet", "pyarrow")])
def test_tables_need_the_extra(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / name, frame())
    monkeypatch.setitem(sys.modules, package, None)
    if package == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=rf'reading a\..* needs {package}, .*"renorm\[tables\]"'):
        load_data(path)


# ── the command line ──

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].running_mean.copy_(torch.tensor([50., 80, 0.5]))
    model[0].running_var.copy_(torch.tensor([300., 100, 0.25]))
    return model
"""


def test_the_command_line_measures_every_hospital_and_mends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    written(Path("patients.csv"), frame(60))
    assert main("evaluate nets.py:net patients.csv --group hospital".split()) == 0
    table = capsys.readouterr().out
    assert "By group, worst first" in table
    assert all(name in table for name in ("north", "south", "east"))
    assert main("evaluate nets.py:net patients.csv --group hospital --format json".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    values = [group["value"] for group in result["groups"]]
    assert values == sorted(values)
    assert sum(group["count"] for group in result["groups"]) == 60
    assert list(result["groups"][0]) == ["group", "metric", "value", "interval", "count", "nll", "ece"]
    assert main("recalibrate nets.py:net patients.csv --group hospital -o new.pt".split()) == 0
    capsys.readouterr()
    assert main("evaluate nets.py:net patients.csv --group ward".split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "there is no column of patients.csv: 'ward'" in said.err
