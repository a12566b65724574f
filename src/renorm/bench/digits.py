"""The smallest honest test bed: scikit-learn's handwritten digits, a batch norm network trained on them, and shifted copies.

Everything is in the wheel of scikit-learn, so it works offline; everything is seeded. It is what `renorm demo` shows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

__all__ = ["SHIFTS", "Digits", "batches", "load", "network", "training"]

SOURCE = 1000  # images to train on; the other 797 are never trained on
EPOCHS, BATCH = 12, 50


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in [0, 1], ink bright, and which digit each is (N,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, part: slice | Tensor) -> Digits:
        return Digits(self.images[part], self.labels[part])

    def __len__(self) -> int:
        return len(self.labels)

    def shifted(self, shift: str) -> Digits:
        """The same digits under one of `SHIFTS`."""
        return Digits(SHIFTS[shift](self.images), self.labels)


def load() -> tuple[Digits, Digits]:
    """The 1,797 digits of the UCI set as scikit-learn ships them, shuffled: 1,000 to train on and the rest."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=Generator().manual_seed(0))
    images = torch.from_numpy(found.images).float()[order, None] / 16
    every = Digits(images, torch.from_numpy(found.target).long()[order])
    return every[:SOURCE], every[SOURCE:]


def batches(digits: Digits, *, labelled: bool = False, size: int = 100) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
    """The images in batches of `size`, with their labels or, as in real life, without."""
    images = list(torch.split(digits.images, size))
    return list(zip(images, torch.split(digits.labels, size), strict=True)) if labelled else images


def network(width: int = 16) -> nn.Sequential:
    """Three convolutions, each with a batch norm, and a linear head: 24,000 parameters."""
    wide = (1, width, 2 * width, 4 * width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (inputs, outputs) in enumerate(pairwise(wide), start=1):
        layers[f"conv{place}"] = nn.Conv2d(inputs, outputs, 3, stride=min(place, 2), padding=1, bias=False)
        layers[f"bn{place}"], layers[f"relu{place}"] = nn.BatchNorm2d(outputs), nn.ReLU()
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(wide[-1], 10)}
    return nn.Sequential(layers)


def training(source: Digits, *, seed: int = 1) -> Iterator[nn.Sequential]:
    """Train a network on `source`, yielding it after each of `EPOCHS` epochs; the last one is done, in eval mode.

    The global random numbers are used for the weights alone, and come out as they went in.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    shuffle = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    steps = EPOCHS * -(-len(source) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        model.train()
        for rows in torch.split(torch.randperm(len(source), generator=shuffle), BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(source.images[rows]), source.labels[rows]))
            optimizer.step()
            schedule.step()
        yield model.eval()


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _low_contrast(images: Tensor) -> Tensor:
    """A fifth of the contrast, around each image's own mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) / 5


def _fog(images: Tensor) -> Tensor:
    """A smooth bright veil, different for each image and as strong as the ink."""
    veil = torch.rand(len(images), 1, 3, 3, generator=Generator().manual_seed(1))
    veil = F.interpolate(veil, size=images.shape[2:], mode="bicubic", align_corners=True).clamp(0, 1)
    return (images + veil) / 2


def _blur(images: Tensor) -> Tensor:
    """A Gaussian of one pixel's width."""
    weight = torch.exp(-torch.arange(-2.0, 3).square() / 2)
    kernel = torch.outer(weight, weight) / weight.sum().square()
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel[None, None])


def _inverted(images: Tensor) -> Tensor:
    """Dark ink on bright paper."""
    return 1 - images


SHIFTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as they are": _as_it_is,
    "low contrast": _low_contrast,
    "fog": _fog,
    "blur": _blur,
    "inverted": _inverted,
}
