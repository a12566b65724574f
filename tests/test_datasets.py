"""datasets: what comes out is what the model wants, in a fixed order; what cannot be used is named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from renorm.datasets import Dataset, load_data
from renorm.datasets.images import LOOKED, Decoder
from renorm.errors import DataError, MissingExtra, UnknownName, UsageError
from renorm.files import sha256
from renorm.models import open_model
from renorm.preprocessing import Preprocessing
from tests.data import shared

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))


def inputs(data: Dataset) -> Tensor:
    return torch.cat([batch[0] for batch in data.batches])


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


# ── order, batches, labels ──


def test_batches_are_the_same_on_every_pass_and_go_with_the_labels(tmp_path: Path) -> None:
    images = noise(10, 8, 8, 3)
    data = load_data(npz(tmp_path, images=images, labels=np.arange(10)), batch_size=4)
    state = torch.get_rng_state()
    first, second = list(data.batches), list(data.batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(x) for x, _ in first] == [4, 4, 2]
    assert len(data.batches) == 3
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    labels = torch.cat([y for _, y in first])
    assert data.labels is not None
    assert torch.equal(labels, data.labels)
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(10))
    assert labels.tolist() != list(range(10)), "shuffled"
    assert torch.equal(torch.from_numpy(images)[labels].permute(0, 3, 1, 2) / 255, inputs(data))
    assert data.order.tolist() == labels.tolist()


def test_order_and_limit_are_said(tmp_path: Path) -> None:
    path = npz(tmp_path, images=noise(10, 8, 8, 3), labels=np.arange(10))
    data = load_data(path, limit=3, seed=5)
    assert data.count == 3
    assert data.notes[-2:] == (
        "read in a random order (seed 5): batches that hold one class each do harm",
        "3 of 10 samples, the first in that order",
    )
    straight = load_data(path, limit=3, seed=None)
    assert straight.labels is not None
    assert straight.labels.tolist() == [0, 1, 2]
    assert load_data(path, limit=100).count == 10
    assert load_data(path, limit=1).notes[-1] == "only 1 sample: too few to measure statistics on"


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"limit": 0}, {"limit": -1}])
def test_numbers_that_make_no_sense_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"(batch_size|limit)=-?\d makes no sense\. Give a number above 0"):
        load_data("digits", **option)


def test_labels_follow_the_models_class_names(tmp_path: Path) -> None:
    path = npz(tmp_path, images=noise(4, 8, 8, 3), labels=[0, 1, 2, 1], classes=["cat", "dog", "owl"])
    data = load_data(path, seed=None, classes=["owl", "ant", "cat", "dog"])
    assert data.labels is not None
    assert data.labels.tolist() == [2, 3, 0, 3]
    assert data.classes == ("owl", "ant", "cat", "dog")
    assert "labels are numbered as the model's classes, by name" in data.notes
    strange = load_data(path, seed=None, classes=["cat", "dog"])
    assert strange.labels is not None
    assert strange.labels.tolist() == [0, 1, 2, 1]
    assert "1 of 3 classes are none of the model's: owl" in strange.notes
    same = load_data(path, seed=None, classes=["cat", "dog", "owl"])
    assert same.notes == ("pixels / 255, 8 × 8",)


# ── arrays ──


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 8, 8, 3), 3), ((5, 3, 8, 8), 1), ((5, 3, 8, 3), 3), ((5, 8, 8, 1), 3), ((5, 1, 8, 8), 1)]
)
def test_pixels_in_either_layout_become_channels_first(tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    images = noise(*shape)
    x = inputs(load_data(npz(tmp_path, x=images), seed=None))
    assert torch.allclose(x, torch.from_numpy(np.moveaxis(images, axis, 1)) / 255)
    assert x.dtype == torch.float32


def test_pixels_are_normalised_for_the_model(tmp_path: Path) -> None:
    images = noise(5, 8, 8, 3)
    data = load_data(npz(tmp_path, images=images), preprocessing=RGB, seed=None)
    expected = (images / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    assert np.allclose(inputs(data).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert data.notes[0] == "input 3 × 8 × 8 (bicubic), pixels / 255 less (0.5, 0.4, 0.3) over (0.2, 0.3, 0.4)"


def test_grey_colour_and_alpha_are_brought_to_the_models_channels_and_said(tmp_path: Path) -> None:
    grey = noise(5, 8, 8)
    data = load_data(npz(tmp_path, images=grey), preprocessing=RGB, seed=None)
    assert "grey repeated into 3 channels" in data.notes
    assert torch.allclose(inputs(data)[:, 1], (torch.from_numpy(grey) / 255 - 0.4) / 0.3, atol=1e-6)
    four = noise(5, 8, 8, 4)
    data = load_data(npz(tmp_path, images=four), preprocessing=GREY, seed=None)
    assert "fourth channel (alpha) dropped, colours reduced to grey (their luminance)" in data.notes
    expected = (four[..., :3] @ np.array([0.299, 0.587, 0.114]) / 255 - 0.5) / 0.5
    assert np.allclose(inputs(data)[:, 0].numpy(), expected, atol=1e-5)
    seven = npz(tmp_path, images=noise(5, 8, 8, 7))
    with pytest.raises(DataError, match=r"data\.npz: images has the shape \(5, 8, 8, 7\), in which no axis"):
        load_data(seven)
    wide = Preprocessing(input_size=(7, 8, 8), mean=(0.0,) * 7, std=(1.0,) * 7)
    assert inputs(load_data(seven, preprocessing=wide)).shape == (5, 7, 8, 8)
    two = Preprocessing(input_size=(2, 8, 8), mean=(0.0,) * 2, std=(1.0,) * 2)
    with pytest.raises(DataError, match="the model takes 2 channels, the images have 3"):
        load_data(npz(tmp_path, images=noise(5, 8, 8, 3)), preprocessing=two)


def test_arrays_of_another_size_are_resized_as_the_folder_would_be(tmp_path: Path) -> None:
    small = np.asarray(Image.fromarray(noise(6, 5, 3)).resize((40, 30), Image.Resampling.BICUBIC))
    wants = Preprocessing(input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.8, interpolation="bilinear")
    data = load_data(npz(tmp_path, images=small[None]), preprocessing=wants)
    assert "resized from 30 × 40" in data.notes
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(small).save(folder / "a.png")
    other = load_data(folder, preprocessing=wants)
    assert inputs(data).shape == (1, 3, 16, 16)
    assert (inputs(data) - inputs(other)).abs().max() < 0.03


def test_sixteen_bits_and_whole_numbers_of_any_type_are_pixels(tmp_path: Path) -> None:
    images = noise(5, 8, 8, 3)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for other in (images.astype(np.uint16) * 257, images.astype(">u2") * np.uint16(257), images.astype(np.int64)):
        assert torch.allclose(inputs(load_data(npz(tmp_path, images=other), seed=None)), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 9), (6, 3, 8, 8), (6, 1, 4, 4, 4)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, ">f4"])
def test_other_numbers_are_taken_as_they_are(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    values = (np.random.default_rng(0).normal(size=shape) * 1000).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    data = load_data(tmp_path / "a.npy", seed=None)
    assert np.allclose(inputs(data).numpy(), values)
    assert data.labels is None
    assert data.notes == ("numbers that are no pixels (8 or 16 bits) are taken as they are, not normalised",)


def test_floats_for_a_model_of_images(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 9, 9, 3)).astype(np.float32)
    data = load_data(npz(tmp_path, x=values), preprocessing=RGB, seed=None)
    assert np.allclose(inputs(data).numpy(), values.transpose(0, 3, 1, 2))
    assert "channels moved from last to first" in data.notes
    data = load_data(npz(tmp_path, x=np.abs(values)), preprocessing=RGB, seed=None)
    assert "they lie in 0…255 as pixels do: saved as uint8, they would be normalised for the model" in data.notes
    with pytest.raises(DataError, match=r"the model takes images, 3 × 8 × 8; .* has the shape \(6, 4\)\. Give \(N, H"):
        load_data(npz(tmp_path, x=values[:, 0, :4, 0]), preprocessing=RGB)
    with pytest.raises(DataError, match=r"the model takes 3 channels, data\.npz: x has 1\. Give what the model takes"):
        load_data(npz(tmp_path, x=values[..., :1]), preprocessing=RGB)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_counted_and_placed(tmp_path: Path, bad: float) -> None:
    values = np.zeros((100, 7))
    values[40:43, 2] = bad
    path = npz(tmp_path, X=values)
    with pytest.raises(
        DataError, match=r"3 of 100 samples hold NaN or infinity \(in float32\), the first is number 40"
    ):
        load_data(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), r"holds no samples: its shape is \(0, 8, 8, 3\)"),
        (np.zeros((4, 0)), r"holds no samples: its shape is \(4, 0\)"),
        (np.zeros(4), r"has the shape \(4,\): one number for each sample"),
        (np.array(["a", "b"]), r"is of type <U1\. Give numbers"),
        (np.zeros((2, 2), complex), r"is of type complex128\. Give numbers"),
        (noise(2, 2, 8, 8, 3), r"has the shape \(2, 2, 8, 8, 3\), in which no axis can be the channels"),
    ],
)
def test_arrays_that_cannot_be_used_say_why(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.npz: images {message}"):
        load_data(npz(tmp_path, images=values))


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("name", ["images", "labels"])
def test_objects_are_never_unpickled(tmp_path: Path, suffix: str, name: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / f"a{suffix}"
    objects = np.array([Malice(trace)], dtype=object)
    if suffix == ".npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, **{"images": noise(1, 8, 8, 3), name: objects})
    with pytest.raises(
        DataError, match=r"holds Python objects, which may run code.*never unpickles them.*numpy\.stack"
    ):
        load_data(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
@pytest.mark.parametrize(
    "content", [b"", b"hello, no array", b"PK\x03\x04 half", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x04\x00{{{\n"]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is damaged, or no NumPy file \(.*Write it again with numpy\.save"):
        load_data(tmp_path / name)


def test_damage_inside_an_archive_is_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=noise(50, 8, 8, 3))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[2000:2100] = bytes(100)
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npz: images is damaged"):
        load_data(tmp_path / "a.npz")


def test_a_header_that_claims_more_than_memory_is_named(tmp_path: Path) -> None:
    header = io.BytesIO()
    claimed = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with pytest.raises(
        DataError, match=r"a\.npz: images does not fit into memory, or its header lies .*Save it by itself"
    ):
        load_data(tmp_path / "a.npz")


# ── names in an archive ──


def test_arrays_are_found_by_name_split_and_key(tmp_path: Path) -> None:
    one, two = noise(4, 8, 8, 3), noise(3, 8, 8, 3, seed=1)
    path = npz(tmp_path, images=one, labels=[0, 1, 0, 1], images_test=two, labels_test=[1, 1, 0])
    assert load_data(path).spec.endswith("data.npz#images")
    for data in (load_data(path, split="test", seed=None), load_data(f"{path}#images_test", seed=None)):
        assert data.spec.endswith("data.npz#images_test")
        assert data.labels is not None
        assert data.labels.tolist() == [1, 1, 0]
        assert data.fingerprint == f"sha256:{sha256(path)}"
    with pytest.raises(UsageError, match="both #images and split 'test' were given"):
        load_data(f"{path}#images", split="test")
    with pytest.raises(UnknownName, match=r"array in data\.npz: 'images_tst'; did you mean 'images_test'"):
        load_data(f"{path}#images_tst")
    with pytest.raises(DataError, match=r"holds no split 'val', but test\. Say which with split="):
        load_data(path, split="val")


def test_upper_case_units_and_other_names_are_found(tmp_path: Path) -> None:
    data = load_data(npz(tmp_path, X_uV=np.zeros((4, 6), np.int16), Y=[1, 0, 1, 0]), seed=None)
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0, 1, 0]
    path = npz(tmp_path, x_train=np.zeros((4, 6)), x_test=np.zeros((2, 6)), y_train=[0] * 4, y_test=[1] * 2)
    with pytest.raises(DataError, match=r"several splits: test, train\. Say which"):
        load_data(path)
    assert load_data(path, split="test").count == 2
    with pytest.raises(
        DataError, match=r"holds pictures, more; none is called images or x\. Say which with data\.npz#"
    ):
        load_data(npz(tmp_path, pictures=noise(2, 8, 8, 3), more=np.zeros(3)))
    with pytest.raises(DataError, match=r"none is called images or x with _b behind it"):
        load_data(npz(tmp_path, pictures=noise(2, 8, 8, 3)), split="b")


def test_labels_of_a_split_are_never_those_of_another(tmp_path: Path) -> None:
    path = npz(tmp_path, images=noise(3, 8, 8, 3), labels=[0, 1, 2], images_test=noise(3, 8, 8, 3))
    data = load_data(path, split="test")
    assert data.labels is None
    assert "no labels: none of labels_test, y_test, targets_test, target_test, label_test is in the file" in data.notes
    assert len(next(iter(data.batches))) == 1


def test_labels_by_another_name_or_not_at_all(tmp_path: Path) -> None:
    path = npz(tmp_path, images=noise(3, 8, 8, 3), labels=[0, 1, 2], domain=[2, 2, 0])
    data = load_data(path, labels="domain", seed=None)
    assert data.labels is not None
    assert data.labels.tolist() == [2, 2, 0]
    assert load_data(path, labels=None).labels is None
    with pytest.raises(UnknownName, match=r"array in data\.npz: 'domains'; did you mean 'domain'"):
        load_data(path, labels="domains")


def test_kinds_of_labels(tmp_path: Path) -> None:
    def read(labels: Any, **more: Any) -> Dataset:
        return load_data(npz(tmp_path, images=noise(3, 8, 8, 3), labels=labels, **more), seed=None)

    def values(data: Dataset) -> list[Any]:
        assert data.labels is not None
        found: list[Any] = data.labels.tolist()
        return found

    named = read(["dog", "cat", "dog"])
    assert values(named) == [1, 0, 1]
    assert named.classes == ("cat", "dog")
    assert "labels are names, numbered in sorted order: cat, dog" in named.notes
    assert values(read(["dog", "cat", "dog"], classes=["dog", "cat"])) == [0, 1, 0]
    assert values(read(np.array([[0], [2], [1]], np.uint8))) == [0, 2, 1]
    assert values(read([1.0, 0.0, 2.0])) == [1, 0, 2]
    regression = read([0.5, 1.5, 2.0])
    assert values(regression) == [0.5, 1.5, 2.0]
    assert "labels are numbers to predict, not classes" in regression.notes
    assert values(read(np.eye(3, dtype=int))) == np.eye(3).tolist()
    with pytest.raises(DataError, match=r"images holds 3 samples, labels 2\. Give one label for each"):
        read([0, 1])
    with pytest.raises(DataError, match=r"images holds 3 samples, labels one\."):
        read(7)
    with pytest.raises(DataError, match=r"labels holds NaN or infinity"):
        read([0.0, np.nan, 1.0])
    with pytest.raises(DataError, match=r"labels is of type complex128\. Labels are whole numbers"):
        read(np.zeros(3, complex))
    with pytest.raises(DataError, match=r"lies between 1 and 3, but there are 3 classes\. Number them from 0"):
        read([1, 2, 3], classes=["a", "b", "c"])


def test_a_lone_array_has_no_names_to_pick(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(3, 8, 8, 3))
    assert load_data(tmp_path / "a.npy").count == 3
    with pytest.raises(DataError, match=r"a\.npy holds one array without a name; #test cannot be picked"):
        load_data(tmp_path / "a.npy", split="test")


def test_a_hash_in_a_file_name_is_no_key(tmp_path: Path) -> None:
    npz(tmp_path, images=noise(3, 8, 8, 3)).rename(tmp_path / "a#1.npz")
    assert load_data(tmp_path / "a#1.npz").count == 3


# ── folders ──


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for k, name in enumerate(("cat", "dog")):
        (root / name / "more").mkdir(parents=True)
        for n in range(3):
            Image.fromarray(noise(8, 8, 3, seed=10 * k + n)).save(root / name / f"{n}.png")
    Image.fromarray(noise(8, 8, 3, seed=99)).save(root / "dog" / "more" / "deep.JPG")
    return root


def test_class_folders_give_labels_in_sorted_order(folder: Path) -> None:
    data = load_data(folder, seed=None, batch_size=4)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.classes == ("cat", "dog")
    assert data.notes == ("labels are the 2 class folders in sorted order: cat, dog", "pixels / 255")
    assert torch.equal(inputs(data)[3], torch.from_numpy(noise(8, 8, 3, seed=10)).permute(2, 0, 1) / 255)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.batches, data.batches, strict=True))
    assert load_data(folder, labels=None).labels is None
    turned = load_data(folder, seed=None, classes=["dog", "cat"])
    assert turned.labels is not None
    assert turned.labels.tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_flat_folder_has_no_labels(folder: Path) -> None:
    data = load_data(folder / "cat", preprocessing=RGB)
    (folder / "cat" / "more").rmdir()
    assert data.labels is None
    assert data.classes is None
    assert data.count == 3
    assert "no class folders, hence no labels" in data.notes
    assert inputs(data).shape == (3, 3, 8, 8)


def test_the_fingerprint_covers_names_and_sizes(folder: Path) -> None:
    before = load_data(folder).fingerprint
    assert before == load_data(folder, seed=3, limit=2).fingerprint
    assert before.startswith("sha256 of names and sizes:")
    (folder / "cat" / "0.png").rename(folder / "cat" / "5.png")
    assert load_data(folder).fingerprint != before


def test_hidden_and_other_files_are_left_out_and_counted(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / "__MACOSX").mkdir()
    (folder / "cat" / ".DS_Store").write_bytes(b"")
    (folder / "cat" / "._0.png").write_bytes(b"not an image")
    (folder / "cat" / "notes.txt").write_bytes(b"")
    (folder / "README").write_bytes(b"")
    data = load_data(folder)
    assert data.count == 7
    assert "left out what is no image: 1 .txt, 1 without suffix" in data.notes


def test_links_in_a_circle_end(folder: Path) -> None:
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere")
    data = load_data(folder)
    assert data.count == 7
    assert "left out what is no image: 1 .png, 1 link in a circle" in data.notes
    (folder / "cat" / "up").unlink()
    (folder / "eel").symlink_to(folder / "dog")
    assert load_data(folder).count == 7 + 4, "a link that closes no circle is a folder like any other"


def test_links_that_lead_to_themselves_are_counted(folder: Path) -> None:
    (folder / "cat" / "loop.png").symlink_to("loop.png")
    (folder / "dog" / "here").symlink_to("there")
    (folder / "dog" / "there").symlink_to("here")
    data = load_data(folder)
    assert data.count == 7
    assert "left out what is no image: 3 link in a circle" in data.notes


def test_folders_that_link_to_each_other_are_walked_in_time(tmp_path: Path) -> None:
    """Every path through twelve such folders is 12! / e long walks; here each is read by itself and by one link."""
    names = [f"ward{k:02d}" for k in range(12)]
    for k, name in enumerate(names):
        (tmp_path / name).mkdir()
        Image.fromarray(noise(8, 8, 3, seed=k)).save(tmp_path / name / "0.png")
        for other in names:
            if other != name:
                (tmp_path / name / other).symlink_to(f"../{other}")
    data = load_data(tmp_path)
    assert data.classes == tuple(names)
    assert 12 * 12 <= data.count < 12 * 12 * 3
    assert any("link in a circle" in note for note in data.notes)


def test_a_large_folder_is_listed_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million files open in the same way, some 200 bytes a name: docs/platforms.md has the measurement."""
    for part in range(4):
        (tmp_path / f"class{part}").mkdir()
        Image.fromarray(noise(8, 8, 3, seed=part)).save(tmp_path / f"class{part}" / "0.png")
        for k in range(1, 2500):
            os.link(tmp_path / f"class{part}" / "0.png", tmp_path / f"class{part}" / f"{k}.png")
    opened = []
    look = Decoder._open
    monkeypatch.setattr(Decoder, "_open", lambda self, source: opened.append(source) or look(self, source))
    tracemalloc.start()
    data = load_data(tmp_path, batch_size=16)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert data.count == 10_000
    assert held < 300 * data.count
    assert len(opened) <= LOOKED
    next(iter(data.batches))
    assert len(opened) <= LOOKED + 16


