"""BN302: the data lie far from the statistics that the model normalises by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import expm1, sqrt
from typing import ClassVar

from renorm.initial import NEARER
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import follow, say
from renorm.suspects import Verdict


@dataclass(frozen=True, kw_only=True)
class DataShift(Rule):
    """At a site, the 2-Wasserstein distance of data from held statistics, less its sampling error, exceeds a limit.

    Effect sizes set the limits, never p-values: with enough images every difference is significant. Statistics that were
    never estimated (BN105) are no source to be far from, and what few updates explain (BN308) is no shift. With a source
    profile, a site at which the source's own data lie farther than the limit is held to that distance and a quarter more
    instead.
    """

    id: ClassVar[str] = "BN302"
    title: ClassVar[str] = say("data shift")
    needs: ClassVar[tuple[str, ...]] = ("distances", "mistakes")
    wants: ClassVar[tuple[str, ...]] = ("settled", "suspect")

    # Source standard deviations, mean over channels. On data of their own kind (16 to 2,000 images) the worst sites of
    # ResNet-20, ResNet-8 (CIFAR-10) and MobileNet (visual wake words) lie at 0.08 to 0.25; under noise, blur, contrast
    # and fog strong enough to cost 30 points of accuracy or more, at 0.36 to 0.90.
    limit: float = 0.3
    error: float = 0.5

    def check(self, facts: Facts) -> Iterator[Finding]:
        worst = max(facts.distances, key=lambda name: facts.distances[name], default=None)
        suspect = facts.suspect if facts.can("suspect") else None
        settled = facts.settled if facts.can("settled") else {}
        for name, far in facts.distances.items():
            left = settled.get(name, far)
            value = left if left < NEARER * far else far
            # a gap is a mean of squares, of log ratios among them: the mean distance of the same data, and a margin
            # for the noise in both
            own = 0.0 if facts.source is None else 1.25 * expm1(sqrt(facts.source.gap(name)))
            limit = max(self.limit, own)
            if value > limit:
                yield Finding(
                    rule=self.id,
                    site=name,
                    severity="error" if value > max(self.error, own) else "warning",
                    value=value,
                    unit=say("source sd"),
                    limit=limit,
                    message=say(
                        "What these data send into the layer is not what it was trained on, yet it still subtracts the "
                        "mean and divides by the spread of the old data."
                    ),
                    advice=self._advice(facts, suspect, worst),
                    fix_=None if suspect or facts.spoilt else facts.recalibrate,
                )

    @staticmethod
    def _advice(facts: Facts, suspect: Verdict | None, worst: str | None) -> str:
        if suspect:
            return say("Correct the preprocessing first (see BN303), and ask the doctor again.")
        if facts.spoilt:
            return say("Correct the columns first (see BN313), and ask the doctor again.")
        mend = say(
            "Recalibrate, and keep the result only if it holds up: renorm recalibrate MODEL DATA --check DATA -o OUT "
            "(recalibrate_ with check=)."
        )
        if worst == next(iter(facts.distances), None):
            first = say(
                "It is worst at the first layer, so look at the preprocessing first (scale, mean, channel order)."
            )
            return follow(first, mend)
        return mend
