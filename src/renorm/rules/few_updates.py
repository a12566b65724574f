"""BN308: statistics that have not left their initial values behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.initial import NEARER, taking_off
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class FewUpdates(Rule):
    """Of mean 0 and variance 1 `(1 − momentum)^n` is left after n updates; without it the data lie nearer by half or more.

    That is asked where more than 0.05 is left: n < 29 at momentum 0.1, n < 299 at 0.01. The counter alone is no proof, for
    statistics may be set otherwise: only the data make it a finding.
    """

    id: ClassVar[str] = "BN308"
    title: ClassVar[str] = say("statistics still half initial")
    needs: ClassVar[tuple[str, ...]] = ("settled", "distances")
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    # Source standard deviations from the data: what counts as a data shift (BN302).
    limit: float = 0.3
    error: float = 0.5
    nearer: float = NEARER

    def check(self, facts: Facts) -> Iterator[Finding]:
        fix_ = taking_off(facts.settled)
        for name, now in facts.settled.items():
            was = facts.distances[name]
            if was > self.limit and now < self.nearer * was:
                yield Finding(
                    rule=self.id,
                    site=name,
                    severity="error" if was > self.error else "warning",
                    value=was,
                    unit=say("source sd from the data, less than half of it without the initial values"),
                    limit=self.limit,
                    message=say(
                        "Training stopped after so few updates that mean 0 and variance 1 are still part of the "
                        "statistics."
                    ),
                    advice=say("Recalibrate, or take the initial share off (the doctor's fix, which needs no data)."),
                    fix_=fix_,
                )
