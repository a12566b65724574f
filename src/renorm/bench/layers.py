"""Suite `layers`: what each layer costs beside `nn.BatchNorm2d`, at the shapes of a ResNet-50, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import process_time
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from renorm.bench.base import Cell, Row, Suite
from renorm.bench.markdown import table as markdown
from renorm.layers.base import catalogue

__all__ = ["DOMAINS", "DTYPES", "IMAGES", "ONE_BY_ONE", "TORCH", "Layers", "ways_of"]

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {  # channels and side
    "quick": ((64, 56), (512, 28), (2048, 7)),
    "full": ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)),
}
IMAGES = 16  # as many as there are domains
DOMAINS = 16
OPTIONS: dict[str, dict[str, Any]] = {"per_domain": {"domains": DOMAINS}, "ghost": {"size": 8}}
TURNS = {"quick": 4, "full": 12}  # of each way within a cell
COMPILED: dict[str, tuple[str, ...]] = {"quick": ("frozen", "shrink", "per_domain"), "full": tuple(catalogue())}
TORCH, ONE_BY_ONE = "torch", "a pass per domain"
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Multiples of nn.BatchNorm2d in training: forward and backward, forward alone.
LIMITS = {"both": 1.3, "forward": 2.0}
FROZEN = 0.6

Run = Callable[[Tensor], Tensor]


class Layers(Suite):
    """Seconds of a forward and backward, and of a forward alone, in training; the ways of a cell take turns."""

    name: ClassVar[str] = "layers"
    revision: ClassVar[int] = 1
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for dtype in DTYPES:
            for channels, side in SHAPES[self.size]:
                for seed in range(self.seeds):
                    yield Cell.of(part="eager", dtype=dtype, channels=channels, side=side, seed=seed)
        for seed in range(self.seeds):
            yield Cell.of(part="compiled", dtype="float32", channels=256, side=28, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        ways = ways_of(cell["channels"])
        if cell["part"] == "compiled":
            kept = {name: ways[name] for name in (TORCH, *COMPILED[self.size])}
            ways = kept | {f"{name} compiled": _compiled(run) for name, run in kept.items()}
        shape = (IMAGES, cell["channels"], cell["side"], cell["side"])
        generator = torch.Generator().manual_seed(cell["seed"])
        x, grad = (torch.randn(shape, generator=generator).to(DTYPES[cell["dtype"]]) for _ in range(2))
        return _least(ways, x, grad, turns=TURNS[self.size])

    def table(self, rows: Sequence[Row]) -> str:
        eager = [row for row in rows if row.cell["part"] == "eager"]
        compiled = [row for row in rows if row.cell["part"] == "compiled"]
        parts = [ABOUT, "## Targets\n", markdown(("layer", *_columns(), "verdict"), _verdicts(eager))]
        for pass_ in LIMITS:
            parts += [f"## {TITLES[pass_]}\n", markdown(("layer", *_shapes(eager)), _by_shape(eager, pass_))]
        parts += ["## Compiled: seconds of the compiled layer as a multiple of the eager `nn.BatchNorm2d`'s\n"]
        parts += [markdown(("layer", "eager", "compiled"), _compilations(compiled))]
        return "\n".join(parts)


ABOUT = f"""\
Ratios to the time of `nn.BatchNorm2d` in training, within one cell, whose ways take turns on the same {IMAGES} random
images. A time is the process' processor time, which other work on the machine moves least, in the least of the turns; a
ratio is the median over cells with the smallest and the largest.
`per_domain` has {DOMAINS} domains in the batch, one image each; `{ONE_BY_ONE}` runs the whole batch once for every domain
and keeps its part, as a layer that takes one domain per call must. Targets, for the median over shapes: forward and
backward at most {LIMITS["both"]}, `frozen` {FROZEN}; forward alone at most {LIMITS["forward"]:.0f}. A miss is left standing.
"""
TITLES = {"both": "Forward and backward, by shape", "forward": "Forward alone, by shape"}


def ways_of(channels: int) -> dict[str, Run]:
    """torch's batch norm, every layer of the catalogue, and a pass per domain, in training, where torch makes tensors now."""
    ids = torch.arange(IMAGES) % DOMAINS
    ways: dict[str, Run] = {TORCH: nn.BatchNorm2d(channels)}
    for name, layer in catalogue().items():
        made: Any = layer(channels, **OPTIONS.get(name, {}))
        ways[name] = partial(_told, made, ids) if name == "per_domain" else made
    norms = [nn.BatchNorm2d(channels) for _ in range(DOMAINS)]
    ways[ONE_BY_ONE] = partial(_one_by_one, norms, ids)
    return ways


