"""Image folders: one subfolder per class, or flat; every image is decoded when its batch is asked for."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from renorm.datasets.base import Dataset, Indices, Options, assemble
from renorm.datasets.images import LOOKED, SUFFIXES, Decoder, Source
from renorm.errors import DataError, UnknownName, UsageError, require
from renorm.said import listed, say, some

__all__ = ["read"]

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read(root: Path, options: Options) -> Dataset:
    """The images under `root` (or its subfolder `split`); labels are the sorted names of the class folders.

    Raises:
        DataError: no images, class folders without images, or, when its batch is read, an image that is damaged.
        UnknownName: no such split.
        MissingExtra: Pillow, or timm where the model states its preprocessing, is not installed.
    """
    require("PIL.Image", extra="images", purpose="reading images")
    try:
        root = _split(root, options.split)
        files = _Files(root)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror}). Mend its permissions.") from error
    notes: tuple[str, ...] = ()
    groups, level = _groups(root, files.names, options.group)
    labels, classes, said = _labels(files, level, wanted=options.labels is not None)
    notes += said
    if files.skipped:
        kinds = listed(say("{count} {kind}", count=n, kind=kind) for kind, n in sorted(files.skipped.items()))
        notes += (say("left out what is no image: {kinds}", kinds=kinds),)
    decode = Decoder(options.preprocessing)

    def fetch(indices: Indices) -> Tensor:
        return decode(sources(indices))

    def sources(indices: Indices) -> list[Source]:
        paths = [root / files.names[k] for k in indices]
        return [Source(str(path), path) for path in paths]

    notes += decode.describe(sources(options.order(len(files.names))[:LOOKED]))
    return assemble(
        str(root),
        options,
        fetch=fetch,
        total=len(files.names),
        labels=labels,
        classes=classes,
        groups=groups,
        fingerprint="sha256 of names and sizes:" + files.fingerprint,
        notes=notes,
        names=files.names,
    )


def _groups(root: Path, names: list[str], level: str) -> tuple[list[str] | None, int | None]:
    """The folder at `level` (1: the first below the root) of every image, and the level; None where none was asked for."""
    if not level:
        return None, None
    if not level.isdigit() or int(level) < 1:
        raise UsageError(
            f"the groups of an image folder are the folders at a level: --group 1 for {root.name}/GROUP/CLASS/, 2 for "
            f"{root.name}/CLASS/GROUP/; got {level!r}."
        )
    depth = int(level)
    flat = [name for name in names if name.count("/") < depth]
    if flat:
        raise DataError(
            f"{root}: the groups were to be the folders at level {depth}, but {len(flat)} of {len(names)} images lie above it, "
            f"{flat[0]} first. Move them, or choose another level."
        )
    return [name.split("/")[depth - 1] for name in names], depth


def _labels(
    files: _Files, group_level: int | None, *, wanted: bool
) -> tuple[Tensor | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Labels by class folder: the first below the root, or, where that one is the group, the second."""
    depth = 1 if group_level == 1 else 0
    nested = all(name.count("/") > depth for name in files.names)
    if not files.classes or not nested:
        return None, None, (say("no class folders, hence no labels"),)
    if not wanted:
        return None, None, ()
    each = [name.split("/")[depth] for name in files.names]
    classes = tuple(sorted(set(each)))
    number = {name: k for k, name in enumerate(classes)}
    shown = some(classes)
    note = say("labels are the {count} class folders in sorted order: {some}", count=len(classes), some=shown)
    return torch.tensor([number[name] for name in each]), classes, (note,)


def _split(root: Path, split: str) -> Path:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if split:
        if split not in folders:
            raise UnknownName(f"subfolder of {root}:", split, folders)
        return root / split
    # Class folders named so would be a strange task; taken as classes they would be a wrong one.
    if folders and SPLITS.issuperset(name.lower() for name in folders):
        raise DataError(
            f"{root} holds the splits {', '.join(folders)}. Say which with split=, or give {root / folders[0]}."
        )
    return root


class _Files:
    """The images under a folder, by name relative to it, sorted; hidden ones are ignored, links in circles end.

    Only names are held, some 200 bytes an image: a folder of a million files is looked through, never read.
    """

    def __init__(self, root: Path) -> None:
        self.names: list[str] = []
        self.skipped: Counter[str] = Counter()
        self._walked: set[tuple[int, int]] = set()
        held: Counter[str] = Counter()
        digest = hashlib.sha256()
        folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _hidden(e.name))
        for name, size in sorted(self._walk(root, "", {_identity(root)})):
            self.names.append(name)
            held[name.partition("/")[0] if "/" in name else ""] += 1
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()
        if not self.names:
            others = ", ".join(f"{count} {kind}" for kind, count in self.skipped.items()) or "nothing else"
            raise DataError(f"{root} holds no images ({', '.join(SUFFIXES)}); found: {others}.")
        empty = [name for name in folders if not held[name]]
        if empty and not held[""]:
            raise DataError(
                f"{root}: {len(empty)} of {len(folders)} class folders hold no images: {', '.join(empty[:10])}"
                f"{' …' if len(empty) > 10 else ''}. Fill them or remove them."
            )
        if folders and held[""] and len(held) > 1:
            raise DataError(
                f"{root} holds {held['']} images beside {len(held) - 1} class folders. Move them into a class, or away."
            )
        self.classes = tuple(folders) if not held[""] else ()

    def _walk(
        self, folder: Path, prefix: str, above: set[tuple[int, int]], *, linked: bool = False
    ) -> Iterator[tuple[str, int]]:
        self._walked |= above
        for entry in os.scandir(folder):
            if _hidden(entry.name):
                continue
            if _circles(entry):
                self.skipped[say("link in a circle")] += 1
            elif entry.is_dir():
                me, link = _identity(entry.path), entry.is_symlink()
                # A link to a folder that it lies in; or one behind a link, to what was walked: a dozen folders that link to
                # each other have more paths than anyone can walk.
                if me in above or (linked and link and me in self._walked):
                    self.skipped[say("link in a circle")] += 1
                else:
                    inside = f"{prefix}{entry.name}/"
                    yield from self._walk(Path(entry.path), inside, above | {me}, linked=linked or link)
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield prefix + entry.name, entry.stat().st_size
            else:
                self.skipped[os.path.splitext(entry.name)[1].lower() or say("without suffix")] += 1


def _circles(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to itself, at once or by way of others."""
    try:
        entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
        raise
    return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
