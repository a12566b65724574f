"""Batch norm over time: one weight and bias for all steps, and statistics for each step by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BatchError, UsageError
from renorm.kernels import recomputing, wide


@dataclass
class Passing:
    """One sequence on its way through a norm: how many samples each step has, and what it is normalised by.

    In training `scratch` (2, T, C) takes the mean and unbiased variance of each step that has more than one sample; `mean` and
    `unbiased` are its rows. In evaluation `scale` and `shift` (T, C) are what each step's norm does, where they can be known
    beforehand, `plus` with them. `order` gives the rows of a full step in the caller's order, where they were sorted by length.
    `plus` (C,) is added to what was normalised.
    """

    sizes: Sequence[int]
    places: Sequence[int]
    order: Tensor | None = None
    scratch: Tensor | None = None
    mean: list[Tensor] = field(default_factory=list)
    unbiased: list[Tensor] = field(default_factory=list)
    scale: Tensor | None = None
    shift: Tensor | None = None
    plus: Tensor | None = None


class StepNorm(nn.Module):
    """Step t of a sequence is normalised by the moments of the batch at t, in evaluation by the running ones of step t.

    Weight and bias are the same at all steps. Steps from `steps` on, and in evaluation those that training never reached,
    use the last step that holds statistics. Sites see one place a step, `name@t`: the steps that training reached, or all
    of them before it did. In training a step with one sample, which has no variance, is normalised by what is held.

    `running_mean` and `running_var` (steps, C) are kept as torch keeps them, but that a step's first batch is taken as it is:
    a late step may meet few, and a hidden state that starts at 0 has no variance. `tracked` (steps,) counts batches. A step
    whose batch is not finite moves nothing and is counted in `skipped`.
    """

    num_features: int
    steps: int
    gain: float
    eps: float
    momentum: float | None
    weight: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor
    skipped: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        steps: int,
        *,
        gain: float = 0.1,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UsageError(
                f"steps is the number of time steps with statistics of their own, 1 or more; got {steps!r}."
            )
        if momentum is not None and not 0 <= momentum <= 1:
            raise UsageError(f"momentum is the weight of the new batch, in [0, 1], or None; got {momentum!r}.")
        self.num_features, self.steps, self.gain, self.eps, self.momentum = num_features, steps, gain, eps, momentum
        self.track_running_stats = True
        self.on_slot: Callable[[str, Tensor], None] | None = None
        self.weight = nn.Parameter(torch.full((num_features,), gain, device=device, dtype=dtype))
        zeros = torch.zeros(num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)
        self.register_buffer("running_mean", zeros.repeat(steps, 1))
        self.register_buffer("running_var", torch.ones_like(self.running_mean))
        self.register_buffer("tracked", torch.zeros(steps, dtype=torch.long, device=device))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long, device=device), persistent=False)

    @property
    def used(self) -> int:
        """How many steps, from the first on, hold statistics of some batch."""
        return int((self.tracked > 0).cumprod(0).sum())

    @property
    def hooked(self) -> bool:
        """Whether somebody hung a hook on it, who is to see every step."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    def slots(self) -> Sequence[str]:
        """The steps that hold statistics of their own, by number; all of them before the first batch."""
        return tuple(str(step) for step in range(self.used or self.steps))

    def slot_statistics(self, slot: str) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a step, as views."""
        return self.running_mean[int(slot)], self.running_var[int(slot)]

    def begin(self, sizes: Sequence[int], order: Tensor | None = None, plus: Tensor | None = None) -> Passing:
        """What a sequence takes along that has `sizes[t]` samples at step t."""
        if self.training:
            shared = [min(step, self.steps - 1) for step in range(len(sizes))]
            scratch = self.running_mean.new_zeros((2, len(sizes), self.num_features))
            mean, unbiased = (list(rows.unbind()) for rows in scratch.unbind())
            return Passing(sizes, shared, order, scratch, mean, unbiased, plus=plus)
        known = self.on_slot is None and self.weight.dtype in (torch.float32, torch.float64)
        if known and torch.compiler.is_compiling():  # how many steps hold something is then no number, but a tensor
            used = (self.tracked > 0).cumprod(0).sum()
            rows = torch.arange(len(sizes), device=used.device).minimum(torch.where(used > 0, used, self.steps) - 1)
            return self._folded(Passing(sizes, (), order, plus=plus), rows)
        last = (self.used or self.steps) - 1
        passing = Passing(sizes, [min(step, last) for step in range(len(sizes))], order, plus=plus)
        if not known:
            return passing
        return self._folded(passing, slice(0, len(sizes)) if last + 1 >= len(sizes) else list(passing.places))

    def _folded(self, passing: Passing, rows: Any) -> Passing:
        """`passing`, with what each step's norm does by the statistics in `rows`."""
        passing.scale = self.weight * torch.rsqrt(self.running_var[rows] + self.eps)
        passing.shift = -self.running_mean[rows] * passing.scale
        for each in (self.bias, passing.plus):
            passing.shift = passing.shift if each is None else passing.shift + each
        return passing

    def forward(self, x: Tensor, passing: Passing | None = None, step: int = 0) -> Tensor:
        """The normalised values of `step`. Without `passing`, they move the statistics of that step by themselves.

        Shapes: x (sizes[step], C), or (N, C).
        """
        if passing is not None:
            return self._at(x, passing, step)
        alone = self.begin([0] * step + [len(x)])
        y = self._at(x, alone, step)
        self.track_(alone)
        return y

    def steps_of(self, x: Tensor, passing: Passing) -> Iterator[Tensor]:
        """The normalised values step after step, each made when it is asked for. Shapes: x (sum of sizes, C)."""
        sizes = list(passing.sizes)
        if passing.scratch is not None and len(set(sizes)) == 1 and sizes[0] > 1 and not self.hooked:
            yield from torch.split(self._together(x, passing.scratch, passing), sizes)
            return
        for step, part in enumerate(torch.split(x, sizes)):
            yield self(part, passing, step)  # as a module, for whoever hangs a hook on it

    def track_(self, passing: Passing) -> None:
        """Move each step's statistics towards what the sequence measured there; steps that share a place are pooled."""
        if passing.scratch is None or not self.track_running_stats or recomputing():
            return
        with torch.no_grad():
            met = [t for t, size in enumerate(passing.sizes) if size > 1]
            if not met or (not torch.compiler.is_compiling() and self._moved_apart(passing.scratch, len(met), passing)):
                return
            places = torch.tensor([passing.places[t] for t in met], device=passing.scratch.device)
            sizes = torch.tensor([[passing.sizes[t]] for t in met]).to(passing.scratch)
            mean, unbiased = (torch.stack([rows[t] for t in met]) for rows in (passing.mean, passing.unbiased))
            finite = torch.isfinite((mean + unbiased).sum(1, keepdim=True))
            self.skipped.add_((~finite).sum())
            sizes, mean, unbiased = sizes * finite, torch.where(finite, mean, 0.0), torch.where(finite, unbiased, 0.0)
            biased = unbiased * (1 - 1 / sizes.clamp_min(1))
            mean, var, count = _pooled(places, sizes, mean, biased, self.steps)
            seen = count[:, 0] > 0
            self.tracked.add_(seen)
            factor = 1 / self.tracked.clamp_min(1)[:, None].to(mean.dtype)
            if self.momentum is not None:  # a first batch is taken as it is, unless nothing is to move
                factor = (factor == 1).to(mean.dtype).clamp_min(self.momentum) * (self.momentum > 0)
            unbiased = var * (count / (count - 1).clamp_min(1))
            for held, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = held + factor * (new.to(held.dtype) - held)
                held.copy_(torch.where(seen[:, None], moved, held))

    def _moved_apart(self, scratch: Tensor, count: int, passing: Passing) -> bool:
        """`track_` where every step has a place of its own and is finite, which is most often so, in a third of the time."""
        if count < len(passing.sizes) or count > self.steps or not math.isfinite(float(scratch.sum())):
            return False
        tracked = self.tracked[:count].add_(1)
        if self.momentum == 0:
            return True
        factor: float | Tensor = self.momentum or 0.0
        if self.momentum is None or int(tracked.min()) == 1:
            factor = (1 / tracked).to(scratch)[:, None]
            factor = factor if self.momentum is None else (factor == 1).to(scratch).clamp_min(self.momentum)
        for held, new in zip((self.running_mean, self.running_var), scratch, strict=True):
            held[:count].lerp_(new, factor)
        return True

    def reset_parameters(self) -> None:
        """Weight at `gain`, bias at 0, and statistics as before the first batch."""
        nn.init.constant_(self.weight, self.gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for tensor, value in ((self.running_mean, 0), (self.running_var, 1), (self.tracked, 0), (self.skipped, 0)):
            tensor.fill_(value)

    def extra_repr(self) -> str:
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, momentum={self.momentum}"

    def _at(self, x: Tensor, passing: Passing, step: int) -> Tensor:
        if x.shape[1:] != self.weight.shape:
            raise BatchError(f"StepNorm has {self.num_features} channels, and was given the shape {tuple(x.shape)}.")
        if passing.scale is not None and passing.shift is not None:
            return torch.addcmul(passing.shift[step], x.to(passing.scale.dtype), passing.scale[step]).to(x.dtype)
        y = self._measured(x, passing, step) if self.training and len(x) > 1 else self._held(x, passing, step)
        return y if passing.plus is None else y + passing.plus

    def _measured(self, x: Tensor, passing: Passing, step: int) -> Tensor:
        """`x` by its own moments, which the kernel leaves in its buffers: rows of scratch, looked at before they count."""
        if torch.compiler.is_compiling():
            y, mean, unbiased = self._composed(x)
            passing.mean[step], passing.unbiased[step] = mean, unbiased
            return y
        mean, var = passing.mean[step], passing.unbiased[step]
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)

    def _held(self, x: Tensor, passing: Passing, step: int) -> Tensor:
        place = passing.places[step]
        if self.training:  # nothing of this step is known yet: the last that holds something; copies, since these move
            place = min(place, (self.used or self.steps) - 1)
            mean, var = self.running_mean[place].clone(), self.running_var[place].clone()
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if self.on_slot is not None:
            whole = passing.order is not None and len(passing.order) == len(x)
            self.on_slot(str(place), x[passing.order] if whole else x)
        mean, var = self.running_mean[place], self.running_var[place]
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _together(self, x: Tensor, scratch: Tensor, passing: Passing) -> Tensor:
        """All steps of sequences of one length by their own moments, step and channel as one channel. Shapes: x (T·N, C)."""
        steps, size, width = len(passing.sizes), passing.sizes[0], self.num_features
        if torch.compiler.is_compiling():
            y, mean, unbiased = self._composed(x.view(steps, size, width))
            passing.mean[:], passing.unbiased[:] = mean.unbind(), unbiased.unbind()
            return (y if passing.plus is None else y + passing.plus).view(steps * size, width)
        flat = x.view(steps, size, width).transpose(0, 1).reshape(size, steps * width)
        means, variances = scratch.view(2, -1)
        bias = passing.plus if self.bias is None else self.bias if passing.plus is None else self.bias + passing.plus
        weight, bias = self.weight.repeat(steps), None if bias is None else bias.repeat(steps)
        y = F.batch_norm(flat, means, variances, weight, bias, True, 1.0, self.eps)
        return y.view(size, steps, width).transpose(0, 1).reshape(steps * size, width)

    def _composed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised by its own moments; those, unbiased; in operations that a compiler fuses. Shapes: (*, N, C)."""
        values = x.to(wide(x))
        var, mean = torch.var_mean(values, -2, correction=0, keepdim=True)
        y = (values - mean) * (torch.rsqrt(var + self.eps) * self.weight)
        y = y if self.bias is None else y + self.bias
        count = x.shape[-2]
        return y.to(x.dtype), mean.detach().squeeze(-2), var.detach().squeeze(-2) * (count / (count - 1))


def _pooled(places: Tensor, sizes: Tensor, mean: Tensor, var: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of every place, from those of the steps. Shapes: (S,), (S, 1), (S, C) → (steps, C)."""
    nothing = torch.zeros((steps, mean.shape[1]), dtype=mean.dtype, device=mean.device)
    count = torch.zeros((steps, 1), dtype=mean.dtype, device=mean.device).index_add(0, places, sizes)
    means = nothing.index_add(0, places, mean * sizes) / count.clamp_min(1)
    within = (var + (mean - means[places]).square()) * sizes
    return means, nothing.index_add(0, places, within) / count.clamp_min(1), count
