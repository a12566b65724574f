"""`.npz` and `.npy`: pixels become the model's input, other numbers are taken as they are."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renorm.datasets.base import Dataset, Indices, Options, assemble
from renorm.errors import DataError, UnknownName, UsageError
from renorm.files import sha256
from renorm.preprocessing import Preprocessing, match_channels
from renorm.said import listed, say, some

__all__ = ["LABELS", "numbered", "pixel_reader", "read"]

Array = NDArray[Any]

IMAGES = ("images", "x", "data", "inputs", "features")
LABELS = ("labels", "y", "targets", "target", "label")
SPLITS = ("train", "test", "val", "valid", "validation")
CHANNELS = (1, 3, 4)
# what NumPy raises for files cut short or written over; a garbled header gets as far as Python's tokenizer
DAMAGE = (OSError, EOFError, ValueError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
CHECKED = 1 << 22  # numbers looked at in one go for NaN: 16 MB, however large the file


def read(path: Path, key: str, options: Options) -> Dataset:
    """The array `key`, or the one called images or x (with `_split` behind it), and its labels.

    Raises:
        DataError: damaged, holding objects, no such array, or numbers that cannot be used.
        UsageError: both a name and a split.
    """
    if key and options.split:
        raise UsageError(f"both #{key} and split {options.split!r} were given. Give one of them.")
    held = _open(path)
    try:
        name = _images(path, held, key, options.split)
        values = _array(path, held, name)
        labels, classes, notes = _labels(path, held, name, len(values), options)
        groups = _groups(path, held, name, len(values), options.group)
    finally:
        if isinstance(held, np.lib.npyio.NpzFile):
            held.close()
    where = f"{path.name}: {name}" if name else path.name
    fetch, said = _reader(values, options.preprocessing, where)
    return assemble(
        str(path) + (f"#{name}" if name else ""),
        options,
        fetch=fetch,
        total=len(values),
        labels=labels,
        classes=classes,
        groups=None if groups is None else groups.tolist(),
        fingerprint="sha256:" + sha256(path),
        notes=said + notes,
        columns=() if values.ndim == 2 and not _are_pixels(values) else None,
    )


def pixel_reader(
    images: Array, preprocessing: Preprocessing | None, where: str
) -> tuple[Callable[[Indices], Tensor], tuple[str, ...]]:
    """A function from indices to the model's input, and what it does in words.

    Shapes: integer images (N, H, W), (N, H, W, C) or (N, C, H, W), of values to 255, or to 65,535 in uint16.

    Raises:
        DataError: no axis can be the channels, or their number is not the model's.
    """
    wanted = preprocessing.input_size[0] if preprocessing else None
    axis = _channel_axis(images, wanted, where)
    top = 65535 if images.dtype.itemsize == 2 and images.dtype.kind == "u" else 255

    def fetch(indices: Indices) -> Tensor:
        # numpy converts: torch has no unsigned 16-bit arithmetic and refuses foreign byte orders
        x = torch.from_numpy(images[indices].astype(np.float32)) / top
        x = x.unsqueeze(1) if axis is None else x.movedim(axis, 1)
        return preprocessing.tensor(match_channels(x, preprocessing.input_size[0])[0]) if preprocessing else x

    height, width = (side for place, side in enumerate(images.shape[1:], 1) if place != axis)
    if preprocessing is None:
        return fetch, (say("pixels / {top}, {height} × {width}", top=top, height=height, width=width),)
    notes: list[str] = [say("input {preprocessing}", preprocessing=preprocessing.said())]
    if (height, width) != preprocessing.input_size[1:]:
        notes.append(say("resized from {height} × {width}", height=height, width=width))
    held = torch.zeros(1, 1 if axis is None else images.shape[axis], 1, 1)
    if done := match_channels(held, preprocessing.input_size[0])[1]:
        notes.append(done)
    return fetch, tuple(notes)


def _open(path: Path) -> Mapping[str, Array]:
    try:
        with path.open("rb") as file:
            start = file.read(6)
        # looked at by hand: numpy takes whatever is neither for a pickle, and leaves a broken archive open
        if start != b"\x93NUMPY" and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("neither an array nor an archive of arrays")
        held = np.load(path, allow_pickle=False, mmap_mode="r" if start == b"\x93NUMPY" else None)
    except DAMAGE as error:
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise DataError(_objects(path.name)) from error
        raise DataError(f"{path} is damaged, or no NumPy file ({error}). Write it again with numpy.save.") from error
    return held if isinstance(held, np.lib.npyio.NpzFile) else {"": held}


def _array(path: Path, held: Mapping[str, Array], name: str) -> Array:
    try:
        return held[name]
    except DAMAGE as error:
        if "Object arrays" in str(error):  # a .npz is only looked into here
            raise DataError(_objects(f"{path.name}: {name}")) from error
        raise DataError(f"{path.name}: {name} is damaged ({error}). Write the file again.") from error
    except MemoryError as error:
        raise DataError(
            f"{path.name}: {name} does not fit into memory, or its header lies ({error}). Save it by itself as .npy, which is "
            "read in place."
        ) from error


def _objects(where: str) -> str:
    return (
        f"{where} holds Python objects, which may run code when they are read; renorm never unpickles them. "
        "Save plain numbers: numpy.stack(list_of_arrays)."
    )


def _images(path: Path, held: Mapping[str, Array], key: str, split: str) -> str:
    if list(held) == [""]:
        if key or split:
            raise DataError(f"{path.name} holds one array without a name; #{key or split} cannot be picked from it.")
        return ""
    if key:
        if key not in held:
            raise UnknownName(f"array in {path.name}:", key, held)
        return key
    if found := _find(held, IMAGES, split):
        return found
    others = [name for name in held if name.lower().startswith("x_") and not _split_of(name)]
    if not split and len(others) == 1:
        return others[0]
    splits = sorted({_split_of(name) for name in held if _split_of(name)})
    if splits:
        asked = f"no split {split!r}, but" if split else "several splits:"
        raise DataError(f"{path.name} holds {asked} {', '.join(splits)}. Say which with split=, or {path.name}#NAME.")
    raise DataError(
        f"{path.name} holds {', '.join(held) or 'nothing'}; none is called {' or '.join(IMAGES[:2])}"
        f"{f' with _{split} behind it' if split else ''}. Say which with {path.name}#NAME."
    )


def _find(held: Mapping[str, Array], names: tuple[str, ...], split: str) -> str | None:
    lower = {name.lower(): name for name in reversed(list(held))}
    wanted = [f"{name}_{split}".lower() if split else name for name in names]
    return next((lower[name] for name in wanted if name in lower), None)


def _split_of(name: str) -> str:
    behind = name.lower().rpartition("_")[2]
    return behind if "_" in name and behind in SPLITS else ""


def _labels(
    path: Path, held: Mapping[str, Array], images: str, count: int, options: Options
) -> tuple[Tensor | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Labels as they stand in the file, the names of the classes, and notes."""
    if options.labels is None or not images:
        return None, None, ()
    behind = images.rpartition("_")[2]  # as in X_uV: part of a name, or that of a split
    split = options.split or (behind if _split_of(images) or _find(held, LABELS, behind) else "")
    name: str | None = options.labels
    if options.labels == "labels":
        name = _find(held, LABELS, split)
    elif options.labels not in held:
        raise UnknownName(f"array in {path.name}:", options.labels, held)
    if name is None:
        wanted = listed(f"{label}_{split}" if split else label for label in LABELS)
        return None, None, (say("no labels: none of {wanted} is in the file", wanted=wanted),)
    values = _array(path, held, name)
    if values.ndim > 1 and values.size == len(values):
        values = values.reshape(-1)
    if values.ndim == 0 or len(values) != count:
        found = len(values) if values.ndim else "one"
        raise DataError(f"{path.name}: {images} holds {count} samples, {name} {found}. Give one label for each.")
    classes = tuple(map(str, _array(path, held, "classes"))) if "classes" in held else None
    return numbered(f"{path.name}: {name}", values, classes)


