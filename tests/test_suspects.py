"""The preprocessing detective names the planted mistake on real networks, and suspects nobody of a real shift."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renorm.bench import corruptions
from renorm.calls import Caller
from renorm.doctor import diagnose
from renorm.facts import Facts
from renorm.models import open_model
from renorm.rules.wrong_input import MISTAKES
from renorm.suspects import HALF, IMAGENET, Scaling, interrogate, suspects_of
from tests.data import shared

COUNT = 64


class Bed(NamedTuple):
    model: nn.Module
    own: Scaling
    pixels: Tensor  # (N, C, H, W) in [0, 1]


@cache
def bed(name: str) -> Bed:
    weights = {
        "resnet20": "resnet20-12fca82f.th",
        "resnet8": "resnet8_cifar10.pt",
        "mobilenet_vww": "mobilenet025_vww.pt",
    }
    data = "vww1000.npz" if name == "mobilenet_vww" else "cifar10_lossless_test200.npz"
    model = open_model(f"{shared('nets.py')}:{name}", checkpoint=shared(f"weights/{weights[name]}")).module
    cfg = model.pretrained_cfg
    images = np.load(shared(data))["images"][:COUNT]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return Bed(model, Scaling(mean=tuple(cfg["mean"]), std=tuple(cfg["std"])), pixels)


def planted(own: Scaling, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every mistake, made: the name that it should get, and the inputs that come of it."""
    right = own.normalise
    yield "channels in the order BGR", right(pixels.flip(1))
    yield "colours inverted", right(1 - pixels)
    yield "rows and channels mixed up", right(pixels).permute(0, 2, 3, 1).contiguous().reshape(pixels.shape)
    if own.mean[0]:
        yield "normalised twice", right(right(pixels))
        yield "not normalised", pixels
        yield "neither divided by 255 nor normalised", pixels * 255
        yield "normalised without dividing by 255", right(pixels * 255)
        yield "divided by 255 twice, then normalised", right(pixels / 255)
    else:
        yield "not divided by 255", right(pixels) * 255
        yield "divided by 255 twice", right(pixels) / 255
        yield "normalised as for ImageNet", IMAGENET.normalise(pixels)
    yield "normalised to [-1, 1]", HALF.normalise(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet8", "mobilenet_vww"])
def test_every_planted_mistake_is_named(name: str) -> None:
    model, own, pixels = bed(name)
    named = {}
    for mistake, inputs in list(planted(own, pixels))[:: 1 if name == "resnet20" else 3]:
        verdict = Facts(model, [inputs]).suspect
        named[mistake] = verdict.name if verdict else None
    assert named == {mistake: mistake for mistake in named}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet8", "mobilenet_vww"])
def test_nobody_is_suspected_of_right_inputs_and_of_real_shifts(name: str) -> None:
    model, own, pixels = bed(name)
    images = (pixels.permute(0, 2, 3, 1) * 255).byte().numpy()
    change = corruptions.small if pixels.shape[-1] == 32 else corruptions.photographs
    assert Facts(model, [own.normalise(pixels)]).suspect is None
    for kind in ("brightness", "contrast"):
        inputs = own.normalise(torch.from_numpy(change(images, kind)).permute(0, 3, 1, 2).float() / 255)
        assert Facts(model, [inputs]).suspect is None, kind


def test_a_wrong_transform_is_never_to_be_recalibrated() -> None:
    model, own, pixels = bed("resnet20")
    diagnosis = diagnose(model, [own.normalise(pixels * 255)])
    rules = {finding.rule for finding in diagnosis.findings}
    assert {"BN302", "BN303"} <= rules
    (wrong,) = (f for f in diagnosis.findings if f.rule == "BN303")
    assert wrong.severity == "error"
    assert wrong.site == "bn1"
    assert re.search(r"With that taken back the distance falls from [\d.]+ to 0\.", wrong.message)
    assert diagnosis.kind is None, "a mistake is no kind of shift"
    assert all(f.fix_ is None for f in diagnosis.findings if f.rule in ("BN301", "BN302", "BN303"))
    assert all("ecalibrate" not in f.advice or "do not" in f.advice for f in diagnosis.findings if f.rule == "BN302")


def test_every_suspect_has_its_words() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    names = {suspect.name for suspect in suspects_of(model)}
    for cfg in (
        {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8)},
        {"mean": (0, 0, 0), "std": (1, 1, 1)},
    ):
        model.pretrained_cfg = cfg
        names |= {suspect.name for suspect in suspects_of(model)}
    assert names == set(MISTAKES)


def test_a_repair_takes_the_mistake_back() -> None:
    own = Scaling(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.pretrained_cfg = {"mean": own.mean, "std": own.std}
    pixels = torch.rand(4, 3, 6, 6)
    repairs = {suspect.name: suspect.repair for suspect in suspects_of(model)}
    for mistake, inputs in planted(own, pixels):
        torch.testing.assert_close(repairs[mistake](inputs), own.normalise(pixels), atol=1e-4, rtol=1e-4)


def test_images_of_another_size_are_resized_and_those_of_the_right_one_are_not_asked_about() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    (resized,) = (suspect for suspect in suspects_of(model) if suspect.name == "not resized")
    assert resized.repair(torch.rand(2, 3, 20, 30)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="the size that it should have"):
        resized.repair(torch.rand(2, 3, 8, 8))


def test_what_is_no_image_is_not_asked_about() -> None:
    def never(batches: object) -> dict[str, float]:
        raise AssertionError("asked")

    verdict = interrogate(nn.Identity(), [torch.rand(4, 7)], {"0": 3.0}, never, Caller())
    assert verdict is None
