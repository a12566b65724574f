"""Suite `fold`: how many batch norms of which networks are folded, how far the answers move, and what it saves.

Weights are random; statistics and affine parameters are drawn so that a wrong fold shows.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from time import perf_counter, process_time
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from renorm.bench import fold_table, peers
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.fold_models import NAMED, OTHERS, SIDES
from renorm.errors import require
from renorm.fold import fold
from renorm.prove import distance
from renorm.sites import find_sites

__all__ = ["FoldNorms"]

TIMED = ("resnet50", "mobilenetv3_large_100", "efficientnet_b0")
BATCH, SIDE, REPEATS = 4, 224, 3
PROFILED = (4, 16)  # images: torch takes other kernels for 1 × 1 convolutions from 16 on, or on several threads


class FoldNorms(Suite):
    """Ours, a fold by order of registration (as mmcv does) and torch.fx, on the same networks with the same example."""

    name: ClassVar[str] = "fold"
    revision: ClassVar[int] = 1
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for model in (*NAMED, *OTHERS) if self.size == "full" else NAMED:
            yield Cell.of(part="answers", on=model)
        for model in TIMED:
            for seed in range(self.seeds):
                yield Cell.of(part="time", on=model, seed=seed)
        for images in PROFILED:
            yield Cell.of(part="profile", on="resnet50", images=images)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        if cell["part"] == "answers":
            return _answers(cell["on"])
        if cell["part"] == "profile":
            return _profile(cell["on"], cell["images"])
        return _times(cell["on"], cell["seed"])

    def table(self, rows: Sequence[Row]) -> str:
        return fold_table.table(rows)


def _answers(name: str) -> dict[str, float]:
    """How many are left, and how far the output is from the model's, for each way."""
    model, example = _lived(name), _noise(1, SIDES[name])
    with torch.no_grad():
        expected = [model(example)]
    start = perf_counter()
    folded = fold(model, example)
    values = {
        "norms": float(_left(model)),
        "folded": float(len(folded.folded)),
        "error": folded.max_rel_error,
        "site error": max(folded.errors.values(), default=0.0),
        "own rounding": math.nan if folded.own_rounding is None else folded.own_rounding,
        "seconds": perf_counter() - start,
    }
    for why in folded.kept.values():
        key = f"why {fold_table.kind(why)}"
        values[key] = values.get(key, 0.0) + 1
    for peer, way in PEERS.items():
        values |= {f"{peer} {key}": value for key, value in _peer(way, model, example, expected).items()}
    return values


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {"mmcv": peers.fuse_in_order, "fx": peers.fuse_by_graph}


def _peer(
    way: Callable[[nn.Module], nn.Module], model: nn.Module, example: Tensor, expected: Sequence[Tensor]
) -> dict[str, float]:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            made = way(model)
            error = distance(expected, [made(example)])
    except Exception:  # it cannot trace the model, or made one that does not run
        return {"folded": 0.0, "error": math.nan, "failed": 1.0}
    return {"folded": float(_left(model) - _left(made)), "error": error, "failed": 0.0}


def _left(model: nn.Module) -> int:
    return sum(site.kind == "batch" and site.tensors is not None for site in find_sites(model))


def _times(name: str, seed: int) -> dict[str, float]:
    """Seconds of a forward, the median of some, by each way in turns; which one goes first moves on with the seed."""
    ways, example = _ways(name), _noise(BATCH, SIDE).contiguous(memory_format=torch.channels_last)
    names = list(ways)
    names = names[seed % len(names) :] + names[: seed % len(names)]
    seconds: dict[str, list[float]] = {way: [] for way in names}
    with torch.no_grad():
        for _ in range(REPEATS):
            for way in names:
                start = perf_counter()
                ways[way](example)
                seconds[way].append(perf_counter() - start)
    return {way: sorted(times)[len(times) // 2] for way, times in seconds.items()}


def _profile(name: str, images: int) -> dict[str, float]:
    """Where a forward's time goes, by torch's profiler, and how much processor time folding saves, the best of some turns."""
    model = _lived(name).to(memory_format=torch.channels_last)
    example = _noise(images, SIDE).contiguous(memory_format=torch.channels_last)
    folded = fold(model, example[:1]).model
    values: dict[str, float] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example)  # type: ignore[no-untyped-call]
        ways = {"eager": model, "folded": folded, "optimised": torch.jit.optimize_for_inference(traced)}
        for way in ways.values():
            way(example)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(REPEATS):
            for key, way in ways.items():
                start = process_time()
                way(example)
                seconds[key].append(process_time() - start)
        values |= {way: min(times) for way, times in seconds.items()}
        for key in ("eager", "folded"):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                ways[key](example)
            events = seen.key_averages()
            whole = sum(event.self_cpu_time_total for event in events)
            for part in ("native_batch_norm", "copy_", "_slow_conv2d_forward"):
                found = [event for event in events if event.key == f"aten::{part}"]
                values[f"{key} {part}"] = sum(event.self_cpu_time_total for event in found) / whole
                values[f"{key} {part} calls"] = float(sum(event.count for event in found))
    return values


@lru_cache(maxsize=1)
def _ways(name: str) -> dict[str, Callable[[Tensor], Any]]:
    """The forwards that are timed, each warmed up; with channels last, as images are run fastest here."""
    gc.collect()
    torch.compiler.reset()
    model = _lived(name).to(memory_format=torch.channels_last)
    example = _noise(BATCH, SIDE).contiguous(memory_format=torch.channels_last)
    folded = fold(model, example[:1]).model
    ways: dict[str, Callable[[Tensor], Any]] = {"eager": model, "folded": folded}
    try:
        ways["fx"] = peers.fuse_by_graph(model)
    except Exception:  # it cannot trace every model
        pass
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, plain in (("compiled", model), ("folded, compiled", folded)):
            ways[key] = torch.compile(plain, dynamic=False)
        for way in ways.values():
            way(example)
    return ways


def _noise(samples: int, side: int) -> Tensor:
    return torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(1))


def _lived(name: str) -> nn.Module:
    """The network with random weights, and batch norms as far from the identity as training leaves them."""
    timm = require("timm", extra="bench", purpose="folding timm's networks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, num_classes=10)
        for site in find_sites(model):
            if site.kind == "batch" and site.tensors is not None:
                mean, var = site.tensors
                mean.normal_(0.1, 0.4)
                var.uniform_(0.5, 2.0)
                with torch.no_grad():
                    for name, middle in (("weight", 1.0), ("bias", 0.0)):
                        if isinstance(held := getattr(site.module, name, None), Tensor):
                            held.uniform_(middle - 0.4, middle + 0.4)
    return model.eval()
