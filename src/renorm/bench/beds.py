"""Test beds: a pretrained network with real data of its source, and shifted data with labels to measure it on.

A bed splits its images into parts that never mix: those that adapt (`pool`), those that the error is measured on
(`held_out`), both under the same shift, and labelled images of the source (`source`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from renorm.bench import corruptions
from renorm.bench.resample import some_classes
from renorm.models import load_model

__all__ = ["BEDS", "Bed", "Labelled", "MobileNetVWW", "ResNet20", "error"]

Indices = NDArray[np.intp]
Corrupt = Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]


class Labelled(NamedTuple):
    """Inputs `(N, C, H, W)` as the network wants them, and their classes `(N,)`."""

    inputs: Tensor
    labels: Tensor

    def first(self, count: int) -> Labelled:
        """The first `count` images, or all if there are fewer."""
        return Labelled(self.inputs[:count], self.labels[:count])

    def after(self, count: int) -> Labelled:
        """All but the first `count` images."""
        return Labelled(self.inputs[count:], self.labels[count:])

    def to(self, device: torch.device | str) -> Labelled:
        """The same on `device`."""
        return Labelled(self.inputs.to(device), self.labels.to(device))

    def batches(self, size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """(inputs, labels) of `size` images each, the last one of what is left."""
        return list(zip(torch.split(self.inputs, size), torch.split(self.labels, size), strict=True))

    def unlabelled(self, size: int = 64) -> list[Tensor]:
        """The inputs alone, in batches of `size`."""
        return list(torch.split(self.inputs, size))


@torch.inference_mode()
def error(model: nn.Module, data: Labelled) -> float:
    """Share of wrong classes in per cent, with the model in eval mode, as it is deployed."""
    # Small batches with channels last run twice as fast here as large ones without: they stay in the cache.
    model = deepcopy(model).eval().to(memory_format=torch.channels_last)
    wrong = 0
    for inputs, labels in data.batches():
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits = model(inputs)
        wrong += int((logits.argmax(1) != labels).sum())
    return 100 * wrong / len(data.labels)


@dataclass(frozen=True)
class Bed(ABC):
    """A network and its data; `most` adapting images at most, `measured` images to measure the error on at most."""

    name: ClassVar[str]
    shifts: ClassVar[tuple[str, ...]]
    classes: ClassVar[int]
    needs: ClassVar[tuple[str, ...]]

    data: Path
    most: int
    measured: int

    def model(self) -> nn.Module:
        """The pretrained network, new on every call, in eval mode."""
        return deepcopy(_pretrained(self.data, *self._network()))

    def pool(self, shift: str, *, seed: int, classes: int | None = None) -> Labelled:
        """Images under `shift` that may adapt, in an order drawn by `seed`; of `classes` classes only, if given."""
        indices = self._kept(np.random.default_rng(seed).permutation(self._parts(seed)[0]), classes, seed)
        return self._take(shift, indices[: self.most])

    def held_out(self, shift: str, *, seed: int, classes: int | None = None) -> Labelled:
        """Images under the same shift, and of the same classes, on which the error is measured."""
        return self._take(shift, self._kept(self._parts(seed)[1], classes, seed)[: self.measured])

    @abstractmethod
    def source(self, *, seed: int) -> Labelled:
        """Labelled images of the source, none of them among those that adapt or are measured."""

    @abstractmethod
    def _network(self) -> tuple[str, str]:
        """The factory in nets.py and its weights."""

    @abstractmethod
    def _parts(self, seed: int) -> tuple[Indices, Indices]:
        """The images that may adapt and those that are measured."""

    @abstractmethod
    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        """All images of the target under `shift`, and their labels."""

    def _kept(self, indices: Indices, classes: int | None, seed: int) -> Indices:
        if classes is None or classes == self.classes:
            return indices
        labels = self._images(corruptions.CLEAN)[1]
        return indices[np.isin(indices, some_classes(labels, classes, seed=seed))]

    def _take(self, shift: str, indices: Indices) -> Labelled:
        images, labels = self._images(shift)
        return self._ready(images[indices], labels[indices])

    def _ready(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Labelled:
        mean, deviation = (torch.tensor(value)[:, None, None] for value in self._pixels())
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return Labelled(((inputs - mean) / deviation).contiguous(), torch.from_numpy(labels.astype(np.int64)))

    @abstractmethod
    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation by which pixels in [0, 1] become input."""


