"""Suite `training`: is batch norm worth it? Steps and seconds to 95 %, with each layer of the catalogue and with none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.bench.base import Cell, Row, Suite
from renorm.bench.markdown import table as markdown
from renorm.layers.base import catalogue

__all__ = ["Training"]

GOAL = 95.0  # per cent of held-out images
RATES = (0.02, 0.1)  # of SGD with momentum 0.9; each way is shown at its best one
BATCHES = (2, 8, 64)
NONE = "none"
# Layers that choose nothing without domains, or that hold their first statistics for good, have nothing to show here.
WAYS = (NONE, *(name for name in catalogue() if name not in ("frozen", "per_domain", "split", "transferable", "sync")))
STEPS = {"digits": 600, "mnist15k": 400}
EVERY = {2: 20, 8: 10, 64: 5}  # steps between two looks
Data: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class Training(Suite):
    """Steps and seconds until a small network classifies 95 % of held-out digits; a run that never does has its limit."""

    name: ClassVar[str] = "training"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("mnist15k.npz",)
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        # what says most in the least time comes first: an interrupted run has a table too
        for batch in reversed(BATCHES):
            for way in WAYS:
                for rate in RATES:
                    for seed in range(self.seeds):
                        yield Cell.of(on="digits", batch=batch, way=way, rate=rate, seed=seed)
            if batch == BATCHES[-1]:
                yield from self._larger()

    def _larger(self) -> Iterator[Cell]:
        for way in WAYS if self.size == "full" else (NONE, "batch"):
            for rate in RATES:
                for seed in range(self.seeds):
                    yield Cell.of(on="mnist15k", batch=64, way=way, rate=rate, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        data = _data(cell["on"], self.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell["seed"])
            model = _network(cell["way"])
            return _trained(model, data, batch=cell["batch"], rate=cell["rate"], limit=STEPS[cell["on"]])

    def table(self, rows: Sequence[Row]) -> str:
        parts = [ABOUT]
        for on in STEPS:
            here = [row for row in rows if row.cell["on"] == on]
            parts += [f"## {on}\n", markdown(("layer", *_columns(here)), _lines(here))]
        return "\n".join(parts)


ABOUT = f"""\
Three convolutions of 16, 32 and 32 channels, each followed by the layer and a ReLU, then pooling and a linear head; SGD
with momentum 0.9, no schedule. Steps until {GOAL:.0f} % of the held-out images are right (looked at every few steps), then
processor seconds of training alone, at the best of the rates {", ".join(map(str, RATES))}: means over seeds, with the
smallest and the largest. "never" counts the seeds that did not get there within {STEPS["digits"]} steps (mnist15k:
{STEPS["mnist15k"]}), which enter at that number.
"""


def _network(way: str) -> nn.Sequential:
    parts: list[nn.Module] = []
    width = 1
    for channels, stride in ((16, 1), (32, 2), (32, 1)):
        norm = nn.Identity() if way == NONE else catalogue()[way](channels)
        parts += [nn.Conv2d(width, channels, 3, stride, padding=1), norm, nn.ReLU()]
        width = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def _trained(model: nn.Module, data: Data, *, batch: int, rate: float, limit: int) -> dict[str, float]:
    x, y, held_x, held_y = data
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    order = torch.cat([torch.randperm(len(x)) for _ in range(1 + limit * batch // len(x))])
    seconds = 0.0
    for step in range(1, limit + 1):
        rows = order[(step - 1) * batch : step * batch]
        start = process_time()
        optimiser.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[rows]), y[rows]))
        optimiser.step()
        seconds += process_time() - start
        if step % EVERY[batch] == 0 and _accuracy(model, held_x, held_y) >= GOAL:
            return {"steps": step, "seconds": seconds, "reached": 1.0}
    return {"steps": limit, "seconds": seconds, "reached": 0.0}


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        parts = zip(torch.split(x, 100), torch.split(y, 100), strict=True)
        right: int = sum(int((model(a).argmax(1) == b).sum()) for a, b in parts)
    model.train()
    return 100 * right / len(x)


@lru_cache(maxsize=2)
def _data(on: str, folder: Path) -> Data:
    """Images (N, 1, H, W) of mean 0 and sd 1, and labels, to train on and held out."""
    if on == "digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images, labels = digits.images.astype("float32"), digits.target
        chosen = np.random.default_rng(0).permutation(len(images))
        images, labels, cut = images[chosen], labels[chosen], 1297
    else:
        with np.load(folder / "mnist15k.npz") as file:
            images = np.concatenate([file["images"], file["images_test"][:1000]])[..., 0].astype("float32")
            labels, cut = np.concatenate([file["labels"], file["labels_test"][:1000]]), len(file["images"])
    x = torch.from_numpy((images - images[:cut].mean()) / images[:cut].std())[:, None]
    y = torch.from_numpy(labels).long()
    return x[:cut], y[:cut], x[cut:], y[cut:]


def _columns(rows: Sequence[Row]) -> list[str]:
    return [f"batch {b}: {what}" for b in _batches(rows) for what in ("steps", "seconds", "never", "rate")]


def _batches(rows: Sequence[Row]) -> list[int]:
    return [b for b in BATCHES if any(row.cell["batch"] == b for row in rows)]


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    for way in [way for way in WAYS if any(row.cell["way"] == way for row in rows)]:
        line = [way]
        for batch in _batches(rows):
            mine = [row for row in rows if row.cell["way"] == way and row.cell["batch"] == batch]
            line += _best(mine)
        yield line


def _best(rows: Sequence[Row]) -> list[str]:
    """Steps, seconds, seeds that never got there and the rate, at the rate with the fewest steps."""
    by_rate = {rate: [row for row in rows if row.cell["rate"] == rate] for rate in RATES}
    means = {rate: np.mean([row.values["steps"] for row in group]) for rate, group in by_rate.items() if group}
    if not means:
        return ["–"] * 4
    rate = min(means, key=lambda rate: float(means[rate]))
    steps, seconds = ([row.values[name] for row in by_rate[rate]] for name in ("steps", "seconds"))
    never = sum(row.values["reached"] == 0 for row in by_rate[rate])
    return [_spread(steps, 0), _spread(seconds, 1), str(never), str(rate)]


def _spread(values: Sequence[float], digits: int) -> str:
    low, mean, high = min(values), float(np.mean(values)), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
