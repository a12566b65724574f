"""The default: source and target moments blended by certainty, at an even class mix, forward only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.moments import TINY, Moments
from renorm.online.base import (
    Online,
    Running,
    State,
    Subject,
    check_positive,
    check_share,
    first_sites,
    glance,
    source_units,
)
from renorm.profile import Profile
from renorm.sites import Site

SUDDEN = 16  # images in a batch that say by themselves that another domain has begun
GROUPED = 400_000  # numbers in all that moments kept apart by class may take: 1.6 MB at ResNet-50 would be too many


@dataclass(frozen=True, kw_only=True)
class Shrink(Online):
    """Every site normalises by `w` of the target's moments and `1 − w` of the source's, `w` by how far and how surely it moved.

    `w = (1 − floor) · moved / (gap + moved) · n / (n + images)`, with n the target images so far and `moved` as in
    `Shift.moved`. What the target's moments are depends on what is known of its classes:

    with a profile   they are compared with the source's at the class mix that was predicted, and carried over to the source's
                     own mix (`methods.equal_mix`); `gap` is the source's own, site by site
    without          batches are booked under the classes predicted in them, and all classes that were seen count the same;
                     with so many classes that this would take more than 0.4 million numbers, all count as one

    floor    the source's share however many images came
    gap      the `moved` of data that did not shift, where no profile says
    images   target images that weigh as much as the doubt about their moments
    now      how much the batch that is being normalised counts beside those before it
    recall   the share of the class mix of the recent past that is left after 64 images
    window   images after which what was seen counts 1/e: slow drift is followed at this pace
    change   a change of domain is a `moved` of at least this between the last 64 images and all before, at the first sites,
             or of twice as much at the very first site in a batch of 16 or more, which it is then not normalised by;
             everything before it is forgotten
    rows     of every map, so many rows are measured at the least
    every    in batches smaller than this, the blend is made anew after so many images
    """

    name: ClassVar[str] = "shrink"

    floor: float = 0.25
    gap: float = 0.03
    images: float = 16.0
    now: float = 0.3
    recall: float = 0.3
    window: float = 2000.0
    change: float = 0.2
    rows: int = 8
    every: int = 8

    def __post_init__(self) -> None:
        check_share(self, "floor", "now", "recall")
        check_positive(self, "gap", "images", "window", "change")
        if min(self.rows, self.every) < 1:
            raise UsageError(f"rows and every of shrink are 1 or more; got {self.rows!r} and {self.every!r}.")

    def start(self, subject: Subject) -> Running:
        return _Shrinking(subject, self)


class Tally(NamedTuple):
    """Sums over samples, by group of classes, of a site's moments in source units. Shapes: (G,), (G, C), (G, C)."""

    samples: Tensor
    first: Tensor
    second: Tensor

    def plus(self, count: Tensor, first: Tensor, second: Tensor) -> Tally:
        """With samples of these moments more, `count` (G,) of each group."""
        each = count[:, None]
        return Tally(self.samples + count, self.first + each * first, self.second + each * second)

    def times(self, share: float) -> Tally:
        """Every sample counted `share`."""
        return Tally(self.samples * share, self.first * share, self.second * share)

    def even(self) -> tuple[Tensor, Tensor]:
        """Mean and variance with all groups that were seen counted the same, those of a single sample half. Shapes: (C,)."""
        weights = self.samples / (self.samples + 1)
        each = (weights / weights.sum().clamp_min(TINY) / self.samples.clamp_min(TINY))[:, None]
        mean = (each * self.first).sum(0)
        return mean, ((each * self.second).sum(0) - mean.square()).clamp_min(TINY)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of all samples alike. Shapes: (C,)."""
        total = self.samples.sum().clamp_min(TINY)
        mean = self.first.sum(0) / total
        return mean, (self.second.sum(0) / total - mean.square()).clamp_min(TINY)


class Lent(NamedTuple):
    """What a site normalises by, the target's share in it, and how far the target lies from the source there."""

    moments: Moments
    weight: float
    far: float


def moved(mean: Tensor, var: Tensor, *, eps: Tensor) -> float:
    """`Shift.moved` from the source, whose moments are 0 and 1, to these. Shapes: (C,), (C,), eps in the same unit (C,)."""
    ratio = (var + eps) / (1 + eps)
    return float((mean.square() / (1 + eps) + (0.5 * ratio.log()).square()).clamp_max(4).mean())


