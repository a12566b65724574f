"""Samples on their way into a stream: from data, as they stand there, or from paths on standard input, as they come."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from renorm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from renorm.datasets.base import Dataset
    from renorm.datasets.images import Decoder

NAMED = 1000  # skipped paths that are kept by name; all are counted


@dataclass(frozen=True)
class Part:
    """One batch: `inputs`, where each sample stands in the data, what it is called (None: it has no name), and labels."""

    inputs: Any
    indices: Sequence[int]
    names: Sequence[str | None]
    labels: Tensor | None = None


def of_dataset(dataset: Dataset) -> Iterator[Part]:
    """The batches of a data set, with the names of their samples."""
    start = 0
    for inputs, *labels in dataset.batches:
        size = dataset.batches.batch_size
        indices = dataset.order[start : start + size].tolist()
        start += size
        names = [None if dataset.names is None else dataset.names[k] for k in indices]
        yield Part(inputs, indices, names, labels[0] if labels else None)


class Paths:
    """Paths of images, one a line → parts of `batch_size`, the last one with what is left.

    A line that names no image is skipped, counted and named; a part also ends where the images change their size.
    """

    def __init__(self, lines: Iterable[str], decode: Decoder, batch_size: int) -> None:
        self._lines, self._decode, self._size = lines, decode, batch_size
        self.skipped: int = 0
        self.reasons: list[tuple[int, str, str]] = []  # line, path, why: the first ones

    def __iter__(self) -> Iterator[Part]:
        waiting: list[tuple[int, str]] = []
        for line, text in enumerate(self._lines):
            name = text.rstrip("\r\n")
            if name:
                waiting.append((line, name))
            if len(waiting) == self._size:
                yield from self._decoded(waiting)
                waiting = []
        if waiting:
            yield from self._decoded(waiting)

    def _decoded(self, named: list[tuple[int, str]]) -> Iterator[Part]:
        from pathlib import Path

        from renorm.datasets.images import Source

        sources = [Source(name, Path(name)) for _, name in named]
        try:
            yield _part(named, self._decode(sources))
            return
        except DataError:
            pass  # one of them at least: each by itself says which
        run: list[tuple[int, str]] = []
        images: list[Tensor] = []
        for place, source in zip(named, sources, strict=True):
            try:
                image = self._decode([source])
            except DataError as error:
                self._skip(*place, str(error))
                continue
            if images and images[-1].shape != image.shape:
                yield _joined(run, images)
                run, images = [], []
            run.append(place)
            images.append(image)
        if images:
            yield _joined(run, images)

    def _skip(self, line: int, name: str, why: str) -> None:
        self.skipped += 1
        if len(self.reasons) < NAMED:
            self.reasons.append((line, name, why))


def _part(named: Sequence[tuple[int, str]], images: Tensor) -> Part:
    return Part(images, [line for line, _ in named], [name for _, name in named])


def _joined(named: Sequence[tuple[int, str]], images: Sequence[Tensor]) -> Part:
    import torch

    return _part(named, torch.cat(list(images)))


def standard_input() -> Iterator[str]:
    """The lines of standard input, whatever bytes a path consists of."""
    raw = getattr(sys.stdin, "buffer", None)
    return iter(sys.stdin) if raw is None else map(os.fsdecode, raw)


class Stop:
    """Whether Ctrl-C was pressed: it ends the wait for the next batch at once, and a batch at work is answered first."""

    def __init__(self) -> None:
        self.asked: bool = False
        self._waiting = False

    def until(self, parts: Iterable[Part]) -> Iterator[Part]:
        """`parts`, up to Ctrl-C."""
        rest = iter(parts)
        while not self.asked:
            try:
                self._waiting = True
                part = next(rest, None)
                self._waiting = False
            except KeyboardInterrupt:
                return
            if part is None:
                return
            yield part

    def _pressed(self, number: int, frame: Any) -> None:
        again, self.asked = self.asked, True
        if self._waiting or again:  # a second one does not wait, and nothing is written
            self._waiting = False
            signal.default_int_handler(number, frame)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Inside, Ctrl-C is a `Stop`; where no signal can be heard (another thread), it stays what it was."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop._pressed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
