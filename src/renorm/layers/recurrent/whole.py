"""One layer of an LSTM with batch norm over whole sequences in training, its derivative written out.

Autograd keeps a node for each of the fifteen operations of a step, which cost more than the small matrices they work on. Here
a sequence is one node of the same kernels, as few of them as there can be: among so many small ones each pays for code that
the processor no longer has at hand. Values of a step lie in tensors of their own: small ones are in the processor's cache when
the next operation wants them, and large ones cost a page fault for every 4 kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Given = Sequence[Tensor | None]  # weights and biases of the norms: input, hidden, cell

_norm: Any = torch.native_batch_norm  # its stub knows no optional bias among *args
_back = torch.ops.aten.native_batch_norm_backward.default
_tanh_back = torch.ops.aten.tanh_backward.default
_sigmoid_back = torch.ops.aten.sigmoid_backward.default


def whole_lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    norms: Sequence[tuple[Tensor, Tensor | None]],
    moments: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    sizes: Sequence[int],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Hidden states of all steps, packed, and every sequence's last cell.

    Of input, hidden state and cell, in this order: `norms` are weight and bias (the gates' bias is the input's), `eps` their ε,
    `moments` mean and unbiased variance, whose t-th is written at step t.
    Shapes: x (sum of sizes, C); state (N, H) twice; weights (4H, C), (4H, H); moments T of (4H,) or (H,) twice.
    """
    given = [parameter for pair in norms for parameter in pair]
    hidden, cell = _Whole.apply(x, *state, *weights, *given, tuple(moments), list(sizes), tuple(eps))
    return hidden, cell