def _groups(path: Path, held: Mapping[str, Array], images: str, count: int, name: str) -> Array | None:
    if not name:
        return None
    if name not in held or not images:
        raise UnknownName(f"array in {path.name}:", name, [each for each in held if each])
    values = _array(path, held, name)
    if values.ndim != 1 or len(values) != count:
        raise DataError(
            f"{path.name}: {images} holds {count} samples, the groups {name} have the shape {values.shape}. Give one for each."
        )
    return values


def numbered(
    where: str, values: Array, classes: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...] | None, tuple[str, ...]]:
    """Labels as class numbers, or as numbers to predict; the names of the classes; and notes."""
    if values.dtype.kind in "US":
        names, numbers = np.unique(values.astype(str), return_inverse=True)
        if classes is not None and set(names) <= set(classes):
            return torch.tensor([classes.index(name) for name in names])[torch.from_numpy(numbers)], classes, ()
        return (
            torch.from_numpy(numbers.astype(np.int64)),
            tuple(map(str, names)),
            (say("labels are names, numbered in sorted order: {some}", some=some(list(map(str, names)))),),
        )
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where} is of type {values.dtype}. Labels are whole numbers, names, or numbers to predict.")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise DataError(f"{where} holds NaN or infinity. Leave those samples away, or give labels=None.")
        if (values != np.rint(values)).any():
            return (
                torch.from_numpy(values.astype(np.float32)),
                None,
                (say("labels are numbers to predict, not classes"),),
            )
    numbers = values.astype(np.int64)
    if classes is not None and numbers.size and not 0 <= numbers.min() <= numbers.max() < len(classes):
        raise DataError(
            f"{where} lies between {numbers.min()} and {numbers.max()}, but there are {len(classes)} classes. "
            "Number them from 0."
        )
    return torch.from_numpy(numbers), classes, ()


