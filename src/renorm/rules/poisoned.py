"""BN406: a step that was skipped, and the statistics of its batch kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import writing
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Poisoned(Rule):
    """Statistics that are not finite beside finite weights: the optimiser skipped a step (AMP), the statistics kept its batch.

    The watch keeps the last finite value of each channel, and the fix puts those back."""

    id: ClassVar[str] = "BN406"
    title: ClassVar[str] = say("skipped step, statistics kept")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        good = facts.loop.poisoned if facts.loop else {}
        if good:
            names = list(good)
            yield Finding(
                rule=self.id,
                site=names[0],
                severity="error",
                value=float(len(names)),
                unit=many(len(names), "layer with poisoned statistics", "layers with poisoned statistics"),
                limit=0.0,
                message=say(
                    "A batch was not finite: the weights escaped it (GradScaler skips such a step), the statistics did not, "
                    "and no later batch heals them."
                ),
                advice=say(
                    "Put back the statistics from before (the doctor's fix), leave such samples out, or use bfloat16."
                ),
                fix_=writing(good, label="putting statistics back"),
            )
