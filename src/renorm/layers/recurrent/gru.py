"""A GRU with batch norm between input and gates, and between hidden state and gates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import UsageError
from renorm.layers.recurrent.base import AtStep, Input, Recurrent, like


class BNGRU(Recurrent):
    """`r, z = σ(BN(W_x x) + BN(W_h h) + b)`, `n = tanh(BN(W_x x) + b_x + r (BN(W_h h) + b_h))`, `h' = (1 − z) n + z h`.

    `output, h = rnn(input, h0, lengths=None)`. Statistics, weights and steps as in `BNLSTM`; the hidden state, which the gates
    keep within (−1, 1), is not normalised itself. With `from_gru`, a network of torch's becomes one of these.

    After Cooijmans et al. 2017, who give the LSTM's.
    """

    gates: ClassVar[int] = 3
    states: ClassVar[int] = 1
    norms: ClassVar[tuple[str, ...]] = ("input", "hidden")

    @classmethod
    def from_gru(cls, gru: nn.GRU, *, steps: int = 100, eps: float = 1e-5, momentum: float | None = 0.1) -> BNGRU:
        """A network with the weights of `gru` that gives, in evaluation, what `gru` gives, until it is trained.

        Raises UsageError for something else than an nn.GRU.
        """
        if not isinstance(gru, nn.GRU):
            raise UsageError(f"from_gru makes a BNGRU of an nn.GRU; got {type(gru).__name__}.")
        made = cls(**like(gru), steps=steps, eps=eps, momentum=momentum)
        made._take_(gru)
        return made

    def forward(self, input: Input, hx: Tensor | None = None, lengths: Any = None) -> tuple[Input, Tensor]:
        output, (h,) = self._run(input, None if hx is None else (hx,), lengths)
        return output, h

    def _step(
        self, x: Tensor, state: tuple[Tensor, ...], norm: AtStep, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor]:
        (h,) = state
        hidden = norm("hidden", F.linear(h, weight))
        if bias is not None:
            hidden = hidden + bias
        width = 2 * self.hidden_size
        r, z = (x[:, :width] + hidden[:, :width]).sigmoid().chunk(2, 1)
        n = torch.tanh(x[:, width:] + r * hidden[:, width:])
        return (n + z * (h - n),)
