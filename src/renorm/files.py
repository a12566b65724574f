"""Output files: complete or absent, and never over a file that stands there already unless told so."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from renorm.errors import FileExists, UsageError

__all__ = ["refuse_existing", "sha256", "writing"]


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
        FileExists, UsageError: as `refuse_existing`, and when the folder cannot be written to.
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
    finally:
        temporary.unlink(missing_ok=True)


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
