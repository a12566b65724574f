"""BN410: one batch norm called at several places of a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Shared(Rule):
    """A batch norm that one forward calls several times holds one mean and variance for what are several distributions.

    So does the last step of a recurrent network that has statistics of its own, for all steps of longer sequences.
    """

    id: ClassVar[str] = "BN410"
    title: ClassVar[str] = say("shared between places")
    needs: ClassVar[tuple[str, ...]] = ("calls",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        # a norm over time is called at every step, and holds statistics for each: a loop counts it as one
        steps = {site.name for site in facts.sites if isinstance(getattr(site.module, "steps", None), int)}
        several = {name: calls for name, calls in facts.calls.items() if calls > 1}
        shared = {name: calls for name, calls in several.items() if name not in steps}
        late = {name: calls for name, calls in several.items() if name in steps and facts.loop is None}
        if shared:
            yield self._finding(
                shared,
                message=say(
                    "One forward calls this layer several times (such layers: {count}): in training each call normalises by "
                    "its own input, in evaluation all share one mean and variance, which fit none of them.",
                    count=len(shared),
                ),
                advice=say("Give each place a layer of its own; weights may stay shared, statistics may not."),
            )
        if late:
            yield self._finding(
                late,
                message=say(
                    "Sequences are longer than the steps that have statistics of their own ({count} such norms): all steps "
                    "from this one on share its statistics.",
                    count=len(late),
                ),
                advice=say("Train on sequences as long as these, with steps= no less than their length; or cut them."),
            )

    def _finding(self, found: Mapping[str, int], *, message: str, advice: str) -> Finding:
        worst = max(found, key=lambda name: found[name])
        return Finding(
            rule=self.id,
            site=worst,
            severity="warning",
            value=float(found[worst]),
            unit=say("calls in one forward"),
            limit=1.0,
            message=message,
            advice=advice,
        )