def test_class_folders_without_images_are_named(folder: Path) -> None:
    (folder / "eel").mkdir()
    (folder / "fox" / "deep").mkdir(parents=True)
    with pytest.raises(DataError, match=r"2 of 4 class folders hold no images: eel, fox\. Fill them or remove them"):
        load_data(folder)


def test_images_beside_class_folders_are_refused(folder: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(folder / "stray.png")
    with pytest.raises(DataError, match=r"holds 1 images beside 2 class folders\. Move them"):
        load_data(folder)


def test_a_folder_without_images_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images \(\.bmp, .*\); found: nothing else"):
        load_data(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no images .*; found: 1 \.txt"):
        load_data(tmp_path)


def test_splits_are_chosen_and_never_taken_for_classes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    folder.rename(tmp_path / "all" / "train")
    (tmp_path / "all" / "val").mkdir()
    with pytest.raises(DataError, match=r"holds the splits train, val\. Say which with split="):
        load_data(tmp_path / "all")
    assert load_data(tmp_path / "all", split="train").classes == ("cat", "dog")
    with pytest.raises(UnknownName, match=r"subfolder of .*all: 'trian'; did you mean 'train'"):
        load_data(tmp_path / "all", split="trian")


@pytest.mark.parametrize("preprocessing", [None, RGB])
def test_a_truncated_image_is_named_when_its_batch_is_read(folder: Path, preprocessing: Preprocessing | None) -> None:
    path = folder / "dog" / "more" / "deep.JPG"
    path.write_bytes(path.read_bytes()[:-30])
    data = load_data(folder, preprocessing=preprocessing)
    with pytest.raises(DataError, match=r"deep\.JPG cannot be read as an image \(image file is truncated"):
        list(data.batches)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_what_only_claims_to_be_an_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "cat" / "0.png").write_bytes(content)
    with pytest.raises(
        DataError, match=r"0\.png cannot be read as an image \(cannot identify .*Replace it, or move it"
    ):
        load_data(folder)


def test_an_image_too_large_to_be_one_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"cannot be read as an image \(Image size .* decompression bomb"):
        load_data(folder)


