"""Suite `online`: streams that help and streams that harm, every method on each, with the guard and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
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
from renorm.bench.series import SERIES
from renorm.bench.streams import stream
from renorm.online.base import catalogue
from renorm.profile import profile

__all__ = ["Online"]

IMAGES = {"quick": 400, "full": 1000}
MEASURED = 1  # the streams are what is measured; beds want a part beside them
GRADIENT = ("tent", "eata", "rdumb", "roid", "tbr")
OURS = ("source", "shrink", "shrink+guard", "shrink+profile", "shrink+profile+guard")
SINGLE = ("source", "prior", "ema", *OURS[1:])  # one image at a time
FEW = ("source", "batch", "ema", *OURS[1:])  # on streams beside the plain ones
QUICK = (*OURS, "batch", "prior", "ema", "hybrid+profile", "lame", "unmix", "tent", "tent+guard", "tbr")
BASE = "contrast"  # the shift of streams with more than one domain
PLAIN = ("iid", "bursts", "sorted")
NEEDS = (*(bed.needs for bed in BEDS.values()), *(series.needs for series in SERIES.values()))


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
    """Networks on images, gas sensors and heart beats, as streams: shifted, sorted, mixed, poisoned, in time, one by one."""

    name: ClassVar[str] = "online"
    revision: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(file for needs in NEEDS for file in needs))

    def cells(self) -> Iterator[Cell]:
        """Our own ways and plain orders first: a full run is useful long before it ends."""
        for rank in range(3):
            for seed in range(self.seeds):
                for bed, shift, point in self._streams():
                    for way in WAYS.values():
                        wanted = self.size == "full" or _quick(way, point)
                        if wanted and _apt(way, point) and rank == _rank(way, point):
                            yield Cell.of(bed=bed, shift=shift, **point, seed=seed, way=way.name)

    def _streams(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        quick = self.size == "quick"
        default: dict[str, Value] = {"stream": "iid", "batch": 64, "long": False}
        for name, series in SERIES.items():
            for order in series.orders:
                yield name, "as it came", {**default, "stream": order}
        for name, bed in BEDS.items():
            for shift in (CLEAN, BASE) if quick else bed.shifts:
                for point in _grid(default, shift == BASE, quick=quick):
                    yield name, shift, point

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        images = IMAGES[self.size] * (10 if cell["long"] else 1)
        way, seed = WAYS[cell["way"]], cell["seed"]
        if cell["bed"] in SERIES:
            series = SERIES[cell["bed"]].make(self.data, cell["stream"], seed, images)
            model, came = deepcopy(series.model), series.came
            known = series.profile() if way.profile else None
        else:
            bed = BEDS[cell["bed"]](self.data, images, MEASURED)
            model, came = bed.model(), stream(bed, cell["stream"], cell["shift"], seed=seed, images=images)
            known = _known(bed, seed) if way.profile else None
        laid = torch.channels_last if came.inputs.dim() == 4 else torch.contiguous_format
        adapting = adapt_(model.to(memory_format=laid), way.method, source=known, guard=way.guard)
        answers, start = [], process_time()
        for inputs in torch.split(came.inputs, cell["batch"]):
            answers.append(adapting(inputs.contiguous(memory_format=laid)).argmax(1))
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


def _grid(default: dict[str, Value], base: bool, *, quick: bool) -> list[dict[str, Any]]:
    """Every order at batches of 64, and other batch sizes in random order; streams of several domains once."""
    others = () if quick else ("dirichlet", "poisoned")
    points = vary(default, stream=(*PLAIN, *others), batch=(1,) if quick else (1, 4, 16, 200))
    if base:
        kinds = ("after", "poisoned") if quick else ("mixed", "changing", "drift", "after")
        points += [{**default, "stream": kind} for kind in kinds]
        points += [] if quick else [{**default, "long": True}]
    return points


def _plain(point: Mapping[str, Any]) -> bool:
    return point["stream"] in PLAIN and point["batch"] == 64 and not point["long"]


def _apt(way: Way, point: Mapping[str, Any]) -> bool:
    """Whether a way says something there: methods with gradients on plain streams, of single images those that remember."""
    if point["batch"] == 1:
        return way.name in SINGLE
    return way.method not in GRADIENT or _plain(point) or point["long"]


def _quick(way: Way, point: Mapping[str, Any]) -> bool:
    """Whether the quick size has time for it: RDumb and ROID have not, and EATA hardly differs from TENT in short streams."""
    return way.name in (QUICK if _plain(point) else FEW)


def _rank(way: Way, point: Mapping[str, Any]) -> int:
    """0 for our own ways and plain batches on plain streams and of single images; 2 for methods with gradients."""
    if way.name in (*OURS, "batch") and (_plain(point) or point["batch"] == 1 or point["stream"] in ORDERED):
        return 0
    return 2 if way.method in GRADIENT or point["long"] else 1


@lru_cache(maxsize=4)
def _known(bed: Bed, seed: int) -> Any:
    """The profile of a bed's source; made once, as its owner would."""
    return profile(bed.model(), bed.source(seed=seed).batches())


ORDERED = tuple(dict.fromkeys(order for series in SERIES.values() for order in series.orders))
