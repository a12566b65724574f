"""BN404: several updates of the statistics for one step of the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import slowing
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class SeveralUpdates(Rule):
    """Accumulation, two views of a sample or a discriminator's real and fake batch update the statistics several times a step.

    Each update then sees a part of the batch that the gradient sees, and the statistics forget as many times faster. Calls of
    one layer at several places of the model are BN410's."""

    id: ClassVar[str] = "BN404"
    title: ClassVar[str] = say("several updates per step")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        counts = facts.loop.counts if facts.loop and facts.loop.steps else {}
        times = {name: c.usual // max(1, c.calls) for name, c in counts.items() if c.usual > max(1, c.calls)}
        for several in sorted(set(times.values()), reverse=True):
            names = [name for name, found in times.items() if found == several]
            yield Finding(
                rule=self.id,
                site=names[0],
                severity="warning",
                value=float(several),
                unit=say("updates for each step of the optimiser"),
                limit=1.0,
                message=many(
                    len(names),
                    "The statistics of {count} batch norm move {several} times a step (gradient accumulation, several views, "
                    "or real and fake batches): each batch is normalised by itself, and the old ones are forgotten faster.",
                    "The statistics of {count} batch norms move {several} times a step (gradient accumulation, several views, "
                    "or real and fake batches): each batch is normalised by itself, and the old ones are forgotten faster.",
                    several=several,
                ),
                advice=say(
                    "Freeze the statistics (renorm.freeze_), give each kind of batch its own (per_domain), or set momentum to "
                    "1 − (1 − momentum)^(1/k) (the doctor's fix)."
                ),
                fix_=slowing(names, several),
            )
