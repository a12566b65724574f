"""Suite `estimate`: accuracy estimated without labels against the truth, and whether the kind of shift is told rightly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from renorm.accuracy import Home, mean_moved, signals
from renorm.bench import estimate_table
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import Bed, Labelled, MobileNetVWW, ResNet20, error
from renorm.bench.corruptions import CLEAN
from renorm.bench.strangers import Digits, XRays
from renorm.facts import LOOKED, Facts
from renorm.methods.equal_mix import class_mix
from renorm.profile import Profile, profile

__all__ = ["Estimate"]

CONTENT = "other_classes"  # photographs of twenty things that the network was never taught: nothing it says is right
HALF = "@half"  # the mean of the image and its corrupted copy
MEASURED = 600


class HeldOut20(ResNet20):
    """ResNet-20, its source known from 200 lossless test images, as its owner would hold out."""

    needs: ClassVar[tuple[str, ...]] = (*ResNet20.needs, "cifar10_lossless_test200.npz", "tinyimagenet20.npz")
    shifts: ClassVar[tuple[str, ...]] = (
        CLEAN,
        *("gaussian_noise", "impulse_noise", "defocus_blur", "fog", "contrast", "pixelate"),
        *(f"{kind}{HALF}" for kind in ("gaussian_noise", "fog", "pixelate")),
    )

    def source(self, *, seed: int) -> Labelled:
        with np.load(self.data / "cifar10_lossless_test200.npz", allow_pickle=False) as file:
            return self._ready(file["images"], file["labels"])

    def _images(self, shift: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
        if shift == CONTENT:
            return _others(str(self.data / "tinyimagenet20.npz"))
        whole, labels = super()._images(shift.removesuffix(HALF))
        if not shift.endswith(HALF):
            return whole, labels
        clean = super()._images(CLEAN)[0]
        return ((clean.astype(np.uint16) + whole + 1) // 2).astype(np.uint8), labels

    def _parts(self, seed: int) -> Any:
        order = np.random.default_rng([seed, 2]).permutation(2000)
        return order[:MEASURED], order[MEASURED:]


class HeldOut8(HeldOut20):
    """ResNet-8 likewise."""

    name = "resnet8"
    needs: ClassVar[tuple[str, ...]] = (*HeldOut20.needs, "weights/resnet8_cifar10.pt")

    def _network(self) -> tuple[str, str]:
        return "resnet8", "weights/resnet8_cifar10.pt"

    def _pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * 3, (1 / 255,) * 3


NETS: dict[str, type[Bed]] = {bed.name: bed for bed in (HeldOut8, HeldOut20, MobileNetVWW, Digits, XRays)}
MIXED = (CLEAN, "gaussian_noise", "contrast")


class Estimate(Suite):
    """Networks under corruptions, other class mixes and unknown classes; every estimate beside the truth."""

    name: ClassVar[str] = "estimate"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in NETS.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        for name, bed in NETS.items():
            for shift in bed.shifts:
                fewer = [count for count in (3, 1) if count < bed.classes] if shift in MIXED else []
                for classes in (bed.classes, *fewer):
                    for seed in range(self.seeds):
                        yield Cell.of(bed=name, shift=shift, classes=classes, seed=seed)
            if issubclass(bed, HeldOut20):
                for seed in range(self.seeds):
                    yield Cell.of(bed=name, shift=CONTENT, classes=bed.classes, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        bed = NETS[cell["bed"]](self.data, MEASURED, MEASURED)
        known = _known(bed, cell["seed"])
        taken = bed.pool(cell["shift"], seed=cell["seed"], classes=cell["classes"])
        model, batches = bed.model(), taken.first(LOOKED).unlabelled()
        facts = Facts(model, batches, known)
        values = _traces(facts, known)
        counts = torch.bincount(taken.labels, minlength=bed.classes)[: bed.classes].double()
        values["true_classes"] = _apart(counts / counts.sum(), known.prior)
        if cell["shift"] != CONTENT:
            values["accuracy"] = 1 - error(model, taken) / 100
        return values

    def table(self, rows: Sequence[Row]) -> str:
        return estimate_table.table(rows)


def _traces(facts: Facts, known: Profile) -> dict[str, float]:
    """What both questions are answered from, with a profile and without."""
    seen, home = facts.look, Home.known(known)
    assert seen is not None
    assert seen.mixed is not None
    assert home is not None
    found = signals(seen, moved=facts.moved, home=home)
    equal = torch.full_like(known.prior, 1 / len(known.prior))
    values = {name: float(value) for name, value in found._asdict().items() if value is not None}
    return values | {
        "moved_alone": mean_moved(shift.moved for shift in facts.shifts.values()),
        "distance": sum(facts.distances.values()) / max(1, len(facts.distances)),
        "samples": float(len(seen.source)),
        "home": home.accuracy,
        "home_confidence": home.confidence,
        "classes": _apart(_mix(seen.mixed, known.prior), known.prior),
        "classes_alone": _apart(_mix(seen.source, equal), equal),
        "classes_pooled": _apart(_mix(seen.pooled, equal), equal),
        "sure": float(seen.mixed.amax(1).mean()),
        "sure_pooled": float(seen.pooled.amax(1).mean()),
    }


def _mix(probabilities: Tensor, prior: Tensor) -> Tensor:
    return class_mix(probabilities, prior, doubt=0.1)


def _apart(mix: Tensor, prior: Tensor) -> float:
    return 0.5 * float((mix - prior).abs().sum())


@lru_cache(maxsize=4)
def _known(bed: Bed, seed: int) -> Profile:
    return profile(bed.model(), bed.source(seed=seed).batches())


@lru_cache(maxsize=1)
def _others(path: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    with np.load(path, allow_pickle=False) as file:
        return file["images"], np.zeros(len(file["images"]), dtype=np.int64)
