"""Suite `online`: streams that help and streams that harm, every method on each, with the guard and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import process_time
from typing import Any, ClassVar

import torch

from renorm.adapt import adapt_
from renorm.bench import online_table
from renorm.bench.base import Cell, Row, Suite, Value, vary
from renorm.bench.beds import BEDS, Bed
from renorm.bench.corruptions import CLEAN
from renorm.bench.streams import stream
from renorm.online.base import catalogue
from renorm.profile import profile

__all__ = ["Online"]

IMAGES = {"quick": 400, "full": 1000}
MEASURED = 1  # the streams are what is measured; beds want a part beside them
GRADIENT = ("tent", "eata", "rdumb", "roid", "tbr")
FEW = ("source", "batch", "ema", "shrink", "shrink+guard", "shrink+profile+guard")  # on streams beside the plain ones
SINGLE = ("source", "prior", "ema", "shrink", "shrink+guard", "shrink+profile")  # one image at a time
BASE = "contrast"  # the shift of streams with more than one domain
SHIFTS = {
    "resnet20": (CLEAN, "gaussian_noise", BASE),
    "mobilenet_vww": (CLEAN, "brightness", BASE),
}


@dataclass(frozen=True)
class Way:
    """How a stream is adapted to: a method, whether it knows a profile of the source, whether the guard is on."""

    method: str
    profile: bool = False
    guard: bool = False

    @property
    def name(self) -> str:
        return self.method + ("+profile" if self.profile else "") + ("+guard" if self.guard else "")


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        *(Way(name, profile=name == "hybrid") for name in catalogue()),
        *(Way(name, guard=True) for name in (*GRADIENT, "shrink")),
        Way("shrink", profile=True),
        Way("shrink", profile=True, guard=True),
    )
}


class Online(Suite):
    """ResNet-20 on CIFAR-10 and MobileNet on photographs, as streams: shifted, sorted, mixed, poisoned, one by one."""

    name: ClassVar[str] = "online"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for bed in BEDS.values() for file in bed.needs))

    def cells(self) -> Iterator[Cell]:
        quick = self.size == "quick"
        for seed in range(self.seeds):
            for name, bed in BEDS.items():
                for shift in SHIFTS[name] if quick else bed.shifts:
                    for point in _grid(shift == BASE, quick=quick):
                        for way in WAYS.values():
                            if not quick or _worth_while(way, shift, point):
                                yield Cell.of(bed=name, shift=shift, **point, seed=seed, way=way.name)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        images = IMAGES[self.size] * (10 if cell["long"] else 1)
        bed, way = BEDS[cell["bed"]](self.data, images, MEASURED), WAYS[cell["way"]]
        came = stream(bed, cell["stream"], cell["shift"], seed=cell["seed"], images=images)
        model = bed.model().to(memory_format=torch.channels_last)
        known = _known(bed, cell["seed"]) if way.profile else None
        adapting = adapt_(model, way.method, source=known, guard=way.guard)
        answers, start = [], process_time()
        for inputs in torch.split(came.inputs, cell["batch"]):
            answers.append(adapting(inputs.contiguous(memory_format=torch.channels_last)).argmax(1))
        seconds = process_time() - start
        wrong = (torch.cat(answers) != came.labels)[came.counted]
        state = sum(value.numel() * value.element_size() for value in adapting.state_dict().values())
        believed = [step.believed for step in adapting.log]
        return {
            "error": 100 * float(wrong.double().mean()),
            "milliseconds": 1000 * seconds / len(came.labels),
            "state_bytes": state,
            "believed": sum(believed) / len(believed),
        }

    def table(self, rows: Sequence[Row]) -> str:
        return online_table.table(rows, WAYS)


def _grid(base: bool, *, quick: bool) -> list[dict[str, Any]]:
    """Every order at batches of 64, and other batch sizes in random order; streams of several domains once."""
    default: dict[str, Value] = {"stream": "iid", "batch": 64, "long": False}
    orders = ("bursts", "sorted", "dirichlet", "poisoned") if base or not quick else ("bursts", "sorted")
    points = vary(default, stream=orders, batch=(1,) if quick else (1, 4, 16, 200))
    if base:
        points += [{**default, "stream": kind} for kind in ("mixed", "changing", "drift", "after")]
        points += [] if quick else [{**default, "long": True}]
    return points


def _worth_while(way: Way, shift: str, point: Mapping[str, Any]) -> bool:
    """Whether the quick size has time for it; in streams this short RDumb is EATA, and EATA hardly differs from TENT."""
    plain = point["stream"] in ("iid", "bursts", "sorted") and point["batch"] == 64
    if way.method in GRADIENT:
        return way.method not in ("rdumb", "eata") and plain and shift in (CLEAN, BASE)
    return plain or way.name in (SINGLE if point["batch"] == 1 else FEW)


@lru_cache(maxsize=4)
def _known(bed: Bed, seed: int) -> Any:
    """The profile of a bed's source; made once, as its owner would."""
    return profile(bed.model(), bed.source(seed=seed).batches())