def at_home(
    mean: Tensor,
    var: Tensor,
    there: tuple[Tensor, Tensor],
    home: tuple[Tensor, Tensor],
    *,
    eps: Tensor,
    widest: float = 30.0,
) -> tuple[Tensor, Tensor]:
    """`methods.equal_mix.equal_mix` in source units: the target's moments at the source's own class mix. Shapes: all (C,)."""
    scale2 = ((var + eps) / (there[1] + eps)).clamp(widest**-2, widest**2)
    return mean + scale2.sqrt() * (home[0] - there[0]), scale2 * home[1]


class _Shrinking(Running):
    def __init__(self, subject: Subject, method: Shrink) -> None:
        super().__init__(subject)
        self._method = method
        self._sites = {site.name: site for site in subject.sites}
        self._eps = {name: site.eps / self.held[name].var.clamp_min(TINY) for name, site in self._sites.items()}
        self._early = tuple(site.name for site in first_sites(subject.sites))
        channels = sum(len(held.mean) for held in self.held.values())
        self._most = max(1, GROUPED // max(1, 2 * channels))
        profile = subject.source
        self._profile: Profile | None = profile
        self._home = self._in_units(profile, profile.prior) if profile else {}
        self._there = self._home
        self._start_anew()
        self._samples, self._learn, self._due, self._sudden = 0, True, True, False
        self._now: dict[str, tuple[Tensor, Tensor]] = {}
        self._lent: dict[str, Lent] = {}
        self._trial: dict[str, Lent] = {}  # lent in this forward; counts from `finish` on

    def _start_anew(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._fast: dict[str, Tally] = {}
        self._mix: Tensor | None = None  # of the classes, in the recent past
        self._classes: Tensor | None = None  # sums of probabilities, as long as the tallies remember
        self._images = 0.0  # samples that the tallies hold
        self._pending = 0
        self.changes = 0

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        self._samples, self._learn, self._now, self._sudden = samples, learn, {}, False
        self._due = learn and (samples >= self._method.every or self._pending + samples >= self._method.every)
        if self._due and self._profile is not None and self._mix is not None and self._classes is not None:
            now = self._method.now * samples
            mix = (self._classes + now * self._mix) / (self._images + now)
            self._there = self._in_units(self._profile, mix)

    def visit(self, site: Site, x: Tensor) -> None:
        if not self._learn:
            return
        seen = glance(x, axis=site.axis, rows=self._method.rows)
        if seen is None:
            return
        mean, var = source_units(seen, self.held[site.name])
        if site.name == self._early[0] and self._due and self._samples >= SUDDEN and site.name in self._tallies:
            if self._far_from_before(site.name, mean, var) > 2 * self._method.change:
                self._sudden, self._there = True, self._home  # for this batch; forgotten once it went through
        second = var + mean.square()
        if site.name in self._now:  # called more than once: each call counts the same
            mean, second = (0.5 * (a + b) for a, b in zip((mean, second), self._now[site.name], strict=True))
        self._now[site.name] = mean, second
        if self._due:
            self._lend(site, mean, second)

    def finish(self, logits: Tensor) -> None:
        probabilities = logits.detach().double().cpu().softmax(1).mean(0)
        samples = self._samples
        old = self._method.recall ** (samples / 64)
        before = torch.full_like(probabilities, 1 / len(probabilities)) if self._mix is None else self._mix
        self._mix = old * before + (1 - old) * probabilities
        counts = samples * self._grouped(probabilities)
        if self._sudden or self._changed(samples):
            self._forget()
        share = math.exp(-samples / self._method.window)
        for name, (first, second) in self._now.items():
            self._tallies[name] = self._tally(name, len(counts)).times(share).plus(counts, first, second)
        classes = torch.zeros_like(probabilities) if self._classes is None else self._classes
        self._classes = share * classes + samples * probabilities
        self._images = share * self._images + samples
        self._pending = 0 if self._due else self._pending + samples
        self._lent |= self._trial
        self._trial = {}

    def settle(self) -> None:
        for name in self._trial:  # of a forward that failed
            self._sites[name].normalise_by_(self._lent[name].moments if name in self._lent else self.held[name])
        self._trial = {}

    @property
    def target_weight(self) -> float:
        return sum(lent.weight for lent in self._lent.values()) / len(self._lent) if self._lent else 0.0

    @property
    def moved(self) -> float:
        far = [self._lent[name].far for name in self._early if name in self._lent]
        return sum(far) / len(far) if far else math.nan

    def _lend(self, site: Site, mean: Tensor, second: Tensor) -> None:
        name = site.name
        mix = self._mix
        groups = torch.ones(1, dtype=torch.float64) if mix is None else self._grouped(mix)
        now = self._method.now * self._samples * groups
        tally = self._tally(name, len(now)).plus(now, mean, second)
        eps = self._eps[name]
        if self._profile is None:
            t, v = tally.even()
            gap = self._method.gap
        else:
            there = self._there[name] if name in self._there else (torch.zeros_like(mean), torch.ones_like(mean))
            home = self._home.get(name, there)
            t, v = at_home(*tally.pooled(), there, home, eps=eps)
            gap = self._profile.gap(name)
        before = 0.0 if self._sudden else self._images
        far, images = moved(t, v, eps=eps), before + self._method.now * self._samples
        sure = images / (images + self._method.images)  # of few images all moments are far
        weight = (1 - self._method.floor) * far / (gap + far) * sure
        held = self.held[name]
        lent = Moments(math.inf, held.mean + weight * t * held.sd, held.var * ((1 - weight) + weight * v))
        self._trial[name] = Lent(lent, weight, far * sure)
        site.normalise_by_(lent)

    def _tally(self, name: str, groups: int) -> Tally:
        known = None if self._sudden else self._tallies.get(name)
        if known is not None:
            return known
        size = (groups, len(self.held[name].mean))
        return Tally(*(torch.zeros(shape, dtype=torch.float64) for shape in (groups, size, size)))

    def _grouped(self, probabilities: Tensor) -> Tensor:
        """The class probabilities (K,) by the group that each class is booked under, (G,)."""
        alone = self._profile is not None or len(probabilities) > self._most
        return probabilities.sum()[None] if alone else probabilities

    def _changed(self, samples: int) -> bool:
        """Whether the last images come from another domain than those before; brings the memory of the last ones up to date."""
        far = []
        old = 0.5 ** (samples / 64)
        for name in self._early:
            if name not in self._now:
                continue
            first, second = self._now[name]
            one = torch.full((1,), float(samples), dtype=torch.float64)
            fast = (
                self._fast[name].times(old) if name in self._fast else Tally(one * 0, first[None] * 0, second[None] * 0)
            )
            self._fast[name] = fast = fast.plus(one, first, second)
            if name in self._tallies and self._images >= 64 and float(fast.samples) >= 32:
                far.append(self._far_from_before(name, *fast.pooled()))
        return bool(far) and sum(far) / len(far) >= self._method.change

    def _far_from_before(self, name: str, mean: Tensor, var: Tensor) -> float:
        before, spread = self._tallies[name].pooled()
        return moved((mean - before) / spread.sqrt(), var / spread, eps=self._eps[name] / spread)

    def _forget(self) -> None:
        """Another domain has begun: what was seen of the one before says nothing of it."""
        self.changes, self._sudden = self.changes + 1, False
        self._tallies, self._fast = {}, {}
        self._images, self._classes = 0.0, None
        self._there = self._home

    def _in_units(self, profile: Profile, mix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        known = profile.at(mix)
        return {name: source_units(known[name], self.held[name]) for name in self.held if name in known}

    def state(self) -> State:
        found: State = {"images": torch.tensor([self._images, self._pending, self.changes], dtype=torch.float64)}
        found |= {
            f"{key}": value.clone()
            for key, value in (("mix", self._mix), ("classes", self._classes))
            if value is not None
        }
        for kind, tallies in (("slow", self._tallies), ("fast", self._fast)):
            for name, tally in tallies.items():
                found |= {f"{kind}.{field}.{name}": part.float() for field, part in tally._asdict().items()}
        for name, (moments, weight, far) in self._lent.items():
            found |= {f"lent.mean.{name}": moments.mean.float(), f"lent.var.{name}": moments.var.float()}
            found[f"lent.by.{name}"] = torch.tensor([weight, far])
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._start_anew()
        self._images, pending, changes = state["images"].tolist()
        self._pending, self.changes = int(pending), int(changes)
        self._mix, self._classes = (state[key].clone() if key in state else None for key in ("mix", "classes"))
        self._lent, self._trial = {}, {}
        for name, site in self._sites.items():
            for kind, tallies in (("slow", self._tallies), ("fast", self._fast)):
                if f"{kind}.samples.{name}" in state:
                    tallies[name] = Tally(*(state[f"{kind}.{field}.{name}"].double() for field in Tally._fields))
            if f"lent.mean.{name}" in state:
                mean, var = state[f"lent.mean.{name}"].double(), state[f"lent.var.{name}"].double()
                self._lent[name] = Lent(Moments(math.inf, mean, var), *state[f"lent.by.{name}"].tolist())
                site.normalise_by_(self._lent[name].moments)
            else:
                site.normalise_by_(self.held[name])
