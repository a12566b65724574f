"""Several statistics at once, each instance normalised by its own mixture of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from renorm.errors import UsageError
from renorm.online.base import Online, Running, State, Subject, as_if, check_positive, check_share, refuse_slots
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class Unmix(Online):
    """K components that instances join by likeness (Tomar et al. 2024, eq. 4 to 9).

    Unlike the official code, components move only where the stream learns, in evaluation too they stay; the random start has
    a seed. Inputs without positions, (N, C), keep the source's statistics, as there.

    components   K; the paper takes 16, and 128 for mixed domains. Their random start shifts every channel by √(0.5/(K − 1))
                 source standard deviations, 0.18 at 16, which small networks feel until the components have moved
    temperature  of the softmax over cosines between an instance's means and the components'
    rate         of the components at 64 samples; `1 − (1 − rate)^(n/64)` at n
    """

    name: ClassVar[str] = "unmix"
    cites: ClassVar[str] = (
        "@inproceedings{tomar2024unmixing, title={Un-mixing test-time normalization statistics: combatting label temporal "
        "correlation}, author={Tomar, Devavrat and Vray, Guillaume and Thiran, Jean-Philippe and Bozorgtabar, Behzad}, "
        "booktitle={ICLR}, year={2024}}"
    )

    components: int = 16
    temperature: float = 0.07
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_share(self, "rate")
        if isinstance(self.components, bool) or not isinstance(self.components, int) or self.components < 2:
            raise UsageError(f"components of unmix is a number of 2 or more; got {self.components!r}.")

    def start(self, subject: Subject) -> Running:
        return _Unmixing(subject, self)


Parts = tuple[Tensor, Tensor]  # means and variances, (K, C) each


class _Unmixing(Running):
    def __init__(self, subject: Subject, method: Unmix) -> None:
        super().__init__(subject)
        refuse_slots(subject, method)
        self._method = method
        generator = torch.Generator().manual_seed(method.seed)
        spread = math.sqrt(0.5 * method.components / (method.components - 1))
        self._parts: dict[str, Parts] = {}
        for name, held in self.held.items():
            noise = torch.randn(method.components, len(held.mean), generator=generator, dtype=torch.float64)
            self._parts[name] = (held.mean + spread * held.sd * noise, 0.5 * held.var.expand_as(noise).clone())
        self._now: dict[str, Parts] = {}
        self._samples = 0

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        self._samples, self._now = samples, {}

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        moved = x.detach().movedim(site.axis, 1)
        if moved.dim() < 3 or moved[0, 0].numel() < 2:
            return None
        var, mean = torch.var_mean(moved.double().flatten(2).cpu(), 2, correction=0)
        mixed_mean, mixed_var, joined = unmixed(mean, var, self._parts[site.name], temperature=self._method.temperature)
        share = 1 - (1 - self._method.rate) ** (self._samples / 64)
        parts = self._parts[site.name]
        joins = joined[:, :, None]
        moved_mean, moved_var = (
            part + share * (joins * (seen[:, None] - part)).mean(0)
            for part, seen in zip(parts, (mean, var), strict=True)
        )
        self._now[site.name] = moved_mean, moved_var
        return as_if(site, x, mixed_mean.to(x), mixed_var.to(x), self.held[site.name])

    def finish(self, logits: Tensor) -> None:
        self._parts.update(self._now)

    def state(self) -> State:
        return {
            f"{kind}.{n}": part.float()
            for n, parts in self._parts.items()
            for kind, part in zip("mv", parts, strict=True)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name in self._parts:
            self._parts[name] = (state[f"m.{name}"].double(), state[f"v.{name}"].double())


def unmixed(mean: Tensor, var: Tensor, parts: Parts, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What instances are normalised by, and how much each joins a component. Shapes: twice (N, C) → twice (N, C), (N, K)."""
    means, variances = parts
    joined = (F.cosine_similarity(mean[:, None], means[None], dim=2) / temperature).softmax(1)
    share = joined[:, :, None]
    moved_mean = (1 - share) * means + share * mean[:, None]
    moved_var = (1 - share) * variances + share * var[:, None]
    mixed = moved_mean.mean(1)
    return mixed, moved_var.mean(1) + moved_mean.square().mean(1) - mixed.square(), joined
