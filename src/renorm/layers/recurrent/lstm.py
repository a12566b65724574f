"""An LSTM with batch norm between input and gates, hidden state and gates, and cell and output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.layers.recurrent.base import AtStep, Input, Packed, Recurrent, like
from renorm.layers.recurrent.whole import whole_lstm


class BNLSTM(Recurrent):
    """`i, f, g, o = BN(W_h h) + BN(W_x x) + b`, `c' = σ(f) c + σ(i) tanh(g)`, `h' = σ(o) tanh(BN(c'))`, with torch's face.

    `output, (h, c) = rnn(input, (h0, c0), lengths=None)`. Each norm has statistics for each of the first `steps` steps; later
    ones reuse the last. Norms start with a weight of 0.1 and no bias of their own but the cell's; the forget gate's bias is 1.
    With `from_lstm`, a network of torch's becomes one of these that gives the same in evaluation.

    Cooijmans et al. 2017, equations 6 to 8.
    """

    gates: ClassVar[int] = 4
    states: ClassVar[int] = 2
    norms: ClassVar[tuple[str, ...]] = ("input", "hidden", "cell")

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, *, steps: int = 100, eps: float = 1e-5, momentum: float | None = 0.1) -> BNLSTM:
        """A network with the weights of `lstm` that gives, in evaluation, what `lstm` gives, until it is trained.

        Its norms hold mean 0 and variance 1, and a weight of √(1 + ε) in place of 0.1. In training they normalise by the batch:
        what the weights were made for is then at another scale, so train on, or set the statistics by `recalibrate_` and then
        check. Raises UsageError for something else than an nn.LSTM, or one with projections.
        """
        if not isinstance(lstm, nn.LSTM):
            raise UsageError(f"from_lstm makes a BNLSTM of an nn.LSTM; got {type(lstm).__name__}.")
        made = cls(**like(lstm), steps=steps, eps=eps, momentum=momentum)
        made._take_(lstm)
        return made

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("bias_ih"):
                    parameter.chunk(self.gates)[1].fill_(1)

    def forward(
        self, input: Input, hx: tuple[Tensor, Tensor] | None = None, lengths: Any = None
    ) -> tuple[Input, tuple[Tensor, Tensor]]:
        output, (h, c) = self._run(input, hx, lengths)
        return output, (h, c)

    def _scan(
        self, data: Tensor, packed: Packed, state: tuple[Tensor, ...], suffix: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        norms = self._norms(suffix)
        plain = all(norm.training and not norm.hooked for norm in norms.values())  # one may be frozen
        if not plain or not self._in_one(data, packed.sizes):
            return super()._scan(data, packed, state, suffix)
        passing = {name: norm.begin(packed.sizes, packed.unsorted) for name, norm in norms.items()}
        bias = self._input_bias(suffix)
        hidden, cell = whole_lstm(
            data,
            (state[0], state[1]),
            (self.get_parameter(f"weight_ih{suffix}"), self.get_parameter(f"weight_hh{suffix}")),
            [(norm.weight, bias if name == "input" else norm.bias) for name, norm in norms.items()],
            [(each.mean, each.unbiased) for each in passing.values()],
            packed.sizes,
            [norm.eps for norm in norms.values()],
        )
        for name, norm in norms.items():
            norm.track_(passing[name])
        return hidden, (_last(hidden, packed.sizes), cell)

    def _in_one(self, data: Tensor, sizes: Sequence[int]) -> bool:
        """Whether a sequence can be one node of autograd's: in training, every step with a variance, nothing else to see it."""
        alike = data.dtype == self.get_parameter("weight_hh_l0").dtype
        plain = not torch.is_autocast_enabled(data.device.type) and not torch.compiler.is_compiling()
        return self.training and torch.is_grad_enabled() and alike and plain and min(sizes) > 1

    def _input_bias(self, suffix: str) -> Tensor | None:
        bias = super()._input_bias(suffix)
        return None if bias is None else bias + self.get_parameter(f"bias_hh{suffix}")

    def _step(
        self, x: Tensor, state: tuple[Tensor, ...], norm: AtStep, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, c = state
        gates = x + norm("hidden", F.linear(h, weight))  # both biases are in x
        i, f, _, o = gates.sigmoid().chunk(4, 1)  # one kernel for all: what it computes of g is left aside
        c = f * c + i * gates[:, 2 * self.hidden_size : 3 * self.hidden_size].tanh()
        return o * norm("cell", c).tanh(), c


def _last(packed: Tensor, sizes: Sequence[int]) -> Tensor:
    """Every sequence's value at its own last step. Shapes: packed (sum of sizes, H) → (N, H)."""
    if sizes[-1] == sizes[0]:
        return packed[-sizes[0] :]
    steps = torch.split(packed, list(sizes))
    return torch.cat([now[after:] for now, after in zip(steps[::-1], [0, *sizes[:0:-1]], strict=True)])
