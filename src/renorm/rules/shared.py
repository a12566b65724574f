"""BN410: one batch norm called at several places of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Shared(Rule):
    """A batch norm that one forward calls several times holds one mean and variance for what are several distributions."""

    id: ClassVar[str] = "BN410"
    title: ClassVar[str] = say("shared between places")
    needs: ClassVar[tuple[str, ...]] = ("calls",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        shared = {name: calls for name, calls in facts.calls.items() if calls > 1}
        if shared:
            worst = max(shared, key=lambda name: shared[name])
            yield Finding(
                rule=self.id,
                site=worst,
                severity="warning",
                value=float(shared[worst]),
                unit=say("calls in one forward"),
                limit=1.0,
                message=say(
                    "One forward calls this layer several times ({count} such layers): in training each call normalises by its "
                    "own input, in evaluation all share one mean and variance, which fit none of them.",
                    count=len(shared),
                ),
                advice=say("Give each place a layer of its own; weights may stay shared, statistics may not."),
            )
