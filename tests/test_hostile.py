"""What strangers' files hold: each input by itself from the command line ends in one short message, and leaves no file."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from renorm.cli import main

NETS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def table():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
"""
TABLE = "a,b,y\n" + "\n".join(f"{k},{2 * k},{k % 2}" for k in range(20))


def photos(folder: str = "photos", size: tuple[int, int] = (16, 16)) -> Path:
    for name in ("cat", "dog"):
        (Path(folder) / name).mkdir(parents=True)
        for k in range(4):
            picture(size, seed=k).save(Path(folder) / name / f"{k}.png")
    return Path(folder)


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def png(width: int, height: int) -> bytes:
    """A picture whose header says one size and whose data are nothing of the kind."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def odd(name: str, content: bytes) -> Callable[[], str]:
    def make() -> str:
        folder = photos()
        (folder / "cat" / name).write_bytes(content)
        return "photos"

    return make


def other_size() -> str:
    picture((20, 30)).save(photos() / "cat" / "large.png")
    return "photos"


def real_numbers() -> str:
    values = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    Image.fromarray(values).save(photos() / "cat" / "heights.tif")
    return "photos"


def file(name: str, content: bytes) -> Callable[[], str]:
    def make() -> str:
        Path(name).write_bytes(content)
        return name

    return make


def table(content: str = TABLE) -> Callable[[], str]:
    return file("t.csv", content.encode())


def arrays() -> str:
    np.savez("a.npz", images=np.zeros((4, 16, 16, 3), np.uint8), labels=np.zeros(4, int))
    return "a.npz"


def terabytes() -> str:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6)})
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    return "a.npz"


def device_in_a_tar() -> str:
    with tarfile.open("s.tar", "w") as shard:
        for name, kind in (("a.png", tarfile.CHRTYPE), ("b.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            shard.addfile(member)
    return "s.tar"


def plain(name: str) -> Callable[[], str]:
    return lambda: name


CASES: dict[str, tuple[Callable[[], str], tuple[str, ...], str]] = {
    "damaged image": (odd("x.png", b"no image"), (), r"photos/cat/x\.png cannot be read as an image"),
    "empty image": (odd("x.jpg", b""), (), r"photos/cat/x\.jpg cannot be read as an image"),
    "3,600 megapixels": (
        odd("x.png", png(60_000, 60_000)),
        (),
        r"x\.png cannot be read as an image .*decompression bomb",
    ),
    "100 megapixels, of nothing": (odd("x.png", png(10_000, 10_000)), (), r"x\.png cannot be read as an image"),
    "sizes": (other_size, (), r"images differ in shape: photos/cat/large\.png is 3 × 20 × 30"),
    "real numbers": (real_numbers, (), r"heights\.tif cannot be read as an image \(its values lie between"),
    "groups of a folder": (
        lambda: str(photos()),
        ("--group", "hospital"),
        r"the groups of an image folder are the folders",
    ),
    "groups of digits": (
        plain("digits"),
        ("--group", "hospital"),
        r"digits have no groups, and --group hospital was asked",
    ),
    "groups of arrays": (arrays, ("--group", "hospital"), r"no array in a\.npz: 'hospital'\. Known: images, labels"),
    "groups of a table": (
        table(),
        ("--group", "hospital", "--labels", "y"),
        r"no column of t\.csv: 'hospital'. Known: a, b, y",
    ),
    "labels of a table": (table(), ("--labels", "target"), r"there is no column of t\.csv: 'target'\. Known: a, b, y"),
    "inputs of a table": (table(), ("--inputs", "text"), r"there is no column of t\.csv: 'text'\. Known: a, b, y"),
    "empty table": (table(""), (), r"t\.csv cannot be read as a table"),
    "ragged table": (table("a,b\n1,2\n1,2,3\n"), (), r"t\.csv cannot be read as a table .*line 3, saw 3"),
    "bytes as a table": (file("t.csv", bytes(range(256)) * 9), (), r"t\.csv cannot be read as a table"),
    "terabytes": (terabytes, (), r"a\.npz: images does not fit into memory, or its header lies"),
    "long header": (
        file("a.npy", b"\x93NUMPY\x01\x00\x60\xea" + b"(" * 60_000),
        (),
        r"a\.npy is damaged, or no NumPy file",
    ),
    "torn parquet": (file("t.parquet", b"PAR1nothingPAR1"), (), r"t\.parquet is damaged, or no parquet file"),
    "no tar": (file("s.tar", b"nothing" * 999), (), r"s\.tar is damaged, or no \.tar file"),
    "devices in a tar": (device_in_a_tar, (), r"s\.tar holds no images"),
    "shards without end": (
        plain("s-{0..999999999999}.tar"),
        (),
        r"names 1000000000000 shards\. Give a pattern of 1000000",
    ),
    "hub: no name": (plain("hf:"), (), r"hf: names no data set"),
    "hub: not in the cache": (
        plain("hf:org/nosuch"),
        (),
        r"hf:org/nosuch could not be opened: .*only what is in the cache",
    ),
    "hub: no such name": (plain("hf:../../☃ ?"), (), r"could not be opened"),
    "hub: 5,000 letters": (plain("hf:" + "y" * 5000), (), r"could not be opened: \w+"),
    "5,000 letters": (plain("y" * 5000), (), r"there is no file or folder y+\. Correct the path"),
    "a zero byte": (plain("a\0b"), (), r"there is no file or folder a\0b"),
    "a device": (plain(os.devnull), (), r"is no data that renorm reads"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_said_on_one_screen_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if case.startswith("hub: ") and case != "hub: no name":
        pytest.importorskip("datasets")
    Path("nets.py").write_text(NETS)
    make, options, message = CASES[case]
    data = make()
    before = sorted(tmp_path.rglob("*"))
    model = "nets.py:table" if data.endswith((".csv", ".parquet")) else "nets.py:net"
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as a user has it: what libraries warn of is said, in a line each
        code = main(["recalibrate", model, data, "-o", "new.safetensors", "--quiet", *options])
    out, said = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert said.startswith("renorm: ")
    assert len(said.splitlines()) <= 24
    assert "Traceback" not in said
    assert re.search(message, said), said
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind, whole or half"


def test_modes_of_all_kinds_go_through_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    folder = photos() / "cat"
    colours = picture()
    for mode in ("L", "LA", "P", "RGBA", "1"):
        colours.convert(mode).save(folder / f"mode-{mode}.png")
    colours.convert("P").save(folder / "clear.png", transparency=0)
    colours.convert("CMYK").save(folder / "print.jpg")
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    colours.save(folder / "moving.gif", save_all=True, append_images=[picture(seed=1)])
    if sys.platform != "win32":
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "up").symlink_to("..")
        (folder / "gone.png").symlink_to("nowhere.png")
    assert main(["recalibrate", "nets.py:net", "photos", "-o", "new.safetensors", "--quiet"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Recalibrated on 17 samples" in said
    assert "images converted to RGB (of 17 looked at: 1 1, 1 CMYK, 1 I;16, 1 L, 1 LA, 3 P, 1 RGBA)" in said
    assert sys.platform == "win32" or "left out what is no image: 1 .png, 2 link in a circle" in said
    assert Path("new.safetensors").exists()


def test_json_is_utf8_whatever_the_terminal_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    photos("Röntgen · 肺")
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="latin-1"))
    assert main(["doctor", "nets.py:net", "Röntgen · 肺", "--format", "json", "--quiet", "--fail-on", "never"]) == 0
    assert json.loads(held.getvalue().decode("utf-8"))["data"] == "Röntgen · 肺"
