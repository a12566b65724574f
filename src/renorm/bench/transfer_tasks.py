"""What suite `transfer` fine-tunes: networks pretrained by others or here, and new tasks for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from renorm.bench.beds import Labelled
from renorm.bench.signals import gas
from renorm.finetune import finetune_
from renorm.models import load_model

__all__ = ["TASKS", "Task", "digit_domains"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIT = ((0.0,) * 3, (1.0,) * 3)
EDGE = 4  # pixels around MNIST's digits
PRETRAINING = 4  # epochs on mnist15k


@dataclass(frozen=True)
class Task:
    """`source(data)`: a new copy of the pretrained net; `target(data)`: training and test samples of the new task.

    near   whether the classes are the source's own, so that little more than the domain is new; in "usps in one frame" the
           source's digits fill the frame as the target's do
    """

    source: Callable[[Path], nn.Module]
    target: Callable[[Path], tuple[Labelled, Labelled]]
    near: bool = False


def _by_others(data: Path, *, factory: str, weights: str) -> nn.Module:
    return deepcopy(_loaded(data, factory, weights)).to(memory_format=torch.channels_last)


@lru_cache(maxsize=2)
def _loaded(data: Path, factory: str, weights: str) -> nn.Module:
    return load_model(f"{data / 'nets.py'}:{factory}", checkpoint=data / weights)


RESNET = partial(_by_others, factory="resnet20", weights="weights/resnet20-12fca82f.th")
MOBILENET = partial(_by_others, factory="mobilenet_vww", weights="weights/mobilenet025_vww.pt")


@lru_cache(maxsize=3)
def _split(data: Path, name: str) -> tuple[Labelled, Labelled]:
    """A file with a test set of its own, whose order may follow its classes."""
    with np.load(data / f"{name}.npz", allow_pickle=False) as file:
        order = np.random.default_rng(0).permutation(len(file["labels_test"]))
        test = _ready(file["images_test"][order], file["labels_test"][order], *IMAGENET)
        return _ready(file["images"], file["labels"], *IMAGENET), test


@lru_cache(maxsize=2)
def _pacs(data: Path, side: int, pixels: Any) -> tuple[Labelled, Labelled]:
    """Photographs, art and cartoons of seven things: two thirds to train on."""
    with np.load(data / "pacs3.npz", allow_pickle=False) as file:
        order = np.random.default_rng(0).permutation(len(file["labels"]))
        images, labels = file["images"][order], file["labels"][order]
    cut = len(labels) * 2 // 3
    whole = _ready(images, labels, *pixels)
    inputs = F.interpolate(whole.inputs, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    whole = Labelled(inputs.contiguous(memory_format=torch.channels_last), whole.labels)
    return whole.first(cut), whole.after(cut)


def _ready(images: Any, labels: Any, means: tuple[float, ...], deviations: tuple[float, ...]) -> Labelled:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (means, deviations))
    colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
    inputs = torch.from_numpy(colour).permute(0, 3, 1, 2).float() / 255
    inputs = ((inputs - mean) / deviation).contiguous(memory_format=torch.channels_last)
    return Labelled(inputs, torch.from_numpy(labels.astype(np.int64).reshape(-1)))


def _digits_net(data: Path, *, framed: bool = False) -> nn.Module:
    return deepcopy(_pretrained(data, framed))


@lru_cache(maxsize=2)
def _pretrained(data: Path, framed: bool) -> nn.Module:
    """A small network trained on mnist15k at 16², by the loop that `renorm pretrain` runs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=1 if inputs == 1 else 2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    train = _grey(data / "mnist15k.npz", edge=EDGE if framed else 0)
    finetune_(net, train.batches(64), policy="all", head="keep", epochs=PRETRAINING, seed=0)
    return net


@lru_cache(maxsize=1)
def _usps(data: Path) -> tuple[Labelled, Labelled]:
    whole = _grey(data / "usps.npz")
    return whole.first(2000), whole.after(2000)


def _grey(path: Path, *, edge: int = 0) -> Labelled:
    """Digits at 16², without so many pixels of their edge."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    inputs = torch.from_numpy(images[order]).permute(0, 3, 1, 2).float() / 255
    inputs = inputs[..., edge : inputs.shape[2] - edge, edge : inputs.shape[3] - edge]
    inputs = F.interpolate(inputs, size=(16, 16), mode="bilinear", antialias=True, align_corners=False)
    return Labelled((inputs - 0.2) / 0.35, torch.from_numpy(labels[order].astype(np.int64)))


def digit_domains(data: Path, *, seed: int, framed: bool) -> tuple[nn.Module, Labelled, Labelled, Labelled]:
    """The network trained on mnist15k, 3,000 of its digits, 2,000 of USPS to adapt to and 2,000 others to measure on.

    MNIST leaves four of 28 pixels free around its digits and USPS none: `framed` takes them away, so that digits are as large.
    """
    source, (target, test) = _grey(data / "mnist15k.npz", edge=EDGE if framed else 0), _usps(data)
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(source.labels))[:3000])
    return (
        _digits_net(data, framed=framed),
        Labelled(source.inputs[rows], source.labels[rows]),
        target,
        test.first(2000),
    )


def _gas_net(data: Path) -> nn.Module:
    return deepcopy(gas(data, 0)[0])


def _gas(data: Path, *, batch: str) -> tuple[Labelled, Labelled]:
    """One later batch of gas measurements, its gases numbered without gaps: half to train on."""
    x, labels = gas(data, 0)[2][batch]
    labels = torch.unique(labels, return_inverse=True)[1]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    whole = Labelled(x[order].float(), labels[order])
    return whole.first(len(order) // 2), whole.after(len(order) // 2)


TASKS: Mapping[str, Task] = {
    **{f"gas batch {k}": Task(_gas_net, partial(_gas, batch=k), near=True) for k in ("3", "5", "6")},
    "usps": Task(_digits_net, _usps, near=True),
    "usps in one frame": Task(partial(_digits_net, framed=True), _usps, near=True),
    "tinyimagenet20": Task(RESNET, partial(_split, name="tinyimagenet20")),
    "pacs3": Task(RESNET, partial(_pacs, side=32, pixels=IMAGENET)),
    "pneumoniamnist": Task(RESNET, partial(_split, name="pneumoniamnist")),
    "pacs3, MobileNet": Task(MOBILENET, partial(_pacs, side=96, pixels=UNIT)),
}