def _reader(
    values: Array, preprocessing: Preprocessing | None, where: str
) -> tuple[Callable[[Indices], Tensor], tuple[str, ...]]:
    kind, shape = values.dtype.kind, values.shape
    if kind not in "biuf":
        raise DataError(f"{where} is of type {values.dtype}. Give numbers.")
    if values.size == 0:
        raise DataError(f"{where} holds no samples: its shape is {shape}. Give at least one.")
    if values.ndim < 2:
        raise DataError(f"{where} has the shape {shape}: one number for each sample. Give (N, features) or images.")
    if _are_pixels(values):
        return pixel_reader(values, preprocessing, where)
    if preprocessing is not None and values.ndim != 4:
        size = " × ".join(map(str, preprocessing.input_size))
        raise DataError(
            f"the model takes images, {size}; {where} has the shape {shape}. Give (N, H, W, C) or (N, C, H, W)."
        )
    _check_finite(values, where)
    axis = 1
    notes: list[str] = [say("numbers that are no pixels (8 or 16 bits) are taken as they are, not normalised")]
    if preprocessing is not None:
        axis = _channel_axis(values, preprocessing.input_size[0], where) or 1
        if axis != 1:
            notes.append(say("channels moved from last to first"))
        if values.shape[axis] != preprocessing.input_size[0]:
            raise DataError(
                f"the model takes {preprocessing.input_size[0]} channels, {where} has {values.shape[axis]}. "
                "Give what the model takes, or a model made for these."
            )
        if values.min() >= 0 and values.max() <= 255:
            notes.append(say("they lie in 0…255 as pixels do: saved as uint8, they would be normalised for the model"))

    def fetch(indices: Indices) -> Tensor:
        x = torch.from_numpy(values[indices].astype(np.float32))
        return x if axis == 1 else x.movedim(axis, 1)

    return fetch, tuple(notes)


def _are_pixels(values: Array) -> bool:
    """Unsigned 8- or 16-bit images, and other whole numbers in 4 axes that all lie in 0…255."""
    if values.ndim < 3 or values.dtype.kind not in "iu":
        return False
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return True
    return values.ndim == 4 and values.min() >= 0 and values.max() <= 255


def _channel_axis(values: Array, wanted: int | None, where: str) -> int | None:
    """1 or the last axis, whichever can be the channels (the last, where both can); None for grey (N, H, W)."""
    if values.ndim == 3:
        return None
    if values.ndim == 4:
        if wanted is not None and values.shape[3] != wanted == values.shape[1]:
            return 1
        for axis in (3, 1) if values.dtype.kind in "iu" else (1, 3):
            if values.shape[axis] in CHANNELS or values.shape[axis] == wanted:
                return axis
    raise DataError(
        f"{where} has the shape {values.shape}, in which no axis can be the channels (1, 3 or 4). "
        "Give (N, H, W), (N, H, W, C) or (N, C, H, W)."
    )


def _check_finite(values: Array, where: str) -> None:
    if values.dtype.kind != "f":
        return
    step = max(1, CHECKED // max(1, values[0].size))
    bad: list[int] = []
    for start in range(0, len(values), step):
        with np.errstate(over="ignore"):  # too large for float32 is infinite too
            part = values[start : start + step].astype(np.float32)
        finite = np.isfinite(part).reshape(len(part), -1).all(1)
        bad += (np.flatnonzero(~finite) + start).tolist()
    if bad:
        raise DataError(
            f"{where}: {len(bad)} of {len(values)} samples hold NaN or infinity (in float32), the first is number "
            f"{bad[0]}. Leave these samples away, or fill their gaps."
        )