class _Whole(torch.autograd.Function):
    """`whole_lstm`. a: the gates i, f, g, o after their nonlinearity; z: before it; v, u: input and hidden state, weighed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, weigh_x: Tensor, weigh_h: Tensor, *others: Any) -> Any:
        *given, moments, sizes, eps = others
        ctx.save_for_backward(x, h, c, weigh_x, weigh_h, *given)
        across, down, four = weigh_x.t(), weigh_h.t(), [weigh_h.shape[1]] * 4
        again = len(across) <= len(down)  # a narrow input is sooner weighed again than fetched from memory
        buffers = [zip(mean, unbiased, strict=True) for mean, unbiased in moments]
        kept: list[list[Any]] = []
        outputs, ended, running = [], [], sizes[0]
        for size, now, of_x, of_h, of_c in zip(sizes, torch.split(x, sizes), *buffers, strict=True):
            if size < running:
                ended.append(c[size:])
                h, c, running = h[:size], c[:size], size
            u = torch.mm(h, down)
            y, *of_hidden = _norm(u, given[2], given[3], *of_h, True, 1.0, eps[1])
            v = torch.mm(now, across)
            a, *of_input = _norm(v, given[0], given[1], *of_x, True, 1.0, eps[0])
            i, f, g, o = gates = torch.split_with_sizes(a.add_(y), four, 1)
            level = g.tanh()
            a.sigmoid_()  # one kernel for all: what it makes of g is overwritten
            g.copy_(level)
            after = torch.mul(f, c).addcmul_(i, g)
            level, *of_cell = _norm(after, given[4], given[5], *of_c, True, 1.0, eps[2])
            level.tanh_()
            kept.append([now, None if again else v, h, c, u, a, gates, after, level, *of_input, *of_hidden, *of_cell])
            h, c = torch.mul(o, level), after
            outputs.append(h)
        ended.append(c)
        ctx.about = kept, sizes, eps
        return torch.cat(outputs), torch.cat(ended[::-1])

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor, d_cell: Tensor) -> Any:
        kept, sizes, eps = ctx.about
        x, h0, c0, weigh_x, weigh_h, *given = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted: let autograd see every operation
            inputs = [x, h0, c0, weigh_x, weigh_h, *given]
            return *_through_steps((d_hidden, d_cell), inputs, sizes, eps), None, None, None
        d_weigh_x, d_weigh_h, across = torch.zeros_like(weigh_x), torch.zeros_like(weigh_h), weigh_x.t()
        width = weigh_h.shape[1]
        parts = [2 * width, width, width]
        masks = [[True, True, bias is not None] for bias in given[1::2]]
        d_h = d_c = weigh_h.new_zeros(0, width)  # what comes back from the step after
        d_x, of_norms, running = [], [], 0
        for size, from_h, values in zip(sizes[::-1], torch.split(d_hidden, sizes)[::-1], kept[::-1], strict=True):
            now, v, h, c, u, a, (i, f, g, o), cell, level, *held = values
            if size > running:
                d_h, d_c, running = _joined(from_h, d_h), torch.cat([d_c, d_cell[running:size]]), size
            else:
                d_h.add_(from_h)
            d_o = torch.mul(d_h, level)
            d_level = _tanh_back(d_h.mul_(o), level)
            d, *of_cell = _back(d_level, cell, given[4], None, None, *held[4:], True, eps[2], masks[2])
            d_c.add_(d)
            d_z = _sigmoid_back(torch.cat([torch.mul(d_c, g), torch.mul(d_c, c), d_c, d_o], 1), a)
            torch.mul(_tanh_back(d_c, g), i, out=torch.split_with_sizes(d_z, parts, 1)[1])
            v = torch.mm(now, across) if v is None else v
            d_v, *of_input = _back(d_z, v, given[0], None, None, *held[:2], True, eps[0], masks[0])
            d_weigh_x.addmm_(d_v.t(), now)
            d_x += [torch.mm(d_v, weigh_x)] if ctx.needs_input_grad[0] else []
            d_u, *of_hidden = _back(d_z, u, given[2], None, None, *held[2:4], True, eps[1], masks[1])
            d_weigh_h.addmm_(d_u.t(), h)
            d_h, d_c = torch.mm(d_u, weigh_h), d_c.mul_(f)
            of_norms.append((*of_input, *of_hidden, *of_cell))
        found = [None if each[0] is None else torch.stack(each).sum(0) for each in zip(*of_norms, strict=True)]
        return torch.cat(d_x[::-1]) if d_x else None, d_h, d_c, d_weigh_x, d_weigh_h, *found, None, None, None


def _joined(own: Tensor, later: Tensor) -> Tensor:
    """The gradient of a step's output, with what comes from the next step, where fewer sequences run."""
    both = own.clone()
    both[: len(later)] += later
    return both


def _through_steps(
    grads: Sequence[Tensor], inputs: Sequence[Tensor | None], sizes: Sequence[int], eps: Sequence[float]
) -> list[Tensor | None]:
    """The gradients of `inputs` (x, h, c, weights, and what is given of the norms), which can be derived again."""
    x, h, c, weigh_x, weigh_h, *given = inputs
    assert x is not None
    assert h is not None
    assert c is not None
    assert weigh_x is not None
    assert weigh_h is not None
    outputs = step_by_step(x, (h, c), (weigh_x, weigh_h), given, sizes, eps)
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if each is not None and each.requires_grad else None for each in inputs]


def step_by_step(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    given: Given,
    sizes: Sequence[int],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """What `whole_lstm` gives, from operations that autograd knows."""
    outputs, ended = [], []
    h, c = state
    for now in torch.split(F.linear(x, weights[0]), list(sizes)):
        ended.append(c[len(now) :])
        h, c = h[: len(now)], c[: len(now)]
        gates = _normal(now, given[0:2], eps[0]) + _normal(F.linear(h, weights[1]), given[2:4], eps[1])
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * _normal(c, given[4:6], eps[2]).tanh()
        outputs.append(h)
    return torch.cat(outputs), torch.cat([c, *ended[::-1]])


def _normal(x: Tensor, given: Given, eps: float) -> Tensor:
    return F.batch_norm(x, None, None, given[0], given[1], True, 0.0, eps)