def test_modes_are_converted_and_said(tmp_path: Path) -> None:
    grey = noise(8, 8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "0-grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "1-sixteen.png")
    Image.fromarray(np.concatenate([rgb, noise(8, 8, 1)], axis=2)).save(tmp_path / "2-alpha.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "3-palette.png", transparency=bytes(256))
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "4-int32.tif")
    Image.fromarray(rgb).save(tmp_path / "5-rgb.png")
    data = load_data(tmp_path, seed=None)
    x = inputs(data)
    assert torch.allclose(x, x[5].expand_as(x))
    assert "images converted to RGB (of 6 looked at: 1 I, 1 I;16, 1 L, 1 P, 1 RGBA)" in data.notes
    x = inputs(load_data(tmp_path, seed=None, preprocessing=GREY))
    assert x.shape == (6, 1, 8, 8)
    assert torch.allclose(x, x[0].expand_as(x), atol=1e-6)


def test_images_of_real_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"a\.tif cannot be read as an image \(its values lie between .* not in 8 or 16"
    ):
        list(load_data(tmp_path).batches)


def test_sizes_that_differ_need_a_model_that_says_its_own(folder: Path) -> None:
    Image.fromarray(noise(9, 12, 3)).save(folder / "cat" / "0.png")
    with pytest.raises(DataError, match=r"0\.png is 3 × 9 × 12, others are 3 × 8 × 8\. Resize them, or give a model"):
        list(load_data(folder).batches)
    assert inputs(load_data(folder, preprocessing=RGB)).shape == (7, 3, 8, 8)


