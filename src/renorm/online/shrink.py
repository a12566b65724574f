"""The default: source and target moments blended by certainty, at an even class mix, forward only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
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
    few,
    first_sites,
    glance,
    has_places,
    source_units,
)
from renorm.online.kinds.mixes import Counts, Pair, Tally, at_home, class_by_class, moved, total_variation, variety
from renorm.profile import Profile
from renorm.sites import Site

SUDDEN = 16  # images in a batch that say by themselves that another domain has begun
GROUPED = 400_000  # numbers in all that moments kept apart by class may take: 1.6 MB at ResNet-50 would be too many
FIRST = 0.05, 0.12  # `moved` at the first sites that a class mix can explain, and that only another domain can
USUAL = 3.0  # a stream whose batches differ much anyway has to differ so much more before it changes its domain
LATER = 0.05, 0.09  # the same as the median of the sites behind them, few of which tell classes apart


@dataclass(frozen=True, kw_only=True)
class Shrink(Online):
    """Every site normalises by `w` of the target's moments and `1 − w` of the source's, `w` by how far and how surely it moved.

    `w = (1 − floor) · moved / (gap + moved) · n / (n + images)`, with n the target images so far and `moved` as in
    `Shift.moved`. What the target's moments are depends on what is known of its classes:

    with a profile   they are compared with the source's at the class mix that was predicted, and carried over to the source's
                     own mix (`methods.equal_mix`), class by class: of those that came often by what came, of others by what
                     the source has and how far the whole moved. `gap` is the source's own, site by site. A batch of another
                     mix than the last ones is looked at twice: for its mix, and with it
    without          batches are booked under the classes predicted in them, and all classes that were seen count the same

    With so many classes that keeping them apart would take more than 0.4 million numbers, all are booked as one. Where the
    first sites show no other domain and few classes came (`variety`), later sites keep to the source: what they see may be
    those few classes.

    floor    the source's share however many images came
    gap      the `moved` of data that did not shift, where no profile says
    images   target images that weigh as much as the doubt about their moments
    own      images of a class that weigh as much as what a profile says of it
    now      how much the batch that is being normalised counts beside those before it
    recall   the share of the class mix of the recent past that is left after 64 images
    window   images after which what was seen counts 1/e: slow drift is followed at this pace
    change   a change of domain is a `moved` of at least this between the last 64 images and all before, at the first sites,
             of a quarter as much at half of the later ones, or of twice as much at the very first site in one batch. That
             batch is then normalised anew, without what came before it, and all of that is forgotten
    rows     of every map, so many rows are measured at the least
    every    in batches smaller than this, the blend is made anew after so many images
    dense    so many images of a domain are all measured, later ones in one batch of `thin`: moments hardly move by then. The
             very first site is looked at in every batch, and where it shows another domain, all of them
    """

    name: ClassVar[str] = "shrink"

    floor: float = 0.25
    gap: float = 0.03
    images: float = 4.0
    own: float = 32.0
    now: float = 0.3
    recall: float = 0.3
    window: float = 2000.0
    change: float = 0.17
    rows: int = 8
    every: int = 8
    dense: int = 2048
    thin: int = 4

    def __post_init__(self) -> None:
        check_share(self, "floor", "now", "recall")
        check_positive(self, "gap", "images", "own", "window", "change")
        for name in ("rows", "every", "dense", "thin"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of shrink is 1 or more; got {getattr(self, name)!r}.")

    def start(self, subject: Subject) -> Running:
        return _Shrinking(subject, self)


class Lent(NamedTuple):
    """What a site normalises by, the target's share in it, and how far the target lies from the source there."""

    moments: Moments
    weight: float
    far: float


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
        self._classwise = self._each_class(profile) if profile and len(profile.counts) <= self._most else {}
        self._there = self._home
        self._start_anew()
        self._samples, self._asked, self._learn, self._due = 0, True, True, True
        self._sudden = self._twice = self._blind = self._alone = False
        self._now: dict[str, Pair] = {}
        self._far: dict[str, float] = {}
        self._lent: dict[str, Lent] = {}
        self._trial: dict[str, Lent] = {}  # lent in this forward; counts from `finish` on

    def _start_anew(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._fast: dict[str, Tally] = {}
        self._mix: Tensor | None = None  # of the classes, in the recent past
        self._presumed: Tensor | None = None  # of the classes in the batch that is being normalised
        self._counts = Counts()
        self._pending = self._rested = self._measured = 0  # images; batches; images of this domain
        self._usual: float | None = None  # distance of the last images from those before
        self.changes = 0

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        self._samples, self._asked, self._now, self._far = samples, learn, {}, {}
        self._sudden = self._twice = False
        self._learn = learn and self._rests() % self._method.thin == 0
        self._alone = not self._learn
        self._due = self._learn and (samples >= self._method.every or self._pending + samples >= self._method.every)
        self._presumed = self._mix
        if self._mix is not None and self._counts.images:
            self._presume(self._mix)

    def _rests(self) -> int:
        """How many batches, with the present one, came since all images of the domain were measured."""
        return self._rested + 1 if self._measured >= self._method.dense else 0

    def _presume(self, mix: Tensor) -> None:
        """Compare with the source at the mix of all that came, and of this in the present batch."""
        self._presumed = mix
        if self._due and self._profile is not None:
            came, now = self._came(), self._method.now * self._samples
            whole = now * mix if came.classes is None else came.classes + now * mix
            self._there = self._in_units(self._profile, whole / (came.images + now))

    @property
    def places(self) -> Sequence[Site]:
        """Between two lessons the first alone, to notice another domain by; of small batches none."""
        sites = self.subject.sites
        return sites if self._learn else sites[: self._asked and self._samples >= SUDDEN]

    def visit(self, site: Site, x: Tensor) -> None:
        first = site.name == self._early[0] and self._asked
        if not self._learn and not first:
            return
        seen = glance(x, axis=site.axis, rows=self._method.rows)
        if seen is None:
            return
        mean, var = source_units(seen, self.held[site.name])
        if first:
            self._blind = not has_places(site, x)
        known = first and site.name in self._tallies and not self._sudden and not self._blind
        if known and (self._due or not self._learn) and self._samples >= SUDDEN:
            if self._far_from_before(site.name, mean, var) * few(self._samples) > 2 * self._method.change:
                self._sudden, self._there = True, self._home  # for this batch; forgotten once it went through
                self._learn = self._due = True
        if not self._learn:
            return
        second = var + mean.square()
        if site.name in self._now:  # called more than once: each call counts the same
            mean, second = (0.5 * (a + b) for a, b in zip((mean, second), self._now[site.name], strict=True))
        self._now[site.name] = mean, second
        if self._due:
            self._lend(site, mean, second)

    def again(self, logits: Tensor) -> bool:
        if self._alone and self._learn:  # another domain, seen at the first site when no other was looked at
            self._alone, self._now, self._far = False, {}, {}
            return True
        if self._twice or not self._learn:
            return False
        if not self._sudden and self._changed(self._samples):
            self._sudden = self._due = True  # what came before is nothing to normalise this batch by
            return self._once_more(None)
        if self._profile is None or not self._due or self._samples < SUDDEN:
            return False
        found = self._believable(logits.double().cpu().softmax(1).mean(0))
        presumed = self._profile.prior if self._presumed is None else self._presumed
        chance = 0.5 * math.sqrt(len(found) / self._samples)
        return total_variation(found, presumed) >= chance and self._once_more(found)

    def _once_more(self, mix: Tensor | None) -> bool:
        """Let the batch come again, and be normalised at this class mix."""
        self._twice, self._now, self._far = True, {}, {}
        if mix is None:
            self._presumed, self._there = None, self._home
        else:
            self._presume(mix)
        return True

    def finish(self, logits: Tensor) -> None:
        rows = logits.detach().double().cpu().softmax(1)
        probabilities, samples = self._believable(rows.mean(0)), self._samples
        old = self._method.recall ** (samples / 64)
        before = torch.full_like(probabilities, 1 / len(probabilities)) if self._mix is None else self._mix
        self._mix = old * before + (1 - old) * probabilities
        self._rested = self._rests()
        if not self._learn:
            return
        counts = samples * self._grouped(probabilities)
        if self._sudden:
            self._forget()
        share = math.exp(-samples / self._method.window)
        for name, (first, second) in self._now.items():
            self._tallies[name] = self._tally(name, len(counts)).times(share).plus(counts, first, second)
        prior = None if self._profile is None else self._profile.prior
        self._counts = self._counts.plus(probabilities, rows, share, prior)
        self._pending = 0 if self._due else self._pending + samples
        self._measured += samples
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
        """At the first sites; where later ones show more than a class mix can, what the first would have to show for that."""
        if self._blind or not self._lent:
            return math.nan
        first, later = self._halves(self.drift)
        return max(first, FIRST[0] + (FIRST[1] - FIRST[0]) * _ramp(later, *LATER) if later > LATER[0] else 0.0)

    def _lend(self, site: Site, mean: Tensor, second: Tensor) -> None:
        name, came = site.name, self._came()
        mix = self._presumed
        groups = torch.ones(1, dtype=torch.float64) if mix is None else self._grouped(mix)
        now = self._method.now * self._samples
        tally = self._tally(name, len(groups)).plus(now * groups, mean, second)
        t, v = self._balanced(name, tally)
        gap = self._method.gap if self._profile is None else self._profile.gap(name)
        far, images = moved(t, v, eps=self._eps[name]), came.images + now
        self._far[name] = far
        sure = images / (images + self._method.images)  # of few images all moments are far
        weight = (1 - self._method.floor) * far / (gap + far) * sure * self._credit(name)
        held = self.held[name]
        lent = Moments(math.inf, held.mean + weight * t * held.sd, held.var * ((1 - weight) + weight * v))
        self._trial[name] = Lent(lent, weight, far * few(images))
        site.normalise_by_(lent)

    def _balanced(self, name: str, tally: Tally) -> Pair:
        """The target's moments at `name` at an even class mix, or at the source's own where a profile tells it."""
        if self._profile is None:
            return tally.even()
        same = torch.zeros_like(self._eps[name]), torch.ones_like(self._eps[name])
        there, home = self._there.get(name, same), self._home.get(name, same)
        pure = self._came().pure
        if pure is None or name not in self._classwise or len(tally.samples) == 1:
            return at_home(*tally.pooled(), there, home, eps=self._eps[name])
        own = pure / (pure + self._method.own)
        return class_by_class(tally, there, self._classwise[name], self._profile.prior, own, eps=self._eps[name])

    def _credit(self, name: str) -> float:
        """How far a distance at this site is another domain's, in [0, 1], and not that of a few classes."""
        if name in self._early:
            return 1.0
        first, later = self._halves(self._far)
        certain = 0.0 if self._blind else max(_ramp(first, *FIRST), _ramp(later, *LATER))
        chosen = self._came().chosen
        return certain + (1 - certain) * (0.0 if chosen is None else variety(chosen) ** 2)

    def _came(self) -> Counts:
        """What came of the present domain: nothing, if it begins with this batch."""
        return Counts() if self._sudden else self._counts

    def _tally(self, name: str, groups: int) -> Tally:
        known = None if self._sudden else self._tallies.get(name)
        if known is not None:
            return known
        return Tally.empty(groups, len(self.held[name].mean))

    def _believable(self, found: Tensor) -> Tensor:
        """The class mix (K,) that a batch's answers show, as far as the profile can vouch for it (`Profile.belief`)."""
        if self._profile is None:
            return found
        prior = self._profile.prior.clamp_min(1e-3 / len(found))
        mix = prior * (found.clamp_min(TINY) / prior).pow(self._profile.belief)
        return mix / mix.sum()

    def _grouped(self, probabilities: Tensor) -> Tensor:
        """The class probabilities (K,) by the group that each class is booked under, (G,)."""
        alone = len(probabilities) > self._most
        return probabilities.sum()[None] if alone else probabilities

    def _changed(self, samples: int) -> bool:
        """Whether the last images come from another domain than those before; brings the memory of the last ones up to date."""
        far: dict[str, float] = {}
        old = 0.5 ** (samples / 64)
        for name, (first, second) in self._now.items():
            one = torch.full((1,), float(samples), dtype=torch.float64)
            fast = self._fast[name].times(old) if name in self._fast else Tally.empty(1, len(first))
            self._fast[name] = fast = fast.plus(one, first, second)
            if name in self._tallies and self._counts.images >= 64 and float(fast.samples) >= 32:
                far[name] = self._far_from_before(name, *fast.pooled())
        if self._blind or not far:
            return False
        early, later = self._halves(far)
        score, usual = max(early, 4 * later), self._usual
        if score >= max(self._method.change, USUAL * (usual or 0.0)):
            return True
        self._usual = score if usual is None else 0.8 * usual + 0.2 * score
        return False

    def _halves(self, far: Mapping[str, float]) -> tuple[float, float]:
        """A distance at the first sites, their mean, and at those behind them, their median; 0 where there are none."""
        first = [value for name, value in far.items() if name in self._early]
        later = [value for name, value in far.items() if name not in self._early]
        return fmean(first) if first else 0.0, median(later) if later else 0.0

    def _far_from_before(self, name: str, mean: Tensor, var: Tensor) -> float:
        before, spread = self._tallies[name].pooled()
        return moved((mean - before) / spread.sqrt(), var / spread, eps=self._eps[name] / spread)

    def _forget(self) -> None:
        """Another domain has begun: what was seen of the one before says nothing of it."""
        self.changes, self._sudden = self.changes + 1, False
        self._tallies, self._fast, self._counts, self._measured = {}, {}, Counts(), 0
        self._there = self._home

    def _in_units(self, profile: Profile, mix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        known = profile.at(mix)
        return {name: source_units(known[name], self.held[name]) for name in self.held if name in known}

    def _each_class(self, profile: Profile) -> dict[str, Pair]:
        """The source's moments at every site class by class. Shapes: (K, C), (K, C)."""
        each = [self._in_units(profile, one) for one in torch.eye(len(profile.counts), dtype=torch.float64)]
        return {
            name: (torch.stack([e[name][0] for e in each]), torch.stack([e[name][1] for e in each])) for name in each[0]
        }

    @property
    def drift(self) -> Mapping[str, float]:
        return {name: lent.far for name, lent in self._lent.items()}

    def state(self) -> State:
        numbers = [self._counts.images, self._pending, self.changes, self._measured, self._rested]
        scalars = torch.tensor(numbers, dtype=torch.float64)
        found: State = {"images": scalars} | self._counts.state()
        if self._mix is not None:
            found["mix"] = self._mix.clone()
        for kind, tallies in (("slow", self._tallies), ("fast", self._fast)):
            for name, tally in tallies.items():
                found |= {f"{kind}.{field}.{name}": part.float() for field, part in tally._asdict().items()}
        for name, (moments, weight, far) in self._lent.items():
            found |= {f"lent.mean.{name}": moments.mean.float(), f"lent.var.{name}": moments.var.float()}
            found[f"lent.by.{name}"] = torch.tensor([weight, far])
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._start_anew()
        images, *others = state["images"].tolist()
        self._pending, self.changes, self._measured, self._rested = map(int, others)
        self._counts = Counts(images, *(state[key].clone() if key in state else None for key in Counts._fields[1:]))
        self._mix = state["mix"].clone() if "mix" in state else None
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


def _ramp(value: float, start: float, end: float) -> float:
    return min(1.0, max(0.0, (value - start) / (end - start)))
