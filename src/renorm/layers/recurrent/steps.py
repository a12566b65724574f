"""Batch norm over time: one weight and bias for all steps, and statistics for each step by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import BatchError, UsageError
from renorm.kernels import recomputing


@dataclass
class Passing:
    """One sequence on its way through a norm: how many samples each step has, whose statistics it uses, what it measured.

    `order` gives the rows of a full step in the caller's order, where they were sorted by length. Shapes: mean and unbiased
    (T, C), in training and where a step has more than one sample.
    """

    sizes: Sequence[int]
    places: Sequence[int]
    order: Tensor | None
    mean: Tensor
    unbiased: Tensor


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

    def slots(self) -> Sequence[str]:
        """The steps that hold statistics of their own, by number; all of them before the first batch."""
        return tuple(str(step) for step in range(self.used or self.steps))

    def slot_statistics(self, slot: str) -> tuple[Tensor, Tensor]:
        """Running mean and variance of a step, as views."""
        return self.running_mean[int(slot)], self.running_var[int(slot)]

    def begin(self, sizes: Sequence[int], order: Tensor | None = None) -> Passing:
        """What a sequence takes along that has `sizes[t]` samples at step t."""
        last = self.steps - 1 if self.training else (self.used or self.steps) - 1
        places = [min(step, last) for step in range(len(sizes))]
        rows = len(sizes) if self.training else 0
        moments = self.running_mean.new_zeros((2, rows, self.num_features))
        return Passing(sizes, places, order, moments[0], moments[1])

    def forward(self, x: Tensor, passing: Passing | None = None, step: int | None = None) -> Tensor:
        """The normalised values of `step`, or of all steps one after another.

        Shapes: x (sizes[step], C), or (sum of sizes, C). Without `passing`, x (N, C) is step `step`, by default the first,
        and moves the statistics by itself.
        """
        if passing is None:
            alone = self.begin([0] * (step or 0) + [len(x)])
            y = self._at(x, alone, step or 0)
            self.track_(alone)
            return y
        if step is not None:
            return self._at(x, passing, step)
        if len(set(passing.sizes)) == 1 and self.on_slot is None and (not self.training or passing.sizes[0] > 1):
            return self._together(x, passing)
        return torch.cat([self._at(part, passing, t) for t, part in enumerate(torch.split(x, list(passing.sizes)))])

    def track_(self, passing: Passing) -> None:
        """Move each step's statistics towards what the sequence measured there; steps that share a place are pooled."""
        if not self.training or not self.track_running_stats or recomputing():
            return
        with torch.no_grad():
            met = [t for t, size in enumerate(passing.sizes) if size > 1]
            if not met or self._moved_apart(passing, met):
                return
            places = torch.tensor([passing.places[t] for t in met], device=passing.mean.device)
            sizes = torch.tensor([[passing.sizes[t]] for t in met]).to(passing.mean)
            mean, unbiased = passing.mean[met], passing.unbiased[met]
            finite = torch.isfinite((mean + unbiased).sum(1))
            self.skipped.add_((~finite).sum())
            places, sizes, mean, unbiased = places[finite], sizes[finite], mean[finite], unbiased[finite]
            mean, var, count = _pooled(places, sizes, mean, unbiased * (sizes - 1) / sizes, self.steps)
            seen = count[:, 0] > 0
            self.tracked.add_(seen)
            factor = 1 / self.tracked.clamp_min(1)[:, None].to(mean.dtype)
            if self.momentum is not None:  # a first batch is taken as it is, unless nothing is to move
                factor = (factor == 1).to(mean.dtype).clamp_min(self.momentum) * (self.momentum > 0)
            unbiased = var * (count / (count - 1).clamp_min(1))
            for held, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                moved = held + factor * (new.to(held.dtype) - held)
                held.copy_(torch.where(seen[:, None], moved, held))

    def _moved_apart(self, passing: Passing, met: Sequence[int]) -> bool:
        """`track_` where every step has a place of its own and is finite, which is most often so, in a third of the time."""
        count = len(met)
        if count < len(passing.sizes) or count > self.steps:
            return False
        if not bool(torch.isfinite((passing.mean + passing.unbiased).sum())):
            return False
        tracked = self.tracked[:count].add_(1)
        if self.momentum != 0:
            new = passing.mean.new_full((count, 1), self.momentum or 0.0)
            factor = (
                (1 / tracked).to(new)[:, None] if self.momentum is None else new.masked_fill_(tracked[:, None] == 1, 1)
            )
            self.running_mean[:count].lerp_(passing.mean, factor)
            self.running_var[:count].lerp_(passing.unbiased, factor)
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
        if self.training and len(x) > 1:
            # the kernel leaves mean and unbiased variance in its buffers: rows of scratch, looked at before they count
            mean, var = passing.mean[step], passing.unbiased[step]
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
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

    def _together(self, x: Tensor, passing: Passing) -> Tensor:
        """All steps of sequences of one length at once, step and channel as one channel. Shapes: x (T·N, C)."""
        steps, size, width = len(passing.sizes), passing.sizes[0], self.num_features
        flat = x.view(steps, size, width).transpose(0, 1).reshape(size, steps * width)
        weight, bias = self.weight.repeat(steps), None if self.bias is None else self.bias.repeat(steps)
        if self.training:
            mean, var = passing.mean.view(-1), passing.unbiased.view(-1)
            y = F.batch_norm(flat, mean, var, weight, bias, True, 1.0, self.eps)
        else:
            places = list(passing.places)
            mean, var = self.running_mean[places].view(-1), self.running_var[places].view(-1)
            y = F.batch_norm(flat, mean, var, weight, bias, False, 0.0, self.eps)
        return y.view(size, steps, width).transpose(0, 1).reshape(steps * size, width)


def _pooled(places: Tensor, sizes: Tensor, mean: Tensor, var: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of every place, from those of the steps. Shapes: (S,), (S, 1), (S, C) → (steps, C)."""
    nothing = torch.zeros((steps, mean.shape[1]), dtype=mean.dtype, device=mean.device)
    count = torch.zeros((steps, 1), dtype=mean.dtype, device=mean.device).index_add(0, places, sizes)
    means = nothing.index_add(0, places, mean * sizes) / count.clamp_min(1)
    within = (var + (mean - means[places]).square()) * sizes
    return means, nothing.index_add(0, places, within) / count.clamp_min(1), count
