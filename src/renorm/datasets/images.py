"""Files or bytes of images → a batch of the model's input; every image is decoded when its batch is asked for."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from renorm.errors import DataError, require
from renorm.preprocessing import Preprocessing
from renorm.said import listed, say

__all__ = ["LOOKED", "SUFFIXES", "Decoder", "Source"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LOOKED = 256  # headers read to tell modes and sizes; all of a large set would take minutes
MODES = {1: "L", 3: "RGB"}


class Source(NamedTuple):
    """An image on disk, or its bytes; `name` is what a message calls it."""

    name: str
    held: Path | bytes


@dataclass(frozen=True)
class Decoder:
    """Sources → the model's input (n, C, H, W), as `preprocessing` says; without it pixels / 255."""

    preprocessing: Preprocessing | None

    def __call__(self, sources: Sequence[Source]) -> Tensor:
        """One batch. Raises DataError, naming the image, for one that is damaged or of another shape than the rest."""
        decode = self._pixels if self.preprocessing is None else self._transformed(self.preprocessing)
        # threads suffice: Pillow lets others run while it decodes and resizes
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(decode, sources))
        sizes = Counter(tuple(image.shape) for image in images)
        if len(sizes) > 1:
            odd = min(range(len(images)), key=lambda k: sizes[tuple(images[k].shape)])
            most = sizes.most_common(1)[0][0]
            raise DataError(
                f"images differ in shape: {sources[odd].name} is {_by(images[odd].shape)}, others are "
                f"{_by(most)}. Resize them, or give a model that states its input size (`pretrained_cfg`)."
            )
        return torch.stack(images)

    def describe(self, some: Sequence[Source]) -> tuple[str, ...]:
        """Notes on how images become input, from the headers of `some`."""
        modes: Counter[str] = Counter()
        for source in some:
            with self._open(source) as opened:
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

    def _transformed(self, preprocessing: Preprocessing) -> Callable[[Source], Tensor]:
        transform, mode = preprocessing.transform(), MODES[self._channels()]
        return lambda source: transform(self._load(source, mode))

    def _pixels(self, source: Source) -> Tensor:
        pixels = np.array(self._load(source, "RGB"), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def _channels(self) -> int:
        wanted = 3 if self.preprocessing is None else self.preprocessing.input_size[0]
        if wanted not in MODES:
            raise DataError(f"the model takes {wanted} channels; image files give 1 or 3. Use arrays: a .npz file.")
        return wanted

    def _open(self, source: Source) -> Any:
        image = require("PIL.Image", extra="images", purpose="reading images")
        try:
            return image.open(io.BytesIO(source.held) if isinstance(source.held, bytes) else source.held)
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
            raise DataError(_broken(source.name, error)) from error

    def _load(self, source: Source, mode: str) -> Any:
        with self._open(source) as opened:
            try:
                return _converted(opened, mode)
            except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's decoders raise all of these
                raise DataError(_broken(source.name, error)) from error


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


def _broken(name: str, error: BaseException) -> str:
    return f"{name} cannot be read as an image ({' '.join(str(error).split())[:120]}). Replace it, or move it away."


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
