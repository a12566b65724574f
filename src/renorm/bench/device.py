"""Suite `device`: what renorm costs where it runs, a GPU above all, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from renorm.adapt import adapt_
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.layers import DOMAINS, DTYPES, IMAGES, ONE_BY_ONE, TORCH, ways_of
from renorm.bench.markdown import table as markdown
from renorm.errors import require
from renorm.layers import BNLSTM
from renorm.profile import profile
from renorm.recalibrate import recalibrate_

__all__ = ["Device"]

NETWORKS = ("resnet18", "resnet50")
SIDE = {"quick": 160, "full": 224}
STREAMED = (1, 16, 64, 256)
DENSE = 256  # images that a stream measures all of: fewer than by default, so that it is soon past them
ESTIMATED, BATCH = 512, 64  # images that statistics are re-estimated on
SHAPES = ((64, 56), (512, 28), (2048, 7))  # channels and side
TURNS = {"quick": 3, "full": 12}
SEQUENCE = (64, 28, 128)  # samples, steps, features and hidden units

Run = Callable[[], Any]


class Device(Suite):
    """Seconds of each way, the least of some turns, after as many calls as it takes to be what it stays."""

    name: ClassVar[str] = "device"
    revision: ClassVar[int] = 1
    timed: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for seed in range(self.seeds):
            for network in NETWORKS:
                for batch in STREAMED:
                    yield Cell.of(part="stream", on=network, batch=batch, seed=seed)
                for dtype in ("float32", "bfloat16", "float16"):
                    yield Cell.of(part="estimate", on=network, dtype=dtype, seed=seed)
            for dtype in DTYPES:
                for channels, side in SHAPES:
                    yield Cell.of(part="layers", dtype=dtype, channels=channels, side=side, seed=seed)
            yield Cell.of(part="recurrent", seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        torch.manual_seed(cell["seed"])
        match cell["part"]:
            case "stream":
                ways = self._streams(cell["on"], cell["batch"])
            case "estimate":
                ways = self._estimates(cell["on"], cell["dtype"])
            case "layers":
                ways = self._layers(cell["channels"], cell["side"], DTYPES[cell["dtype"]])
            case _:
                ways = self._recurrent()
        return self._least(ways)

    def _least(self, ways: Mapping[str, Run]) -> dict[str, float]:
        seconds = dict.fromkeys(ways, float("inf"))
        for turn in range(TURNS[self.size] + 1):
            for name, run in ways.items():
                if name.startswith(ONE_BY_ONE) and turn > 1:
                    continue  # sixteen times the work, for a figure that needs no digits
                self._settle()
                start = perf_counter()
                run()
                self._settle()
                if turn:
                    seconds[name] = min(seconds[name], perf_counter() - start)
        return seconds

    def _settle(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def _streams(self, network: str, batch: int) -> dict[str, Run]:
        """Plain inference and streams that are past their first images: alone, guarded, and with a profile."""
        side = SIDE[self.size]
        images = torch.randn(batch, 3, side, side, device=self.device)
        known = profile(self._network(network), [torch.randn(BATCH, 3, side, side) for _ in range(4)])
        streams: dict[str, Any] = {
            "batch": adapt_(self._network(network), "batch", guard=False),
            "shrink": adapt_(self._network(network), guard=False, dense=DENSE),
            "shrink+guard": adapt_(self._network(network), dense=DENSE),
            "shrink+profile+guard": adapt_(self._network(network), source=known, dense=DENSE),
        }
        many = images.repeat(-(-BATCH // batch), 1, 1, 1)
        for stream in streams.values():
            for _ in range(-(-DENSE // len(many)) + 1):
                stream(many)
        model = self._network(network)

        def plain() -> None:
            with torch.no_grad():
                model(images)

        calls = max(1, BATCH // batch) if batch < BATCH else 1
        ways: dict[str, Run] = {"plain": plain} | {
            name: _calling(stream, images) for name, stream in streams.items() if batch > 1 or name != "batch"
        }
        return {name: _often(run, min(calls, 16)) for name, run in ways.items()}

    def _estimates(self, network: str, dtype: str) -> dict[str, Run]:
        """torch's update_bn and ours over the same images, which wait on the processor as a loader's would."""
        side, model = SIDE[self.size], self._network(network)
        batches = [torch.randn(BATCH, 3, side, side) for _ in range(ESTIMATED // BATCH)]
        half = None if dtype == "float32" else getattr(torch, dtype)
        kind = torch.device(self.device).type

        def torchs() -> None:
            with torch.autocast(kind, dtype=half or torch.bfloat16, enabled=half is not None):
                update_bn(batches, model, device=torch.device(self.device))
            model.eval()

        return {
            "update_bn": torchs,
            "ours off": lambda: recalibrate_(model, batches, prior=0, autocast=half),
            "ours auto": lambda: recalibrate_(model, batches, autocast=half),
            "ours auto, channels last": lambda: recalibrate_(model, batches, autocast=half, channels_last=True),
        }

    def _layers(self, channels: int, side: int, dtype: torch.dtype) -> dict[str, Run]:
        with torch.device(self.device):
            ways = ways_of(channels)
            if dtype != torch.float32:  # torch's own kernels there take no weights wider than the values
                ways = {name: run for name, run in ways.items() if name not in ("group", "instance", "layer")}
            x, grad = (torch.randn(IMAGES, channels, side, side, dtype=dtype) for _ in range(2))
        return {name: _often(_learning(run, x, grad), 8) for name, run in ways.items()}

    def _recurrent(self) -> dict[str, Run]:
        samples, steps, width = SEQUENCE
        with torch.device(self.device):
            plain, ours = nn.LSTM(width, width, batch_first=True), BNLSTM(width, width, steps=steps, batch_first=True)
            x = torch.randn(samples, steps, width)

        def run(rnn: nn.Module) -> Run:
            return lambda: rnn(x)[0].square().mean().backward()

        return {"nn.LSTM": run(plain), "BNLSTM": run(ours)}

    def _network(self, name: str) -> nn.Module:
        models = require("torchvision.models", extra="bench", purpose="timing ResNets")
        made: nn.Module = getattr(models, name)(weights=None).eval().to(self.device)
        return made

    def table(self, rows: Sequence[Row]) -> str:
        parts = [ABOUT]
        for part, title in TITLES.items():
            mine = [row for row in rows if row.cell["part"] == part]
            parts += [f"## {title}\n", _ratios(mine, COMPARED[part])]
        return "\n".join(parts)


ABOUT = """\
To be run with `--device cuda`; the device computes in float32 without TF32, by deterministic kernels. Wall-clock time of each
way as a multiple of another's in the same cell, whose ways take turns, the least of some turns, the device waited for before
and after; median over cells with the smallest and the largest. Milliseconds are of a turn: 16 passes of single images, 4 of 16,
8 of a layer, else one. The least of turns of one pass is of a batch that `shrink` does not learn from, which three in four are,
and in batches of 16 of one that the guard does not judge. Random weights, random images.
"""
TITLES = {
    "stream": "A stream past its first images, which are all measured, against plain inference",
    "estimate": f"Statistics re-estimated on {ESTIMATED} images in batches of {BATCH}, against `update_bn`",
    "layers": f"Layers, forward and backward on {IMAGES} images, against `nn.BatchNorm2d`; {DOMAINS} domains in the batch",
    "recurrent": f"{SEQUENCE[1]} steps of {SEQUENCE[0]} sequences, {SEQUENCE[2]} units, trained, against `nn.LSTM`",
}
COMPARED = {"stream": "plain", "estimate": "update_bn", "layers": TORCH, "recurrent": "nn.LSTM"}


def _calling(stream: Any, images: Tensor) -> Run:
    return lambda: stream(images)


def _often(run: Run, times: int) -> Run:
    """`run` so many times, so that the device is busy for longer than the clock's grain."""

    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def _learning(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Run:
    def both() -> None:
        torch.autograd.backward(run(x.detach().requires_grad_()), grad)

    return both


def _ratios(rows: Sequence[Row], other: str) -> str:
    """A line for each way, a column for each point that was measured; the other's own line is in milliseconds."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(str(value) for name, value in row.cell.factors if name not in ("part", "seed"))
        points.setdefault(label, []).append(row)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    lines = []
    for name in names:
        line = [f"{name}, ms" if name == other else name]
        for group in points.values():
            found = [
                row.values[name] * (1000 if name == other else 1 / row.values[other])
                for row in group
                if name in row.values
            ]
            line.append(f"{np.median(found):.2f} ({min(found):.2f}–{max(found):.2f})" if found else "–")
        lines.append(line)
    return markdown(("way", *(label or "all" for label in points)), lines)
