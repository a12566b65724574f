"""Normalise as running statistics would, with the gradient of the batch, and weigh classes that are seen often less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from renorm.moments import Moments
from renorm.online.base import Running, State, Subject, as_if, check_share, glance, packed, unpacked
from renorm.online.kinds.descent import Descending, Gradient, entropy
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Tbr(Gradient):
    """Test-time batch renormalisation with class weights that even out what is predicted (DELTA, Zhao et al. 2023, eq. 3 to 6).

    The value is that of the running moments from before the batch, the gradient that of the batch's own times a constant;
    the first batch starts the running moments. Samples weigh 1/q̂ of their predicted class, q̂ a running class mix.
    Unlike the official code its running moments are part of the state, and variances run, not standard deviations.

    keep    the old share of the running moments at every batch
    even    whether samples are weighed by class
    """

    name: ClassVar[str] = "tbr"
    cites: ClassVar[str] = (
        "@inproceedings{zhao2023delta, title={DELTA: degradation-free fully test-time adaptation}, author={Zhao, Bowen and "
        "Chen, Chen and Xia, Shu-Tao}, booktitle={ICLR}, year={2023}}"
    )

    lr: float = 2.5e-4
    optimiser: Any = "sgd"
    keep: float = 0.95
    even: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "keep")

    def start(self, subject: Subject) -> Running:
        return _Renormalising(subject, self)


class _Renormalising(Descending):
    def __init__(self, subject: Subject, method: Tbr) -> None:
        super().__init__(subject, method)
        self._method = method
        self._running: dict[str, Moments] = {}
        self._now: dict[str, Moments] = {}
        self._mix: Tensor | None = None

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        self._now = {}

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        self._early.see(site, x)
        seen = glance(x, axis=site.axis)
        held = self.held[site.name]
        if seen is None:
            run = self._running.get(site.name, held)
            return as_if(site, x, run.mean.to(x), run.var.to(x), held)
        run = self._running.get(site.name, seen)
        self._now[site.name] = run.blend(seen, source_weight=self._method.keep, cross_term=False)
        return renormalised(site, x, run, held)

    def loss(self, logits: Tensor) -> Tensor:
        probabilities = logits.detach().softmax(1)
        if self._mix is None:
            self._mix = torch.full_like(probabilities[0], 1 / logits.shape[1])
        weights = torch.ones_like(probabilities[:, 0])
        if self._method.even:
            weights = 1 / self._mix[probabilities.argmax(1)]
            weights = weights / weights.mean()
        self._mix = 0.95 * self._mix + 0.05 * probabilities.mean(0)
        return (entropy(logits) * weights).mean()

    def finish(self, logits: Tensor) -> None:
        super().finish(logits)
        self._running.update(self._now)

    def back_to_source(self) -> None:
        super().back_to_source()
        self._running, self._mix = {}, None

    def state(self) -> State:
        order = {name: self._running.get(name, held) for name, held in self.held.items()} if self._running else {}
        return super().state() | packed(order) | ({} if self._mix is None else {"mix": self._mix.clone()})

    def load(self, state: Mapping[str, Tensor]) -> None:
        super().load(state)
        self._running = unpacked(state, self.held)
        self._mix = state["mix"].clone() if "mix" in state else None


def renormalised(site: Site, x: Tensor, run: Moments, held: Moments) -> Tensor:
    """What makes `site` give `(x − μb)/σb · r + d`, r = σb/σrun and d = (μb − μrun)/σrun held constant, before its affine.

    Shapes: x (N, C, *), and the result.
    """
    moved = x.movedim(site.axis, 1)
    var, mean = torch.var_mean(moved, [d for d in range(moved.dim()) if d != 1], correction=0)
    sd = (var + site.eps).sqrt()
    run_mean, run_sd = run.mean.to(mean), (run.var + site.eps).sqrt().to(mean)
    r, d = (sd / run_sd).detach(), ((mean - run_mean) / run_sd).detach()
    shape = [1, -1, *[1] * (moved.dim() - 2)]
    home = (moved - mean.view(shape)) / sd.view(shape) * r.view(shape) + d.view(shape)
    scale, shift = (held.var + site.eps).sqrt().to(moved), held.mean.to(moved)
    return (home * scale.view(shape) + shift.view(shape)).movedim(1, site.axis)
