"""files: an output is complete or absent, and nothing is written over without being told."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from renorm import files
from renorm.errors import FileExists, UsageError
from renorm.files import claimed, no_room, refuse_existing, sha256, writing


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


# ── a full disk ──


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes inside: what a full disk looks like to whoever writes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: path.write_bytes(bytes(1 << 16)),
    "safetensors": lambda path: save_file({"a": torch.zeros(1 << 14)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(1 << 14)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_and_leaves_nothing(writer: str, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    with (
        pytest.raises(UsageError, match=r"cannot write .*out\.pt: .*\. Make room, or give a name on another disk"),
        room_for(4096),
        writing(out) as temporary,
    ):
        WRITERS[writer](temporary)
    assert os.listdir(tmp_path) == []
    with writing(out) as temporary:
        WRITERS[writer](temporary)
    assert os.listdir(tmp_path) == ["out.pt"]


def test_what_is_no_full_disk_is_not_taken_for_one(tmp_path: Path) -> None:
    assert not no_room(FileNotFoundError(errno.ENOENT, "No such file"))
    assert not no_room(RuntimeError("os error 280"))
    with pytest.raises(FileNotFoundError, match="an image"), writing(tmp_path / "out.pt"):
        raise FileNotFoundError(errno.ENOENT, "an image")


# ── one process at a time ──


CLAIM = """
import sys
from renorm.files import claimed
with claimed(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_an_output_that_another_process_is_at_work_on_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLAIM, str(out)], **pipes) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UsageError, match=r"another process is at work on .*out\.pt; let it finish"), claimed(out):
            pass
        with claimed(tmp_path / "other.pt"):
            pass
        other.kill()
    assert os.listdir(tmp_path) == [".out.pt.lock"], "of a process that was killed"
    with claimed(out):
        out.touch()
    assert os.listdir(tmp_path) == ["out.pt"]


def test_a_lock_that_its_owner_takes_away_meanwhile_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[int] = []

    def lock(file: Any) -> None:
        locks.append(file.fileno())
        if len(locks) == 1:
            (tmp_path / ".out.pt.lock").unlink()

    monkeypatch.setattr(files, "lock", lock)
    with claimed(tmp_path / "out.pt"):
        assert len(locks) == 2
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_locked_or_made_it_is_as_before_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with (
        pytest.raises(UsageError, match=r"cannot write .*out\.pt: No such file or directory"),
        claimed(tmp_path / "none" / "out.pt"),
    ):
        pass
    monkeypatch.setattr(files, "lock", refuse)
    with claimed(tmp_path / "out.pt"):
        pass
    assert os.listdir(tmp_path) == []
