"""Is online adaptation still safe? The source answers some samples too; whoever is surer where they part is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from renorm.errors import UsageError
from renorm.said import Said, say

STRANGE = 12.0  # robust standard deviations of a sample's mean or log spread from those of the last samples: garbage
UNMOVED, MOVED = 0.05, 0.12  # `moved` at the first sites: JPEG images of CIFAR had 0.04, noisy photographs 0.12
SMALL = 32  # samples in a batch of which no part is judged alone
REMEMBERED = 128  # samples whose mean and spread are kept to compare with


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When the adapted answers are given, when the source's, and when what was learnt is thrown away.

    first     so many samples at the start are answered by both, and all of them teach
    judged    share of the later samples that the source answers too
    learning  share of the samples that a method still learns from while the source answers
    memory    judged samples after which what was found counts 1/e
    limit     evidence, as in `trust`, above which the adapted model is believed where the first sites show no shift
    certain   by so much that limit falls where they show one for certain: a source that is surely wrong is sure all the same
    doubt     log odds that speak for the source before anything was judged, as if seen on one disagreeing sample each
    collapse  a gradient method whose answers have less than this share of the source's marginal entropy starts anew
    patience  judged steps in a row without belief after which a gradient method goes back to its last good state
    good      steps between two good states that are kept
    """

    first: int = 256
    judged: float = 0.125
    learning: float = 0.25
    memory: float = 256.0
    limit: float = -0.08
    certain: float = 0.5
    doubt: float = 1.0
    collapse: float = 0.5
    patience: int = 4
    good: int = 8

    def __post_init__(self) -> None:
        for name in ("judged", "learning", "collapse"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} of the guard is a share in (0, 1]; got {getattr(self, name)!r}.")
        for name in ("memory", "patience", "good"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} of the guard is a number above 0; got {getattr(self, name)!r}.")


class Verdict(NamedTuple):
    """What the guard makes of a step: whom to believe, and what to do with what was learnt ("", "back" or "anew")."""

    believed: bool
    evidence: float
    action: str
    why: str


