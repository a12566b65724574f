"""BN108: statistics that no data can have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class NonFinite(Rule):
    """A mean or variance that is NaN, infinite or (the variance) negative makes every output of its channel worthless."""

    id: ClassVar[str] = "BN108"
    title: ClassVar[str] = say("impossible statistics")
    needs: ClassVar[tuple[str, ...]] = ("held",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for name, held in facts.held.items():
            bad = ~held.mean.isfinite() | ~held.var.isfinite() | (held.var < 0)
            if bad.any():
                yield Finding(
                    rule=self.id,
                    site=name,
                    severity="error",
                    value=float(bad.sum()),
                    unit=many(int(bad.sum()), "channel", "channels"),
                    limit=0.0,
                    message=say(
                        "The statistics hold values that are not finite, or a negative variance: one bad batch in "
                        "training is enough, and no later batch heals it."
                    ),
                    advice=say(
                        "Go back to a checkpoint from before, or estimate the statistics anew with recalibrate, prior 0."
                    ),
                    fix_=facts.reestimate,
                )