def _told(layer: Any, ids: Tensor, x: Tensor) -> Tensor:
    y: Tensor = layer(x, ids)
    return y


def _one_by_one(norms: Sequence[nn.Module], ids: Tensor, x: Tensor) -> Tensor:
    parts = [norm(x)[ids == k] for k, norm in enumerate(norms)]
    return torch.cat(parts)[torch.argsort(torch.argsort(ids))]


def _compiled(run: Run) -> Run:
    return torch.compile(run)


def _least(ways: Mapping[str, Run], x: Tensor, grad: Tensor, *, turns: int) -> dict[str, float]:
    """The least seconds of each way over some turns, after one that does not count; keys `way both` and `way forward`."""
    seconds = {f"{name} {pass_}": float("inf") for name in ways for pass_ in LIMITS}
    for turn in range(turns + 1):
        for name, run in ways.items():
            if name == ONE_BY_ONE and turn != 1:
                continue  # sixteen times the work, for a figure that needs no digits
            for pass_ in LIMITS:
                values = x.clone().requires_grad_(pass_ == "both")
                start = process_time()
                with torch.set_grad_enabled(pass_ == "both"):
                    y = run(values)
                    if pass_ == "both":
                        torch.autograd.backward(y, grad)
                if turn:
                    key = f"{name} {pass_}"
                    seconds[key] = min(seconds[key], process_time() - start)
    return seconds


def _names(rows: Sequence[Row]) -> list[str]:
    return [key.removesuffix(" both") for key in rows[0].values if key.endswith(" both")] if rows else []


def _ratios(rows: Sequence[Row], name: str, pass_: str) -> list[float]:
    key = f"{name} {pass_}"
    return [row.values[key] / row.values[f"{TORCH} {pass_}"] for row in rows if key in row.values]


def _spread(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"


def _columns() -> list[str]:
    return [f"{dtype}, {words}" for dtype in DTYPES for words in ("forward and backward", "forward")]


def _verdicts(rows: Sequence[Row]) -> Iterator[list[str]]:
    for name in _names(rows):
        if name == TORCH:
            continue
        found, holds = [], True
        for dtype in DTYPES:
            group = [row for row in rows if row.cell["dtype"] == dtype]
            for pass_, limit in LIMITS.items():
                ratios = _ratios(group, name, pass_)
                limit = FROZEN if (name, pass_) == ("frozen", "both") else limit
                holds &= not ratios or bool(np.median(ratios) <= limit)
                found.append(_spread(ratios))
        yield [name, *found, "–" if name == ONE_BY_ONE else "pass" if holds else "**miss**"]


def _shapes(rows: Sequence[Row]) -> list[str]:
    return [f"{c} × {s}² {dtype}" for dtype in DTYPES for c, s in SHAPES["full"] if _at(rows, dtype, c, s)]


def _at(rows: Sequence[Row], dtype: str, channels: int, side: int) -> list[Row]:
    asked = {"dtype": dtype, "channels": channels, "side": side}
    return [row for row in rows if all(row.cell[k] == v for k, v in asked.items())]


def _by_shape(rows: Sequence[Row], pass_: str) -> Iterator[list[str]]:
    for name in _names(rows):
        groups = [group for dtype in DTYPES for c, s in SHAPES["full"] if (group := _at(rows, dtype, c, s))]
        if name == TORCH:
            times = [np.median([row.values[f"{TORCH} {pass_}"] for row in group]) * 1000 for group in groups]
            yield [f"{TORCH}, ms", *(f"{time:.1f}" for time in times)]
        else:
            yield [name, *(f"{np.median(_ratios(group, name, pass_)):.2f}" for group in groups)]


def _compilations(rows: Sequence[Row]) -> Iterator[list[str]]:
    for name in _names(rows):
        if not name.endswith(" compiled"):
            yield [name, _spread(_ratios(rows, name, "both")), _spread(_ratios(rows, f"{name} compiled", "both"))]