class Watch:
    """What the guard remembers of one stream.

    A judged sample on which the two part adds the log odds by which each prefers its own answer. The adapted model is
    believed while its mean exceeds the source's by a limit of their sum; how low that is follows from how far the target has
    moved at the first sites, which other classes hardly move.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard: Guard = guard
        self.believed: bool = False
        self._owed = 0.0
        self._came = 0
        self._forget()
        self._recent: Tensor = torch.zeros(0, 2)  # means and log spreads of the last samples

    def _forget(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # margins: adapted, source; confidence: adapted, source
        self._count = 0.0
        self._mixes: Tensor | None = None  # (2, K): of the adapted answers, of the source's
        self._against = 0

    def rows(self, samples: int, share: float) -> Tensor:
        """Which samples of a batch to take: `share` of all in the long run, and every one at first. Shapes: (n,) indices."""
        self._came += samples
        if self._came - samples < self.guard.first:
            return torch.arange(samples)
        self._owed += samples * share
        take = max(0, min(samples, int(self._owed)))  # a small batch is taken whole, ahead of what is owed
        if samples <= SMALL and take:
            take = (
                samples  # a part of a small batch costs nearly as much as all of it, and so all of it once in a while
            )
        self._owed -= take
        return torch.arange(take) * max(1, samples // max(1, take))

    def judge(self, adapted: Tensor, source: Tensor, *, moved: float, trains: bool) -> Verdict:
        """Book some samples' class scores from both, and say what follows. Shapes: (n, K), (n, K)."""
        if not bool(torch.isfinite(adapted).all()):
            self.believed = False
            return Verdict(False, -1.0, "anew" if trains else "", NOT_FINITE)
        old = math.exp(-len(adapted) / self.guard.memory)
        logs = [rows.detach().double().cpu().log_softmax(1) for rows in (adapted, source)]
        answers = [rows.argmax(1, keepdim=True) for rows in logs]
        part = (answers[0] != answers[1]).squeeze(1)
        margins = [(logs[k].gather(1, answers[k]) - logs[k].gather(1, answers[1 - k])).squeeze(1) for k in (0, 1)]
        confidence = [rows.amax(1).exp().sum() for rows in logs]
        self._sums = old * self._sums + torch.stack([*(m[part].clamp_max(20).sum() for m in margins), *confidence])
        self._count = old * self._count + len(adapted)
        mixes = torch.stack([rows.exp().sum(0) for rows in logs])
        self._mixes = mixes if self._mixes is None else old * self._mixes + mixes
        self.believed = self._weighed() > limit(self.guard, moved, trains=trains)
        return self._follow(self.evidence, trains)

    @property
    def evidence(self) -> float:
        """`(m_a − m_s) / (m_a + m_s)` with the guard's doubt on the source's side, in [−1, 1]; NaN before the two parted."""
        return self._weighed() if bool(self._sums[:2].any()) else math.nan

    def _weighed(self) -> float:
        ours, theirs = float(self._sums[0]), float(self._sums[1]) + self.guard.doubt
        return (ours - theirs) / (ours + theirs) if ours + theirs > 0 else 0.0

    @property
    def confidence(self) -> tuple[float, float]:
        """Mean largest probability on judged samples: adapted, source; NaN before any."""
        if not self._count:
            return math.nan, math.nan
        return float(self._sums[2]) / self._count, float(self._sums[3]) / self._count

    def _follow(self, evidence: float, trains: bool) -> Verdict:
        self._against = 0 if self.believed else self._against + 1
        if not trains:
            return Verdict(self.believed, evidence, "", "")
        adapted, source = (_entropy(mix) for mix in self._mixes) if self._mixes is not None else (0.0, 0.0)
        if self._count >= 32 and adapted < self.guard.collapse * source:
            self._forget()
            self.believed = False
            why = say(
                "the answers crowd into few classes: their mix has an entropy of {adapted:.2f} nats, the source's {source:.2f}",
                adapted=adapted,
                source=source,
            )
            return Verdict(False, evidence, "anew", why)
        if self._against >= self.guard.patience:
            why = say("in {steps} judged steps in a row the source was surer", steps=self._against)
            self._forget()
            return Verdict(self.believed, evidence, "back", why)
        return Verdict(self.believed, evidence, "", "")

    def anew(self) -> None:
        """Another domain has begun: the source answers until there is evidence from this one."""
        self._forget()
        self.believed, self._came = False, 0

    def strangers(self, x: Tensor) -> Tensor:
        """Which samples are garbage: mean or log spread far from the last ones' medians. Shapes: x (N, C, *) → (N,) bool."""
        flat = x.detach().flatten(1).float()
        var, mean = torch.var_mean(flat, 1, correction=0)
        now = torch.stack([mean, 0.5 * (var + 1e-12).log()], 1).cpu()
        known = torch.cat([self._recent, now])
        self._recent = known[-REMEMBERED:]
        if len(known) < 8:
            return torch.zeros(len(now), dtype=torch.bool)
        middle = known.median(0).values
        spread = 1.4826 * (known - middle).abs().median(0).values
        return ((now - middle).abs() > STRANGE * spread.clamp_min(1e-3)).any(1)

    def state(self) -> dict[str, Tensor]:
        """What is remembered, as named tensors."""
        found = {
            "sums": self._sums.clone(),
            "scalars": torch.tensor(
                [self._count, self._owed, self._against, self.believed, self._came], dtype=torch.float64
            ),
            "recent": self._recent.clone(),
        }
        return found if self._mixes is None else found | {"mixes": self._mixes.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._sums = state["sums"].clone()
        self._count, self._owed, against, believed, came = state["scalars"].tolist()
        self._against, self.believed, self._came = int(against), bool(believed), int(came)
        self._mixes = state["mixes"].clone() if "mixes" in state else None
        self._recent = state["recent"].float().reshape(-1, 2).clone()

    def kept(self) -> dict[str, Any]:
        """What is remembered, for `put_back` to go on from; nothing of it is ever changed in place."""
        return dict(vars(self))

    def put_back(self, kept: Mapping[str, Any]) -> None:
        """Remember what `kept` said."""
        vars(self).update(kept)


def limit(guard: Guard, moved: float, *, trains: bool) -> float:
    """The evidence above which to believe, by `moved` at the first sites: lower by `certain` from 0.12 on, NaN counts as 0.

    A method that trains makes the model sure, right or wrong: below 0.05 it is not believed whatever the evidence.
    """
    shift = 0.0 if math.isnan(moved) else min(1.0, max(0.0, (moved - UNMOVED) / (MOVED - UNMOVED)))
    start = 1.0 if trains else guard.limit
    return start + shift * (guard.limit - guard.certain - start)


NOT_FINITE: Said = say("the adapted model gave numbers that are not finite")


def _entropy(mix: Tensor) -> float:
    p = mix / mix.sum().clamp_min(1e-12)
    return float(-(p * p.clamp_min(1e-12).log()).sum())
