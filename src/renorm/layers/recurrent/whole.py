"""One layer of an LSTM with batch norm over whole sequences in training, its derivative written out.

Autograd keeps a node for each of the fifteen operations of a step, which cost more than the small matrices they work on. Here
a sequence is one node of the same kernels. Values of a step lie in tensors of their own: small ones are in the processor's
cache when the next operation wants them, and large ones cost a page fault for every 4 kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Given = Sequence[Tensor | None]  # weights and biases of the norms: input, hidden, cell

_back = torch.ops.aten.native_batch_norm_backward.default
_tanh_back = torch.ops.aten.tanh_backward.default
_sigmoid_back = torch.ops.aten.sigmoid_backward.default


def whole_lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight: Tensor,
    norms: Sequence[tuple[Tensor, Tensor | None]],
    moments: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Hidden states of all steps, packed, and every sequence's last cell.

    Of input, hidden state and cell, in this order: `norms` are weight and bias (the gates' bias is the input's), `eps` their ε,
    `moments` mean and unbiased variance, whose row t is written at step t.
    Shapes: x (sum of sizes, 4H), before its norm; state (N, H) twice; weight (4H, H); moments (T, C) twice.
    """
    given = [parameter for pair in norms for parameter in pair]
    hidden, cell = _Whole.apply(x, *state, weight, *given, tuple(moments), list(sizes), tuple(eps))
    return hidden, cell


class _Whole(torch.autograd.Function):
    """`whole_lstm`. a: the gates i, f, g, o after their nonlinearity; z: before it; u: hidden states times their weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *given, moments, sizes, eps = others
        ctx.save_for_backward(x, h, c, weight, *given)
        width, transposed = weight.shape[1], weight.t()
        buffers = [(mean.unbind(), unbiased.unbind()) for mean, unbiased in moments]
        kept: list[list[Tensor]] = []
        outputs, ended = [], []
        for t, now in enumerate(torch.split(x, sizes)):
            if len(h) > len(now):
                ended.append(c[len(now) :])
                h, c = h[: len(now)], c[: len(now)]
            rows = [(mean[t], unbiased[t], True, 1.0) for mean, unbiased in buffers]
            u = h @ transposed
            a, *of_input = torch.native_batch_norm(now, given[0], given[1], *rows[0], eps[0])
            y, *of_hidden = torch.native_batch_norm(u, given[2], given[3], *rows[1], eps[1])
            a += y
            level = a[:, 2 * width : 3 * width].tanh()
            i, f, g, o = a.sigmoid_().chunk(4, 1)
            g.copy_(level)
            after = torch.addcmul(f * c, i, g)
            level, *of_cell = torch.native_batch_norm(after, given[4], given[5], *rows[2], eps[2])
            level.tanh_()
            kept.append([now, h, c, u, a, after, level, *of_input, *of_hidden, *of_cell])
            h, c = o * level, after
            outputs.append(h)
        ended.append(c)
        ctx.about = kept, sizes, eps
        return torch.cat(outputs), torch.cat(ended[::-1])

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor, d_cell: Tensor) -> Any:
        kept, sizes, eps = ctx.about
        x, h0, c0, weight, *given = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted: let autograd see every operation
            return *_through_steps((d_hidden, d_cell), [x, h0, c0, weight, *given], sizes, eps), None, None, None
        d_weight = torch.zeros_like(weight)
        found: list[Tensor | None] = [None] * 6
        d_h = d_c = weight.new_zeros(0, weight.shape[1])  # what comes back from the step after
        d_x = []
        for from_h, values in zip(torch.split(d_hidden, sizes)[::-1], kept[::-1], strict=True):
            now, h, c, u, a, cell, level, *moments = values
            d_h, d_c = _joined(from_h, d_h), torch.cat([d_c, d_cell[len(d_c) : len(cell)]])
            i, f, g, o = a.chunk(4, 1)
            d_o = d_h * level
            d_c += _norm_back(found, 4, _tanh_back(d_h.mul_(o), level), cell, given, moments[4:6], eps[2])
            d_z = _sigmoid_back(torch.cat([d_c * g, d_c * c, d_c, d_o], 1), a)
            torch.mul(_tanh_back(d_c, g), i, out=d_z[:, 2 * weight.shape[1] : 3 * weight.shape[1]])
            d_x.append(_norm_back(found, 0, d_z, now, given, moments[0:2], eps[0]))
            d_u = _norm_back(found, 2, d_z, u, given, moments[2:4], eps[1])
            d_weight.addmm_(d_u.t(), h)
            d_h, d_c = d_u @ weight, d_c.mul_(f)
        return torch.cat(d_x[::-1]), d_h, d_c, d_weight, *found, None, None, None


def _joined(own: Tensor, later: Tensor) -> Tensor:
    """The gradient of a step's output, with what comes from the next step, where fewer sequences may run."""
    if len(own) == len(later):
        return later.add_(own)
    both = own.clone()
    both[: len(later)] += later
    return both


def _norm_back(
    found: list[Tensor | None], place: int, grad: Tensor, x: Tensor, given: Given, kept: Sequence[Tensor], eps: float
) -> Tensor:
    """The gradient of a norm's input; those of its weight and bias are added to `found`, from `place` on."""
    weight, bias = given[place : place + 2]
    d_x, *more = _back(grad, x, weight, None, None, *kept, True, eps, [True, True, bias is not None])
    for k, each in enumerate(more[: 1 + (bias is not None)], place):
        known = found[k]
        found[k] = each if known is None else known.add_(each)
    return d_x  # type: ignore[no-any-return]


def _through_steps(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None], sizes: Sequence[int], eps: Sequence[float]
) -> list[Tensor | None]:
    """The gradients of `inputs` (x, h, c, weight, and what is given of the norms), which can be derived again."""
    x, h, c, weight, *given = inputs
    assert x is not None
    assert h is not None
    assert c is not None
    assert weight is not None
    outputs = step_by_step(x, h, c, weight, given, sizes, eps)
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if each is not None and each.requires_grad else None for each in inputs]


def step_by_step(
    x: Tensor, h: Tensor, c: Tensor, weight: Tensor, given: Given, sizes: Sequence[int], eps: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """What `whole_lstm` gives, from operations that autograd knows."""
    outputs, ended = [], []
    for now in torch.split(x, list(sizes)):
        ended.append(c[len(now) :])
        h, c = h[: len(now)], c[: len(now)]
        gates = _normal(now, given[0:2], eps[0]) + _normal(F.linear(h, weight), given[2:4], eps[1])
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * _normal(c, given[4:6], eps[2]).tanh()
        outputs.append(h)
    return torch.cat(outputs), torch.cat([c, *ended[::-1]])


def _normal(x: Tensor, given: Given, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, given[0], given[1], True, 0.0, eps)