class ResNet20(Bed):
    """ResNet-20 on CIFAR-10: the JPEG test set as it is and under CIFAR-10-C corruptions at severity 5.

    The part that is measured is the same for every seed. The source is lossless training images.
    """

    name = "resnet20"
    classes = 10
    shifts: ClassVar[tuple[str, ...]] = (
        corruptions.CLEAN,
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "fog",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    needs: ClassVar[tuple[str, ...]] = (
        "nets.py",
        "weights/resnet20-12fca82f.th",
        "cifar10_test.npz",
        "cifar10_lossless_train4k.npz",
    )

    SOURCE = 2000  # labelled source images: enough for the moments of ten classes

    def source(self, *, seed: int) -> Labelled:
        images, labels = _arrays(self.data / "cifar10_lossless_train4k.npz")
        return self._ready(images[: self.SOURCE], labels[: self.SOURCE])

    def _network(self) -> tuple[str, str]:
        return "resnet20", "weights/resnet20-12fca82f.th"

    def _parts(self, seed: int) -> tuple[Indices, Indices]:
        return np.arange(6000), np.arange(6000, 10000)

    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return _shifted(self.data / "cifar10_test.npz", corruptions.small, shift)

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MobileNetVWW(Bed):
    """MobileNetV1-0.25 on vww1000, person or none: as it is and under `imagecorruptions` at severity 3.

    There are 1,000 photographs in all, so that every seed has parts of its own: 200 are measured (no two of five seeds
    share one), 400 others, clean and labelled, are the source, the remaining 400 adapt.
    """

    name = "mobilenet_vww"
    classes = 2
    shifts: ClassVar[tuple[str, ...]] = (
        corruptions.CLEAN,
        "gaussian_noise",
        "defocus_blur",
        "motion_blur",
        "snow",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    needs: ClassVar[tuple[str, ...]] = ("nets.py", "weights/mobilenet025_vww.pt", "vww1000.npz")

    def source(self, *, seed: int) -> Labelled:
        images, labels = _arrays(self.data / "vww1000.npz")
        indices = self._split(seed)[0]
        return self._ready(images[indices], labels[indices])

    def _network(self) -> tuple[str, str]:
        return "mobilenet_vww", "weights/mobilenet025_vww.pt"

    def _parts(self, seed: int) -> tuple[Indices, Indices]:
        return self._split(seed)[1:]

    def _split(self, seed: int) -> tuple[Indices, Indices, Indices]:
        """Source, pool and measured images."""
        measured = np.array_split(np.random.default_rng(0).permutation(1000), 5)[seed % 5]
        others = np.random.default_rng([seed, 1]).permutation(np.setdiff1d(np.arange(1000), measured))
        return others[:400], others[400:], measured

    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        return _shifted(self.data / "vww1000.npz", corruptions.photographs, shift)

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * 3, (1.0,) * 3


BEDS: dict[str, type[Bed]] = {bed.name: bed for bed in (ResNet20, MobileNetVWW)}


@lru_cache(maxsize=4)
def _pretrained(data: Path, factory: str, weights: str) -> nn.Module:
    return load_model(f"{data / 'nets.py'}:{factory}", checkpoint=data / weights)


@lru_cache(maxsize=4)
def _arrays(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    with np.load(path, allow_pickle=False) as file:
        return file["images"], file["labels"]


@lru_cache(maxsize=3)  # a suite keeps the cells of one shift together: a few stacks of 30 MB are enough
def _shifted(path: Path, corrupt: Corrupt, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    images, labels = _arrays(path)
    return corrupt(images, shift), labels