def test_a_model_of_other_channels_cannot_take_images(folder: Path) -> None:
    five = Preprocessing(input_size=(5, 8, 8), mean=(0.0,) * 5, std=(1.0,) * 5)
    with pytest.raises(DataError, match=r"the model takes 5 channels; image files give 1 or 3\. Use arrays"):
        load_data(folder, preprocessing=five)


def test_a_folder_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object = ".") -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"photos cannot be read \(Permission denied\)\. Mend its permissions"):
        load_data(folder)


def test_images_need_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtra, match=r'reading images needs PIL, .*"renorm\[images\]"'):
        load_data(folder)


# ── digits, names, real data ──


def test_digits_come_whole_or_in_two_parts_that_share_nothing() -> None:
    whole, train, target = (load_data("digits", split=split) for split in ("", "train", "target"))
    assert (whole.count, train.count, target.count) == (1797, 1000, 797)
    assert whole.classes == tuple("0123456789")
    x = inputs(whole)
    assert x.shape == (1797, 1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)
    one, two = ({image.numpy().tobytes() for image in inputs(part)} for part in (train, target))
    assert not one & two
    assert target.notes[0] == "split target: 797 of 1,797, drawn at random once and for all"
    assert inputs(load_data("digits", preprocessing=RGB, limit=5)).shape == (5, 3, 8, 8)
    assert load_data("digits", labels=None).labels is None
    with pytest.raises(UnknownName, match="no split of digits 'trian'; did you mean 'train'"):
        load_data("digits", split="trian")


