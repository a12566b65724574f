"""A recurrent network with batch norm as it is usually written, a loop of modules, beside `BNLSTM`: time of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from renorm.layers.recurrent.lstm import BNLSTM

__all__ = ["COMPILED", "SHAPES", "Unrolled", "compiled", "eager"]


class Shape(NamedTuple):
    """Samples, steps, values a step and hidden units."""

    samples: int
    steps: int
    width: int
    hidden: int


# The sequences of the suite architectures, and two others: few samples, and matrices that weigh more than the rest.
SHAPES: Mapping[str, Shape] = {
    "8 steps of 8": Shape(50, 8, 8, 64),
    "28 steps of 28": Shape(50, 28, 28, 64),
    "64 steps of 1": Shape(50, 64, 1, 64),
    "50 steps of 32, 16 samples": Shape(16, 50, 32, 128),
    "50 steps of 64, 256 hidden": Shape(64, 50, 64, 256),
}
COMPILED = "64 steps of 1"
TURNS, IN_A_ROW = 5, 4  # a way runs once unmeasured and then so often in a row, as in training


class Unrolled(nn.Module):
    """Two linear layers and three batch norms of torch's a step, as published implementations have it, but without masks."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden: int = shape.hidden
        self.from_input: nn.Linear = nn.Linear(shape.width, 4 * shape.hidden, bias=False)
        self.from_hidden: nn.Linear = nn.Linear(shape.hidden, 4 * shape.hidden, bias=False)
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(4 * shape.hidden))
        self.input_norms: nn.ModuleList = _norms(4 * shape.hidden, shape.steps)
        self.hidden_norms: nn.ModuleList = _norms(4 * shape.hidden, shape.steps)
        self.cell_norms: nn.ModuleList = _norms(shape.hidden, shape.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of all steps. Shapes: (N, T, C) → (N, T, H)."""
        h = c = x.new_zeros(len(x), self.hidden)
        outputs = []
        for t in range(x.shape[1]):
            gates = (
                self.input_norms[t](self.from_input(x[:, t])) + self.hidden_norms[t](self.from_hidden(h)) + self.bias
            )
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.cell_norms[t](c))
            outputs.append(h)
        return torch.stack(outputs, 1)


def _norms(channels: int, steps: int) -> nn.ModuleList:
    """One batch norm a step, of one weight and bias, which begin at 0.1 and 0."""
    norms = nn.ModuleList([nn.BatchNorm1d(channels) for _ in range(steps)])
    weight, bias = nn.Parameter(torch.full((channels,), 0.1)), nn.Parameter(torch.zeros(channels))
    for norm in norms:
        norm.register_parameter("weight", weight)
        norm.register_parameter("bias", bias)
    return norms


def eager(shape: Shape, turn: int) -> dict[str, float]:
    """Processor seconds of a forward and backward pass: the loop, ours, and torch's LSTM without batch norm."""
    x, models = _made(shape, turn)
    return _in_turns({name: _step(model, model, x) for name, model in models.items()}, turn)


def compiled(shape: Shape, turn: int) -> dict[str, float]:
    """The same of ours under `torch.compile` beside the loop, and the seconds of the first two steps, caches left aside."""
    x, models = _made(shape, turn)
    torch.compiler.reset()
    settings: Any = torch.compiler.config
    with settings.patch(force_disable_caches=True):
        ours: Any = torch.compile(models["ours"], dynamic=False)
        step = _step(ours, models["ours"], x)
        start = perf_counter()
        step()
        step()
        warm_up = perf_counter() - start
    seconds = _in_turns({"loop": _step(models["loop"], models["loop"], x), "compiled": step}, turn)
    return {**seconds, "warm_up": warm_up}


def _made(shape: Shape, seed: int) -> tuple[Tensor, dict[str, nn.Module]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(shape.samples, shape.steps, shape.width)
        ours = BNLSTM(shape.width, shape.hidden, steps=shape.steps, batch_first=True)
        plain = nn.LSTM(shape.width, shape.hidden, batch_first=True)
        return x, {"loop": Unrolled(shape), "ours": ours, "lstm": plain}


def _step(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        output = run(x)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        torch.autograd.backward(hidden[:, -1].sum())

    return step


def _in_turns(ways: Mapping[str, Callable[[], None]], turn: int) -> dict[str, float]:
    """The median of each way's turns, whose order moves on; a way's code and values are at hand when it is measured."""
    names, seconds = list(ways), {name: [0.0] * TURNS for name in ways}
    for k in range(TURNS):
        first = (turn + k) % len(names)
        for name in names[first:] + names[:first]:
            ways[name]()
            start = process_time()
            for _ in range(IN_A_ROW):
                ways[name]()
            seconds[name][k] = (process_time() - start) / IN_A_ROW
    return {name: sorted(found)[TURNS // 2] for name, found in seconds.items()}
