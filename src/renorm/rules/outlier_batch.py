"""BN309: one batch unlike all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.moments import TINY, Moments, merge_all
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say
from renorm.shift import Shift


@dataclass(frozen=True, kw_only=True)
class OutlierBatch(Rule):
    """One batch moves the pooled moments of a site by more than a limit, and by several times what any other does."""

    id: ClassVar[str] = "BN309"
    title: ClassVar[str] = say("one batch unlike the others")
    needs: ClassVar[tuple[str, ...]] = ("parts",)

    # Standard deviations that one batch moves the pooled moments by, mean over channels: as much as counts as a data shift
    # (BN302). Shuffled batches of 20 move those of ResNet-20, ResNet-8 and MobileNet by at most 0.03.
    limit: float = 0.3
    error: float = 0.5
    times: float = 4.0  # what the next batch does

    def check(self, facts: Facts) -> Iterator[Finding]:
        found: tuple[float, str] = (0.0, "")
        for site in facts.batch:
            values = [part[site.name].values for part in facts.parts if site.name in part]
            if len(values) < 4:
                continue
            moved = sorted(self._without(values, index) for index in range(len(values)))
            if moved[-1] > self.limit and moved[-1] > self.times * moved[-2]:
                found = max(found, (moved[-1], site.name))
        if found[0]:
            yield Finding(
                rule=self.id,
                site=found[1],
                severity="error" if found[0] > self.error else "warning",
                value=found[0],
                unit=say("sd that one batch alone moves the moments by"),
                limit=self.limit,
                message=say("One batch is unlike all others, and moves everything that is measured or estimated."),
                advice=say("Look at its samples (corrupt files, another scale) and leave them out."),
            )

    @staticmethod
    def _without(values: list[Moments], index: int) -> float:
        others = merge_all([m for i, m in enumerate(values) if i != index])
        return Shift.between(others, merge_all(values), eps=TINY).layer.wasserstein2
