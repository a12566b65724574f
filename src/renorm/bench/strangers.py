"""Two networks of other kinds, trained in a few seconds: handwritten digits, and chest X-rays of children.

The digits meet their corruptions and two other data sets of digits, the X-rays corruptions. Images are padded to 32 x 32.
"""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from renorm.bench import corruptions
from renorm.bench.beds import Bed, Indices, Labelled

__all__ = ["Digits", "Strangers", "XRays"]

EPOCHS, BATCH, RATE = 3, 64, 0.05


class Strangers(Bed):
    """A small network of four batch norms; half of the test images adapt, and none of those that train does."""

    file: ClassVar[str]

    def model(self) -> nn.Module:
        return deepcopy(_trained(self.data / self.file, self.classes))

    def source(self, *, seed: int) -> Labelled:
        images, labels = _images(self.data / self.file, "_test")
        chosen = np.random.default_rng([seed, 3]).permutation(len(labels))[: self._source_size(len(labels))]
        return self._ready(images[chosen], labels[chosen])

    def _source_size(self, count: int) -> int:
        return min(400, count // 3)

    def _network(self) -> tuple[str, str]:
        return "", ""  # it is trained here, and lies in no file

    def _parts(self, seed: int) -> tuple[Indices, Indices]:
        count = len(_images(self.data / self.file, "_test")[1])
        order = np.random.default_rng([seed, 3]).permutation(count)[self._source_size(count) :]
        return order, order

    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        images, labels = _images(self.data / self.file, "_test")
        return corruptions.small(images, shift), labels

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.5,) * 3, (0.25,) * 3


class Digits(Strangers):
    """MNIST; other digits are those of envelopes (USPS) and on patches of photographs (MNIST-M)."""

    name = "digits_cnn"
    classes = 10
    file = "mnist15k.npz"
    others: ClassVar[tuple[str, ...]] = ("usps", "mnist_m4k")
    shifts: ClassVar[tuple[str, ...]] = (
        *(corruptions.CLEAN, "gaussian_noise", "defocus_blur", "fog", "contrast"),
        *others,
    )
    needs: ClassVar[tuple[str, ...]] = (file, *(f"{other}.npz" for other in others))

    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        if shift not in self.others:
            return super()._images(shift)
        images, labels = _images(self.data / f"{shift}.npz", "")
        count = len(_images(self.data / self.file, "_test")[1])
        return images[:count], labels[:count]


class XRays(Strangers):
    """Pneumonia or none."""

    name = "xray_cnn"
    classes = 2
    file = "pneumoniamnist.npz"
    shifts: ClassVar[tuple[str, ...]] = (corruptions.CLEAN, "gaussian_noise", "defocus_blur", "contrast", "pixelate")
    needs: ClassVar[tuple[str, ...]] = (file,)


@lru_cache(maxsize=4)
def _images(path: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    with np.load(path, allow_pickle=False) as file:
        images, labels = file[f"images{part}"], file[f"labels{part}"]
    if images.shape[1] == 16:
        images = images.repeat(2, 1).repeat(2, 2)
    pad = (32 - images.shape[1]) // 2
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.broadcast_to(images, (*images.shape[:3], 3)).copy(), labels.astype(np.int64)


@lru_cache(maxsize=2)
def _trained(path: Path, classes: int) -> nn.Module:
    images, labels = _images(path, "")
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    y = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *_block(3, 16, 1),
            *_block(16, 32, 2),
            *_block(32, 32, 2),
            *_block(32, 64, 2),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
        steps = EPOCHS * (len(y) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for chosen in torch.split(torch.randperm(len(y)), BATCH)[: len(y) // BATCH]:
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(model(x[chosen]), y[chosen]))
                optimizer.step()
                schedule.step()
    return model.eval()


def _block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
