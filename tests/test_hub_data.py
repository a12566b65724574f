"""The hub's data sets, from folders on disk: columns, splits, classes, images, texts; nothing is fetched."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from renorm.datasets import load_data
from renorm.errors import DataError, MissingExtra, UnknownName, UsageError

hub = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", True)
    hub.disable_progress_bars()


def pixels(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def photos(rows: int = 6) -> Any:
    features = hub.Features(
        {
            "image": hub.Image(),
            "label": hub.ClassLabel(names=["cat", "dog"]),
            "clinic": hub.Value("string"),
            "age": hub.Value("int32"),
        }
    )
    held = [Image.fromarray(pixels(k)) for k in range(rows)]
    return hub.Dataset.from_dict(
        {"image": held, "label": [k % 2 for k in range(rows)], "clinic": list("aabbcc"), "age": list(range(rows))},
        features=features,
    )


def test_a_saved_data_set_of_images_opens_with_classes_and_groups(tmp_path: Path) -> None:
    photos().save_to_disk(tmp_path / "saved")
    data = load_data(f"hf:{tmp_path / 'saved'}", group="clinic", batch_size=4)
    assert data.count == 6
    assert data.classes == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [k % 2 for k in data.order]
    assert data.groups == tuple("aabbcc"[k] for k in data.order)
    wanted = torch.stack([torch.from_numpy(pixels(k)).permute(2, 0, 1) / 255 for k in data.order])
    assert torch.equal(torch.cat([x for x, _ in data.batches]), wanted)
    assert data.fingerprint.startswith("of datasets: ")
    assert "columns left out: age" in data.notes
    turned = load_data(f"hf:{tmp_path / 'saved'}", classes=["dog", "cat"], seed=None)
    assert turned.labels is not None
    assert turned.labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_splits_are_chosen(tmp_path: Path) -> None:
    both = hub.DatasetDict({"train": photos(), "test": photos().select(range(2))})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits train, test\. Say which with --split NAME"):
        load_data(f"hf:{tmp_path / 'both'}")
    assert load_data(f"hf:{tmp_path / 'both'}", split="test").count == 2
    with pytest.raises(UnknownName, match=r"split of hf:.*: 'tst'; did you mean 'test'"):
        load_data(f"hf:{tmp_path / 'both'}", split="tst")


def test_numbers_lists_and_texts(tmp_path: Path) -> None:
    signal = np.random.default_rng(0).normal(size=(5, 4)).tolist()
    table = hub.Dataset.from_dict(
        {"a": [1.5] * 5, "b": list(range(5)), "signal": signal, "text": list("vwxyz"), "y": [0] * 5}
    )
    table.save_to_disk(tmp_path / "t")
    spec = f"hf:{tmp_path / 't'}"
    numbers = load_data(spec, seed=None)
    assert torch.cat([x for x, _ in numbers.batches]).tolist() == [[1.5, k] for k in range(5)]
    lists = load_data(spec, inputs="signal", seed=None)
    assert np.allclose(torch.cat([x for x, _ in lists.batches]).numpy(), signal)
    texts = load_data(spec, tokenize=lambda found: {"input_ids": torch.tensor([[ord(t)] for t in found])}, seed=None)
    assert next(iter(texts.batches))[0]["input_ids"][:, 0].tolist() == [ord(t) for t in "vwxyz"]
    hub.Dataset.from_dict({"a": [1.0, None], "y": [0, 1]}).save_to_disk(tmp_path / "gaps")
    with pytest.raises(DataError, match=r"of 2 rows some hold nothing in columns that are needed: 'a' in 1"):
        load_data(f"hf:{tmp_path / 'gaps'}")


def test_a_folder_of_files_that_datasets_knows(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.csv").write_text("a,b,y\n1,2,0\n3,4,1\n")
    data = load_data(f"hf:{tmp_path / 'files'}", seed=None)
    assert torch.cat([x for x, _ in data.batches]).tolist() == [[1, 2], [3, 4]]


def test_broken_images_are_named_by_row(tmp_path: Path) -> None:
    held = io.BytesIO()
    Image.fromarray(pixels(0)).save(held, "png")
    features = hub.Features({"image": hub.Image(), "label": hub.Value("int64")})
    rows = [{"bytes": held.getvalue(), "path": None}, {"bytes": b"junk", "path": None}]
    hub.Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"row 1 of 'image' cannot be read as an image"):
        list(load_data(f"hf:{tmp_path / 'bad'}").batches)


def test_names_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hf: names no data set\. Use hf:ORG/NAME"):
        load_data("hf:")
    for name in ("org/nosuch", "org/no such ☃", "y" * 5000, str(tmp_path)):
        with pytest.raises(DataError, match=r"could not be opened: \w+: .*only what is in the cache can be read"):
            load_data(f"hf:{name}")
    hub.Dataset.from_dict({"a": [1], "y": [0]}).filter(lambda row: False).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match=r"empty holds no rows"):
        load_data(f"hf:{tmp_path / 'empty'}")


def test_the_hub_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r'hf:org/name needs datasets, .*"renorm\[hub\]"'):
        load_data("hf:org/name")


def test_progress_bars_are_left_as_they_were(tmp_path: Path) -> None:
    photos().save_to_disk(tmp_path / "saved")
    hub.enable_progress_bars()
    load_data(f"hf:{tmp_path / 'saved'}")
    assert not hub.are_progress_bars_disabled()
