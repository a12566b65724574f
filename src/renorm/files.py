"""Output files: complete or absent, and never over a file that stands there already unless told so."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from renorm.errors import FileExists, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["claimed", "is_held", "lock", "no_room", "refuse_existing", "sha256", "writing"]

HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what flock, and Windows' locking, say of another's lock
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# libraries hide the system's error in their own: safetensors its number, torch.save all but where in its own code it failed
WRAPPED = re.compile(rf"os error ({'|'.join(map(str, FULL))})\b|inline_container|iostream error|No space left")


def refuse_existing(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return `path` if a file may be written there; nothing is created. Call it before the work starts.

    Raises:
        FileExists: a file stands there and `force` is not given.
        UsageError: the folder is missing, no file can have that name, or a folder, device or pipe stands there.
    """
    target = Path(path)
    try:
        os.lstat(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, or with a zero byte in it
        raise _cannot(target, error) from error
    if not os.path.isdir(target.parent):
        raise UsageError(f"cannot write {target}: there is no folder {target.parent}. Create it, or correct the path.")
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "not a regular file"
        raise UsageError(f"cannot write {target}: it is {kind}. Give the name of a file.")
    if os.path.lexists(target) and not force:
        raise FileExists(f"{target} stands there already. Give another name, or --force (force=True) to write over it.")
    return target


@contextmanager
def writing(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path with the same suffix beside `path`; it becomes `path` when the block succeeds.

    On any failure, Ctrl-C included, the temporary file is removed and `path` is as it was.

    Raises:
        FileExists, UsageError: as `refuse_existing`, and when the folder cannot be written to or the disk is full.
    """
    target = refuse_existing(path, force=force)
    temporary = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        # Created by hand and not by tempfile, whose files nobody else could read.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _cannot(target, error) from error
    try:
        yield temporary
        _flush(temporary)
        _put(temporary, target, force)
    except Exception as error:
        if not no_room(error):
            raise
        said = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write {target}: {said}. Make room, or give a name on another disk.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process that asks for the same may write to `path`: for work that would be lost at its end.

    Raises:
        UsageError: another process has claimed it.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name[:64]}.lock")
    while True:
        try:
            file = beside.open("a")
        except OSError as error:
            raise _cannot(target, error) from error
        try:
            lock(file)
        except OSError as error:
            if is_held(error):
                file.close()
                raise UsageError(
                    f"another process is at work on {target}; let it finish, or give another name."
                ) from error
        if beside.exists() and os.path.samestat(os.fstat(file.fileno()), beside.stat()):
            break
        file.close()  # whoever had it took it away meanwhile
    try:
        yield
    finally:
        if sys.platform == "win32":
            file.close()  # or it cannot be taken away
        beside.unlink(missing_ok=True)
        file.close()


def lock(file: IO[str]) -> None:
    """Lock for as long as the file is open; OSError where that cannot be, and `is_held` where another process has it."""
    if sys.platform == "win32":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(error: OSError) -> bool:
    """Whether `lock` failed since another process has the lock, and not on a file system that knows none."""
    return error.errno in HELD


def no_room(error: BaseException) -> bool:
    """Whether the disk, or what one may use of it, is full: also as safetensors and torch.save say it."""
    return error.errno in FULL if isinstance(error, OSError) else bool(WRAPPED.search(str(error)))


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; read in pieces, so that its size does not matter."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot(target: Path, error: OSError | ValueError) -> UsageError:
    return UsageError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}. Give another name.")


def _flush(path: Path) -> None:
    # Without this a power cut soon after the rename may leave the new name on an empty file.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(temporary: Path, target: Path, force: bool) -> None:
    if force:
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, refuses a file that came while the block ran
    except FileExistsError:
        refuse_existing(target)
    except OSError:  # a file system without hard links
        os.replace(temporary, refuse_existing(target))
