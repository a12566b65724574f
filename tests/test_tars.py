"""WebDataset's shards: samples by name, labels and groups beside them, read in place; what is torn or hostile is named."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from renorm.datasets import load_data, tars
from renorm.errors import DataError, MissingExtra, UsageError
from renorm.preprocessing import Preprocessing

RGB = Preprocessing(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def pixels(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels(seed)).save(held, "png")
    return held.getvalue()


def shard(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def samples(numbers: range) -> Iterator[tuple[str, bytes]]:
    for k in numbers:
        yield f"photos/{k:05d}.png", png(k)
        yield f"photos/{k:05d}.cls", f"{k % 3}\n".encode()
        yield f"photos/{k:05d}.json", json.dumps({"hospital": f"h{k % 2}", "kind": "cat dog".split()[k % 2]}).encode()


def test_samples_of_several_shards_are_read_in_any_order(tmp_path: Path) -> None:
    shard(tmp_path / "s-000.tar", list(samples(range(4))))
    shard(tmp_path / "s-001.tar", list(samples(range(4, 7))))
    for spec in (f"{tmp_path}/s-{{000..001}}.tar", f"{tmp_path}/s-*.tar"):
        data = load_data(spec, group="hospital", batch_size=3)
        assert data.count == 7
        assert data.labels is not None
        assert data.labels.tolist() == [k % 3 for k in data.order]
        assert data.groups == tuple(f"h{k % 2}" for k in data.order)
        wanted = torch.stack([torch.from_numpy(pixels(k)).permute(2, 0, 1) / 255 for k in data.order])
        assert torch.equal(torch.cat([x for x, _ in data.batches]), wanted)
        assert data.fingerprint.startswith("sha256 of names and sizes:")
    assert load_data(spec, limit=3).count == 3
    assert next(iter(load_data(spec, preprocessing=RGB).batches))[0].shape == (7, 3, 8, 8)
    assert load_data(spec, labels=None).labels is None


def test_labels_by_an_entry_of_the_json_by_name_or_none(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", list(samples(range(4))))
    named = load_data(str(path), labels="kind", seed=None)
    assert named.classes == ("cat", "dog")
    assert named.labels is not None
    assert named.labels.tolist() == [0, 1, 0, 1]
    bare = shard(tmp_path / "b.tar", [(f"{k}.jpg", png(k)) for k in range(3)])
    data = load_data(str(bare))
    assert data.labels is None
    assert any(note.startswith("no labels: no sample has a .cls") for note in data.notes)


def test_what_is_no_image_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [*samples(range(3)), ("readme.txt", b"hello"), (".hidden", b""), ("photos/._00000.png", b"junk")]
    with tarfile.open(shard(tmp_path / "a.tar", members), "a") as tar:
        link = tarfile.TarInfo("photos/evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = load_data(str(tmp_path / "a.tar"))
    assert data.count == 3
    assert "1 of 4 samples hold no image: left out" in data.notes


def test_the_same_name_in_another_shard_is_another_sample(tmp_path: Path) -> None:
    for name in "ab":
        shard(tmp_path / f"{name}.tar", [("0.png", png(ord(name)))])
    assert load_data(f"{tmp_path}/*.tar").count == 2


def test_shards_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    def refused(message: str, spec: object, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            list(load_data(str(spec), **options).batches)

    refused(r"there is no file .*s-001\.tar\. Correct the path, or the pattern", f"{tmp_path}/s-{{001..002}}.tar")
    refused(r"there is no file .*\*\.tar", f"{tmp_path}/*.tar")
    with pytest.raises(UsageError, match=r"counts down: \{3\.\.1\} names no shard\. Write \{1\.\.3\}"):
        load_data(f"{tmp_path}/s-{{3..1}}.tar")
    with pytest.raises(UsageError, match=r"names 10000000000 shards\. Give a pattern of 1000000 at most"):
        load_data(f"{tmp_path}/s-{{0..99999}}-{{00000..99999}}.tar")
    good = shard(tmp_path / "good.tar", list(samples(range(3))))
    with pytest.raises(UsageError, match=r"shards have no splits, and 'test' was asked for"):
        load_data(str(good), split="test")
    refused(r"3 of 3 samples have no label \(\.nosuch or \.json\), photos/00000 first", good, labels="nosuch")
    refused(r"3 of 3 samples have no group \(\.ward or \.json\), photos/00000 first", good, group="ward")
    some = [(f"{k}.png", png(k)) for k in range(3)] + [("3.png", png(3)), ("3.cls", b"1")]
    refused(
        r"3 of 4 samples have no label \(\.cls, and no target or label in a \.json\), 0 first",
        shard(tmp_path / "some.tar", some),
    )
    refused(r"holds no images \(.*\); found: 1 \.txt", shard(tmp_path / "text.tar", [("a.txt", b"")]))
    refused(r"holds no images .*found: nothing", shard(tmp_path / "empty.tar", []))
    refused(
        r"packed\.tgz is compressed, and could be read from front to back only\. Unpack it first: gunzip",
        shard(tmp_path / "packed.tgz", list(samples(range(2))), "w:gz"),
    )
    (tmp_path / "junk.tar").write_bytes(b"no tar at all" * 100)
    refused(r"junk\.tar is damaged, or no \.tar file", tmp_path / "junk.tar")
    torn = tmp_path / "torn.tar"
    torn.write_bytes(good.read_bytes()[: 512 + 100])
    refused(r"torn\.tar is damaged, or no \.tar file", torn)
    refused(r"a\.json is no JSON", shard(tmp_path / "j.tar", [("a.png", png(0)), ("a.json", b"{")]), group="x")
    bad = shard(tmp_path / "bad.tar", [("a.png", png(0)), ("b.png", png(1)[:80])])
    refused(r"bad\.tar: b\.png cannot be read as an image", bad)


def test_a_label_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "LARGEST", 4)
    path = shard(tmp_path / "a.tar", [("a.png", png(0)), ("a.cls", b"1" * 100), ("a.json", b'{"label": 1}')])
    assert load_data(str(path)).labels is None


def test_shards_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtra, match=r'reading images needs PIL, .*"renorm\[images\]"'):
        load_data(str(shard(tmp_path / "a.tar", list(samples(range(2))))))
