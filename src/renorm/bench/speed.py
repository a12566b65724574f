"""Suite `speed`: time beside the peers', as ratios within one run, and the price of cheaper arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.adapt import adapt_
from renorm.bench import peers, speed_table, unrolled
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.beds import ResNet20, error
from renorm.errors import require
from renorm.recalibrate import recalibrate_

__all__ = ["Speed"]

NETWORKS = ("resnet18", "resnet50")
IMAGES, BATCH, SIDE = 96, 32, 224
REPETITIONS = {"quick": 2, "full": 7}  # per seed
MANY = 4000  # CIFAR images that update_bn reads and we stop within
TOLERANCES = (0.1, 0.05)

STREAMED = (64, 16, 1)
DENSE, LATER = 2048, 1024  # images of a stream: all of them measured, and those after

Way = Callable[[nn.Module, Sequence[Tensor]], Any]

# With `prior=0` alone certainty decides nothing; a tolerance that is never reached has it judged after every batch.
_EQUAL_IMAGES: dict[str, Way] = {
    "update_bn": peers.update_bn,
    "fvcore": peers.fvcore,
    "ours_off": lambda model, batches: recalibrate_(model, batches, prior=0),
    "ours_on": lambda model, batches: recalibrate_(model, batches, prior=0, tolerance=1e-9),
    "ours_auto": lambda model, batches: recalibrate_(model, batches),
}
_CHEAPER: dict[str, Way] = {
    "float32": lambda model, batches: recalibrate_(model, batches),
    "channels_last": lambda model, batches: recalibrate_(model, batches, channels_last=True),
    "bfloat16": lambda model, batches: recalibrate_(model, batches, autocast=torch.bfloat16),
    "both": lambda model, batches: recalibrate_(model, batches, autocast=torch.bfloat16, channels_last=True),
}


class Speed(Suite):
    """Ratios of times at equal images and at equal error; the ways of a cell take turns, so load hits all alike."""

    name: ClassVar[str] = "speed"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ResNet20.needs
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for network in NETWORKS:
            for turn in range(REPETITIONS[self.size] * self.seeds):
                yield Cell.of(part="equal images", on=network, seed=turn)
        for network in NETWORKS:
            for turn in range(self.seeds):
                yield Cell.of(part="cheaper", on=network, seed=turn)
        for size in STREAMED:
            for turn in range(self.seeds):
                yield Cell.of(part="stream", on=f"batches of {size}", seed=turn)
        for shape in unrolled.SHAPES:
            for turn in range(self.seeds):
                yield Cell.of(part="recurrent", on=shape, seed=turn)
        for turn in range(self.seeds if self.size == "full" else 1):  # a minute or more each, to compile
            yield Cell.of(part="recurrent, compiled", on=unrolled.COMPILED, seed=turn)
        for shift in ResNet20.shifts:
            for seed in range(self.seeds):
                yield Cell.of(part="equal error", on=shift, seed=seed)
                yield Cell.of(part="cheaper error", on=shift, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        if cell["part"] in ("equal images", "cheaper"):
            ways = _EQUAL_IMAGES if cell["part"] == "equal images" else _CHEAPER
            return _in_turns(ways, cell["on"], cell["seed"])
        if cell["part"].startswith("recurrent"):
            measure = unrolled.compiled if cell["part"].endswith("compiled") else unrolled.eager
            return measure(unrolled.SHAPES[cell["on"]], cell["seed"])
        if cell["part"] == "stream":
            bed = ResNet20(self.data, DENSE + LATER, 1)
            return _streaming(bed, int(cell["on"].rpartition(" ")[2]), cell["seed"])
        bed = ResNet20(self.data, MANY, 2000 if self.size == "full" else 1000)
        if cell["part"] == "equal error":
            return _stopping(bed, cell["on"], cell["seed"])
        return _cheaper_error(bed, cell["on"], cell["seed"])

    def table(self, rows: Sequence[Row]) -> str:
        return speed_table.table(rows)


def _in_turns(ways: Mapping[str, Way], network: str, turn: int) -> dict[str, float]:
    """Seconds of each way over the same random images; which one goes first moves on with every turn."""
    names = list(ways)
    names = names[turn % len(names) :] + names[: turn % len(names)]
    batches = _noise()
    seconds = {}
    for name in names:
        model = _untrained(network)
        gc.collect()
        start = perf_counter()
        ways[name](model, batches)
        seconds[name] = perf_counter() - start
    return seconds


def _stopping(bed: ResNet20, shift: str, seed: int) -> dict[str, float]:
    """update_bn over all images against ours that stops when tight: seconds, images read and error."""
    batches = bed.pool(shift, seed=seed).unlabelled()
    held_out = bed.held_out(shift, seed=seed)
    values = {}

    def measure(name: str, way: Way) -> None:
        model = bed.model()
        start = perf_counter()
        adaptation = way(model, batches)
        values[f"{name} seconds"] = perf_counter() - start
        values[f"{name} images"] = float(adaptation.samples if adaptation else sum(map(len, batches)))
        values[f"{name} error"] = error(model, held_out)

    measure("update_bn", peers.update_bn)
    for tolerance in TOLERANCES:
        measure(str(tolerance), partial(_stopped, tolerance=tolerance))
    return values


def _streaming(bed: ResNet20, size: int, seed: int) -> dict[str, float]:
    """Seconds of plain inference and of `shrink` on one shifted stream, batch by batch in turns: its beginning and later."""
    source = bed.model().to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[Tensor], Any]] = {"plain": torch.no_grad()(source)}
    for name, guard in (("shrink", False), ("guarded", True)):
        ways[name] = adapt_(bed.model().to(memory_format=torch.channels_last), guard=guard)
    seconds = {f"{name} {when}": 0.0 for name in ways for when in ("first", "later")}
    for number, inputs in enumerate(bed.pool("contrast", seed=seed).unlabelled(size)):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        when = "first" if number * size < DENSE else "later"
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = perf_counter()
            ways[name](inputs)
            seconds[f"{name} {when}"] += perf_counter() - start
    return seconds


def _stopped(model: nn.Module, batches: Sequence[Tensor], *, tolerance: float) -> Any:
    return recalibrate_(model, batches, tolerance=tolerance)


def _cheaper_error(bed: ResNet20, shift: str, seed: int) -> dict[str, float]:
    """The error, measured in float32, of statistics that were re-estimated with cheaper arithmetic."""
    batches = bed.pool(shift, seed=seed).first(1000).unlabelled()
    held_out = bed.held_out(shift, seed=seed)
    errors = {}
    for name, way in _CHEAPER.items():
        model = bed.model()
        way(model, batches)
        errors[name] = error(model, held_out)
    return errors


def _untrained(network: str) -> nn.Module:
    models = require("torchvision.models", extra="bench", purpose="timing ResNets")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(models, network)(weights=None)
    return model.eval()


@lru_cache(maxsize=1)
def _noise() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.split(torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator), BATCH))
