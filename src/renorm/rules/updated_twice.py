"""BN403: statistics that are updated again while gradients are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import slowing
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class UpdatedTwice(Rule):
    """Activation checkpointing runs a batch norm once more in the backward, and its statistics take the same batch twice.

    One momentum m twice is 1 − (1 − m)² once: the mended momentum makes two updates weigh as much as one did."""

    id: ClassVar[str] = "BN403"
    title: ClassVar[str] = say("updated twice per step")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        counts = facts.loop.counts if facts.loop else {}
        twice = {name: 1 + c.again / max(1, c.trained) for name, c in counts.items() if c.again}
        if twice:
            worst = max(twice, key=lambda name: twice[name])
            yield Finding(
                rule=self.id,
                site=worst,
                severity="warning",
                value=twice[worst],
                unit=say("updates for each forward"),
                limit=1.0,
                message=say(
                    "Activation checkpointing runs this layer again in the backward ({count} in all), and its "
                    "statistics take each batch twice.",
                    count=len(twice),
                ),
                advice=say(
                    "Set momentum to 1 − sqrt(1 − momentum), which makes two updates weigh as one (the doctor's fix), or let "
                    "renorm.lean_(model) run blocks again instead: it moves statistics once."
                ),
                fix_=slowing(list(twice), 2),
            )
