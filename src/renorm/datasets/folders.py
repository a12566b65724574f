"""Image folders: one subfolder per class, or flat; every image is decoded when its batch is asked for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from renorm.datasets.base import Dataset, Indices, Options, assemble
from renorm.errors import DataError, UnknownName, require
from renorm.preprocessing import Preprocessing
from renorm.said import listed, say, some

__all__ = ["read"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
LOOKED = 256  # headers read to tell modes and sizes; all of a large folder would take minutes
MODES = {1: "L", 3: "RGB"}


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
    labels, classes = None, None
    if files.classes and options.labels is not None:
        classes = files.classes
        number = {name: k for k, name in enumerate(classes)}
        labels = torch.tensor([number[Path(name).parts[0]] for name in files.names])
        shown = some(classes)
        notes += (say("labels are the {count} class folders in sorted order: {some}", count=len(classes), some=shown),)
    elif not files.classes:
        notes += (say("no class folders, hence no labels"),)
    if files.skipped:
        kinds = listed(say("{count} {kind}", count=n, kind=kind) for kind, n in sorted(files.skipped.items()))
        notes += (say("left out what is no image: {kinds}", kinds=kinds),)
    decode = _Decoder(root, tuple(files.names), options.preprocessing)
    notes += decode.describe(options.order(len(files.names))[:LOOKED])
    return assemble(
        str(root),
        options,
        fetch=decode,
        total=len(files.names),
        labels=labels,
        classes=classes,
        fingerprint="sha256 of names and sizes:" + files.fingerprint,
        notes=notes,
    )


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
    """The images under a folder, by name relative to it, sorted; hidden ones are ignored, links followed once."""

    def __init__(self, root: Path) -> None:
        self.names: list[str] = []
        self.skipped: Counter[str] = Counter()
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

    def _walk(self, folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
        for entry in os.scandir(folder):
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                me = _identity(entry.path)
                if me in above:  # a link to a folder that it lies in
                    self.skipped[say("link in a circle")] += 1
                else:
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/", above | {me})
            elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                yield prefix + entry.name, entry.stat().st_size
            else:
                self.skipped[os.path.splitext(entry.name)[1].lower() or say("without suffix")] += 1


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


@dataclass(frozen=True)
class _Decoder:
    """Indices → a batch of the model's input (n, C, H, W)."""

    root: Path
    names: tuple[str, ...]
    preprocessing: Preprocessing | None

    def __call__(self, indices: Indices) -> Tensor:
        decode = self._pixels if self.preprocessing is None else self._transformed(self.preprocessing)
        # threads suffice: Pillow lets others run while it decodes and resizes
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda k: decode(self.names[k]), indices))
        sizes = Counter(tuple(image.shape) for image in images)
        if len(sizes) > 1:
            odd = min(range(len(images)), key=lambda k: sizes[tuple(images[k].shape)])
            most = sizes.most_common(1)[0][0]
            raise DataError(
                f"images differ in shape: {self.root / self.names[indices[odd]]} is {_by(images[odd].shape)}, others are "
                f"{_by(most)}. Resize them, or give a model that states its input size (`pretrained_cfg`)."
            )
        return torch.stack(images)

    def describe(self, some: Indices) -> tuple[str, ...]:
        """Notes on how images become input, from the headers of `some`."""
        modes: Counter[str] = Counter()
        for k in some:
            with self._open(self.names[k]) as opened:
                modes[opened.mode] += 1
        target = MODES[self._channels()]
        known = self.preprocessing
        notes = [say("pixels / 255") if known is None else say("input {preprocessing}", preprocessing=known.said())]
        if strange := {mode: count for mode, count in modes.items() if mode != target}:
            kinds = listed(f"{count} {mode}" for mode, count in sorted(strange.items()))
            notes.append(
                say(
                    "images converted to {mode} (of {count} looked at: {kinds})",
                    mode=target,
                    count=len(some),
                    kinds=kinds,
                )
            )
        return tuple(notes)

    def _transformed(self, preprocessing: Preprocessing) -> Callable[[str], Tensor]:
        transform, mode = preprocessing.transform(), MODES[self._channels()]
        return lambda name: transform(self._load(name, mode))

    def _pixels(self, name: str) -> Tensor:
        pixels = np.array(self._load(name, "RGB"), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def _channels(self) -> int:
        wanted = 3 if self.preprocessing is None else self.preprocessing.input_size[0]
        if wanted not in MODES:
            raise DataError(
                f"the model takes {wanted} channels; images of a folder give 1 or 3. Use arrays: a .npz file."
            )
        return wanted

    def _open(self, name: str) -> Any:
        image = require("PIL.Image", extra="images", purpose="reading images")
        path = self.root / name
        try:
            return image.open(path)
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
            raise DataError(_broken(path, error)) from error

    def _load(self, name: str, mode: str) -> Any:
        with self._open(name) as opened:
            try:
                return _converted(opened, mode)
            except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's decoders raise all of these
                raise DataError(_broken(self.root / name, error)) from error


def _converted(opened: Any, mode: str) -> Any:
    """A PIL image in `mode`: 16-bit greys keep their high byte (Pillow would clip them at 255), transparency is dropped."""
    opened.load()
    if opened.mode.startswith(("I", "F")):
        levels = np.asarray(opened, dtype=np.float32)
        if opened.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its values lie between {levels.min():g} and {levels.max():g}, not in 8 or 16 bits")
        scale = 257 if opened.mode.startswith("I;16") or levels.max() > 255 else 1
        image = require("PIL.Image", extra="images", purpose="reading images")
        opened = image.fromarray(np.rint(levels / scale).astype(np.uint8))
    elif opened.mode == "P":
        opened = opened.convert("RGBA")  # by way of RGBA: Pillow warns of palettes with transparency
    return opened.convert(mode)


def _broken(path: Path, error: BaseException) -> str:
    return f"{path} cannot be read as an image ({' '.join(str(error).split())[:120]}). Replace it, or move it away."


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
