"""files: an output is complete or absent, and nothing is written over without being told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from renorm.errors import FileExists, UsageError
from renorm.files import refuse_existing, sha256, writing


def test_the_file_appears_whole_when_the_block_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    with writing(out) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"  # numpy adds a suffix of its own to names without one
        temporary.write_bytes(b"whole")
        assert not out.exists()
    assert out.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_behind_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with writing(tmp_path / "out.pt") as temporary:
            temporary.write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_bytes(b"old")

    def write() -> None:
        with writing(out):
            pytest.fail("the block ran")

    with pytest.raises(FileExists, match=r"out\.pt stands there already\. Give another name, or --force"):
        write()
    assert out.read_bytes() == b"old"


def test_force_writes_over_a_file_and_keeps_it_when_the_block_fails(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_bytes(b"old")
    out.chmod(0o640)

    def fail() -> None:
        with writing(out, force=True) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        fail()
    assert out.read_bytes() == b"old"
    with writing(out, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert out.read_bytes() == b"new"
    assert out.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_came_while_the_block_ran_is_kept(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pt"

    def write() -> None:
        with writing(out) as temporary:
            temporary.write_bytes(b"ours")
            out.write_bytes(b"theirs")

    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(FileExists, match="stands there already"):
        write()
    assert out.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out.pt"]


def test_a_file_system_without_hard_links_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    with writing(tmp_path / "out.pt") as temporary:
        temporary.write_bytes(b"whole")
    assert (tmp_path / "out.pt").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["out.pt"]


def _no_links(*_: object) -> None:
    raise OSError("not supported")


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with writing(tmp_path / "out.pt"):
        pass
    assert (tmp_path / "out.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere\. Create it"):
        refuse_existing(tmp_path / "nowhere" / "out.pt")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot write .*: Not a directory"):
        refuse_existing(tmp_path / "file" / "out.pt")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_or_pipe_is_never_replaced(tmp_path: Path, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is a folder"):
        refuse_existing(tmp_path, force=force)
    with pytest.raises(UsageError, match="it is not a regular file"):
        refuse_existing(tmp_path / "pipe", force=force)


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "out.pt").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExists, match="stands there already"):
        refuse_existing(tmp_path / "out.pt")


@pytest.mark.parametrize(
    "name", ["n" * 300 + ".pt", "zero\0.pt", "o." + "s" * 250], ids=["long", "zero byte", "long suffix"]
)
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    def write() -> None:
        with writing(tmp_path / name) as temporary:
            temporary.write_bytes(b"whole")

    with pytest.raises(UsageError, match="cannot write"):
        write()
    assert os.listdir(tmp_path) == []


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
