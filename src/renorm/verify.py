"""Two models, the same batches: how far apart are they, and where do they part first?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from renorm.calls import Caller, Forward, Output, nonempty, tensors_in
from renorm.errors import UsageError
from renorm.faces import Faces
from renorm.observe import outputs_at
from renorm.sites import find_sites, unwrap
from renorm.state import evaluating, preserving

PARTED = (
    1e-5  # relative to the largest value at a place: above what reordered float32 sums differ by, below any real change
)


@dataclass(frozen=True, kw_only=True)
class Gap(Faces):
    """How far the outputs of two models lie apart, over every tensor in them.

    `max_abs` and `mean_abs` are differences in the outputs' own unit; `agreement` is the share of samples with the same
    largest logit (None without logits of several classes); `first_site` names the first norm layer, in the order of the
    forward, whose outputs differ by more than 1e-5 of their largest value (None where no common one does).
    """

    max_abs: float
    mean_abs: float
    agreement: float | None
    first_site: str | None
    samples: int


def verify(
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Gap:
    """Compare two models, in evaluation, on the same batches; both stay as they were.

    Outputs may be any nest of tensors, but the same one; with `output` only that part of them counts. Equal NaN and
    infinities count as no difference.
    Raises UsageError where the two give outputs of different structure or shape, BatchError for no batches.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    largest = total = 0.0
    values = samples = same = judged = 0
    first: str | None = None
    with preserving(a), preserving(b), evaluating(a), evaluating(b):
        for index, batch in nonempty(batches, asked="verify"):
            ours, theirs = (caller.run(model, batch, index=index) for model in (a, b))
            pair = [result.output if output is None else result.logits for result in (ours, theirs)]
            apart = [difference(x, y) for x, y in _paired(*pair)]
            samples += ours.samples
            values += sum(d.numel() for d in apart)
            total += sum(float(d.sum()) for d in apart)
            largest = max([largest, *(float(d.max()) for d in apart if d.numel())])
            if (
                ours.logits is not None
                and theirs.logits is not None
                and ours.logits.dim() > 1
                and ours.logits.shape[1] > 1
            ):
                equal = ours.logits.argmax(1) == theirs.logits.argmax(1).to(ours.logits.device)
                same, judged = same + int(equal.sum()), judged + equal.numel()
            if first is None and largest > 0:
                first = _first_parting(a, b, batch, caller)
    return Gap(
        max_abs=largest,
        mean_abs=total / values if values else 0.0,
        agreement=same / judged if judged else None,
        first_site=first,
        samples=samples,
    )


def _paired(ours: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    left, right = tensors_in(ours), tensors_in(theirs)
    shapes = [[tuple(t.shape) for t in side] for side in (left, right)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the two models give different outputs: tensors of shape {shapes[0]} and {shapes[1]}; "
            "compare models for the same task, or point output= at what they share."
        )
    return list(zip(left, right, strict=True))


def difference(x: Tensor, y: Tensor) -> Tensor:
    """How far apart, value by value: 0 where both are the same NaN or infinity, infinite where one alone is NaN."""
    x, y = x.detach().cpu().double(), y.detach().cpu().double()  # in this order: MPS has no float64
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _first_parting(a: nn.Module, b: nn.Module, batch: Any, caller: Caller) -> str | None:
    common = {site.name for site in find_sites(b)}
    names = [site.name for site in find_sites(a) if site.name in common and site.slot is None]
    theirs = dict(outputs_at(unwrap(b), names, batch, caller))
    for name, x in outputs_at(unwrap(a), names, batch, caller):
        y = theirs.get(name)
        if y is None or y.shape != x.shape or float(difference(x, y).max()) > PARTED * max(float(x.abs().max()), 1e-12):
            return name
    return None