def test_names_of_no_known_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere\. Correct the path, or use an image"):
        load_data(tmp_path / "nowhere")
    (tmp_path / "a.mat").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.mat is no data that renorm reads\. Use an image folder, \.npz"):
        load_data(tmp_path / "a.mat")
    for name in ("a.csv", "a.csv.gz", "a.parquet", "y" * 5000, "y" * 5000 + ".csv", "a\0b"):
        with pytest.raises(DataError, match="there is no file or folder"):
            load_data(name)


# ── groups ──


def test_groups_of_an_archive_are_one_of_its_arrays(tmp_path: Path) -> None:
    where = np.array(["north", "south", "south", "east"])
    path = npz(tmp_path, images=noise(4, 8, 8, 3), labels=[0, 1, 0, 1], where=where, camera=[3, 1, 1, 2])
    data = load_data(path, group="where")
    assert data.groups == tuple(where[data.order])
    assert load_data(path, group="camera", seed=None).groups == ("3", "1", "1", "2")
    assert load_data(path).groups is None
    assert len(load_data(path, group="where", limit=2).groups or ()) == 2
    with pytest.raises(UnknownName, match=r"array in data\.npz: 'wheree'; did you mean 'where'"):
        load_data(path, group="wheree")
    with pytest.raises(DataError, match=r"images holds 4 samples, the groups images have the shape \(4, 8, 8, 3\)"):
        load_data(path, group="images")
    with pytest.raises(UsageError, match=r"digits have no groups, and --group where was asked for"):
        load_data("digits", group="where")


