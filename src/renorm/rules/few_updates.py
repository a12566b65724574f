"""BN308: statistics that have not left their initial values behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.mend import at_sites
from renorm.moments import Moments
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class FewUpdates(Rule):
    """Of the initial mean 0 and variance 1 `(1 − momentum)^n` is left after n updates; without it the statistics fit better.

    The counter alone is no proof, for statistics may be set otherwise: only the data make it a finding.
    """

    id: ClassVar[str] = "BN308"
    title: ClassVar[str] = say("statistics still half initial")
    needs: ClassVar[tuple[str, ...]] = (
        "shifts",
        "new",
    )

    left: float = 0.05  # share of the initial values: n < 29 at momentum 0.1, n < 299 at 0.01
    # The corrected statistics must lie nearer the data by half, from this many source sd on (BN302's limit for fresh data).
    nearer: float = 0.5
    limit: float = 0.3

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            far, corrected = facts.shifts.get(site.name), self._corrected(facts, site)
            if far is None or corrected is None or site.name in facts.broken:
                continue
            was = far.layer.wasserstein2
            now = Shift.between(corrected, facts.observed[site.name].values, eps=site.eps).layer.wasserstein2
            if was > self.limit and now < self.nearer * was:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="warning",
                    value=was,
                    unit=say("source sd from the data, less than half of it without the initial values"),
                    limit=self.limit,
                    message=say(
                        "Training stopped after so few updates that mean 0 and variance 1 are still part of the "
                        "statistics."
                    ),
                    advice=say("Recalibrate, or take the initial share off (the doctor's fix, which needs no data)."),
                    fix_=at_sites([site.name], self._correct_, label="taking the initial values off"),
                )

    def _corrected(self, facts: Facts, site: Site) -> Moments | None:
        left, held = share_left(site), facts.held.get(site.name)
        if held is None or left is None or not self.left < left < 1:
            return None
        var = (held.var - left) / (1 - left)
        return Moments(held.count, held.mean / (1 - left), var) if bool((var > 0).all()) else None

    @staticmethod
    def _correct_(site: Site) -> None:
        left, held = share_left(site), site.statistics()
        if left is not None and held is not None:
            site.write_(Moments(held.count, held.mean / (1 - left), (held.var - left) / (1 - left)))


def share_left(site: Site) -> float | None:
    """The share of the initial values after the updates that the layer counted; None where it does not say."""
    counter = getattr(site.module, "num_batches_tracked", None)
    if site.momentum is None or not isinstance(counter, Tensor) or int(counter) < 1:
        return None
    return float((1 - site.momentum) ** int(counter))
