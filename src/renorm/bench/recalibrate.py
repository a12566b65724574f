"""Suite `recalibrate`: the error after re-estimating statistics, ours beside the peers', help and harm in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Any, ClassVar

from torch import nn

from renorm.bench import peers, recalibrate_table
from renorm.bench.base import Cell, Row, Suite, Value, vary
from renorm.bench.beds import BEDS, Bed, Labelled, error
from renorm.bench.corruptions import CLEAN
from renorm.profile import profile
from renorm.recalibrate import recalibrate_

__all__ = ["Recalibrate"]

CHECKED = 32  # labelled images of the target for check=; they do not adapt and are not measured
LABEL_SHIFTED = (CLEAN, "gaussian_noise", "contrast")
SIZES = {  # adapting and measured images at most
    ("resnet20", "quick"): (320, 150),
    ("resnet20", "full"): (4000, 2000),
    ("mobilenet_vww", "quick"): (300, 150),
    ("mobilenet_vww", "full"): (368, 200),  # there are no more photographs
}


@dataclass(frozen=True)
class Task:
    """What a way of recalibration is given: a fresh network, images to adapt to, a few labelled ones, the source."""

    model: nn.Module
    adapting: Labelled
    checking: Labelled
    bed: Bed
    seed: int


def _source(task: Task) -> None:
    return None


def _update_bn(task: Task) -> None:
    peers.update_bn(task.model, task.adapting.unlabelled())


def _fvcore(task: Task) -> None:
    peers.fvcore(task.model, task.adapting.unlabelled())


def _prior_0(task: Task) -> Any:
    return recalibrate_(task.model, task.adapting.unlabelled(), prior=0)


def _auto(task: Task) -> Any:
    return recalibrate_(task.model, task.adapting.unlabelled())


def _check(task: Task) -> Any:
    batches = task.adapting.unlabelled()  # who has no labels has no other images to check on either
    return recalibrate_(task.model, batches, check=batches)


def _check_32(task: Task) -> Any:
    return recalibrate_(task.model, task.adapting.unlabelled(), check=task.checking.batches())


def _profile(task: Task) -> Any:
    known = _known(task.bed, task.seed)
    return recalibrate_(task.model, task.adapting.unlabelled(), source=known)


WAYS: dict[str, Callable[[Task], Any]] = {
    function.__name__.removeprefix("_"): function
    for function in (_source, _update_bn, _fvcore, _prior_0, _auto, _check, _check_32, _profile)
}


@lru_cache(maxsize=4)
def _known(bed: Bed, seed: int) -> Any:
    """The profile of a bed's source; made once, as its owner would."""
    return profile(bed.model(), bed.source(seed=seed).batches())


class Recalibrate(Suite):
    """ResNet-20 on CIFAR-10 and MobileNet on photographs: shifted or not, few images or many, all classes or some."""

    name: ClassVar[str] = "recalibrate"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in BEDS.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        for name, bed in BEDS.items():
            for shift in bed.shifts:
                for seed in range(self.seeds):
                    for point in _grid(bed, shift):
                        # The source does not depend on how many images adapt: it is measured once.
                        for way in WAYS if point["images"] == "all" else list(WAYS)[1:]:
                            yield Cell.of(bed=name, shift=shift, **point, seed=seed, way=way)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        most, measured = SIZES[cell["bed"], self.size]
        bed = BEDS[cell["bed"]](self.data, most + CHECKED, measured)
        chosen = {"seed": cell["seed"], "classes": cell["classes"]}
        pool = bed.pool(cell["shift"], **chosen)
        adapting = pool.after(CHECKED)
        if cell["images"] != "all":
            adapting = adapting.first(cell["images"])
        task = Task(bed.model(), adapting, pool.first(CHECKED), bed, cell["seed"])
        if cell["way"] == "profile":
            _known(bed, cell["seed"])  # made beforehand: its time is spent by the source's owner
        start = perf_counter()
        adaptation = WAYS[cell["way"]](task)
        seconds = perf_counter() - start
        values = {
            "error": error(task.model, bed.held_out(cell["shift"], **chosen)),
            "images": len(adapting.labels),
            "adapting_seconds": seconds,
        }
        return values if adaptation is None else {**values, "accepted": float(adaptation.accepted)}

    def table(self, rows: Sequence[Row]) -> str:
        return recalibrate_table.table(rows)


def _grid(bed: type[Bed], shift: str) -> list[dict[str, Value]]:
    """All images of all classes; fewer images; and, for some shifts, fewer classes."""
    fewer = [count for count in (5, 3, 1) if count < bed.classes] if shift in LABEL_SHIFTED else []
    return vary({"images": "all", "classes": bed.classes}, images=(256, 64, 16), classes=fewer)