def test_groups_of_an_image_folder_are_the_folders_at_a_level(folder: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for k in range(2):
            (folder / name / f"hospital-{k}").mkdir()
            Image.fromarray(noise(8, 8, 3, seed=k)).save(folder / name / f"hospital-{k}" / "a.png")
        for file in folder.glob(f"{name}/*.png"):
            file.rename(folder / name / "hospital-0" / f"b{file.name}")
    (folder / "dog" / "more").rename(folder / "dog" / "hospital-2")
    (folder / "cat" / "more").rmdir()
    by_class = load_data(folder, group="2", seed=None)
    assert by_class.classes == ("cat", "dog")
    assert by_class.groups is not None
    assert sorted(set(by_class.groups)) == ["hospital-0", "hospital-1", "hospital-2"]
    by_group = load_data(folder, group="1", seed=None)
    assert by_group.classes == ("hospital-0", "hospital-1", "hospital-2")
    assert set(by_group.groups or ()) == {"cat", "dog"}
    assert by_group.labels is not None
    assert by_group.labels.tolist() == [int(name[-1]) for name in by_class.groups]
    for level in ("hospital", "0", "-1"):
        with pytest.raises(
            UsageError, match=rf"the folders at a level: --group 1 for photos/GROUP/CLASS/.*got '{level}'"
        ):
            load_data(folder, group=level)
    with pytest.raises(DataError, match=r"at level 3, but 11 of 11 images lie above it, cat/hospital-0/a\.png first"):
        load_data(folder, group="3")
    flat = load_data(folder / "cat", group="1")
    assert flat.labels is None
    assert set(flat.groups or ()) == {"hospital-0", "hospital-1"}


def test_a_real_model_is_as_good_as_known_on_real_data() -> None:
    model = open_model(f"{shared('nets.py')}:resnet20", checkpoint=shared("weights/resnet20-12fca82f.th"))
    data = load_data(shared("cifar10_lossless_test200.npz"), preprocessing=model.preprocessing, batch_size=100)
    with torch.no_grad():
        right = sum(int((model.module(x).argmax(1) == y).sum()) for x, y in data.batches)
    assert right / data.count == 0.900  # the figure of the data's own README


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("gas_drift.npz", (5933, 128), 6),
        ("ecg_ds1.npz", (51002, 126), 5),
        ("usps.npz#images", (11000, 1, 16, 16), 10),
        ("mnist15k.npz#images_test", (3000, 1, 28, 28), 10),
    ],
)
def test_real_archives_open_without_options(name: str, shape: tuple[int, ...], classes: int) -> None:
    path = shared(name.partition("#")[0])
    data = load_data(f"{path}#{name.partition('#')[2]}" if "#" in name else path, batch_size=8)
    assert (data.count, *next(iter(data.batches))[0].shape[1:]) == shape
    assert data.labels is not None
    assert data.classes is not None
    assert len(data.classes) == classes


def test_reading_imports_no_extra_for_arrays(tmp_path: Path) -> None:
    path = npz(tmp_path, images=noise(4, 8, 8, 3))
    code = (
        "import sys; from renorm.datasets import load_data; list(load_data(sys.argv[1]).batches); "
        "print({'PIL', 'timm', 'torchvision', 'sklearn', 'pandas'} & {n.partition('.')[0] for n in sys.modules})"
    )
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_a_zip_that_holds_no_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(DataError, match=r"a\.npz holds hello\.txt; none is called images or x"):
        load_data(tmp_path / "a.npz")
