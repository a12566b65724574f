"""BN310: in evaluation, what the model says of a sample depends on the samples beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Company(Rule):
    """Half of a batch, run alone in evaluation, gives other outputs than within the whole, by more than rounding can."""

    id: ClassVar[str] = "BN310"
    title: ClassVar[str] = say("answers depend on the batch")
    needs: ClassVar[tuple[str, ...]] = ("company",)

    # In sd of the outputs. ResNet-20, ResNet-8 and MobileNet: 0 in float32 and in bfloat16, 0.23 to 0.52 once their last batch
    # norm has no statistics. The limit leaves room for kernels that depend on the size of the batch.
    limit: float = 0.05

    def check(self, facts: Facts) -> Iterator[Finding]:
        value = facts.company
        if value is not None and value > self.limit:
            silent = next((site.name for site in facts.batch if site.tensors is None), "")
            yield Finding(
                rule=self.id,
                site=silent,
                severity="error",
                value=value,
                unit=say("sd of the outputs"),
                limit=self.limit,
                message=say(
                    "In evaluation the answer for a sample changes with the samples beside it: something normalises by the "
                    "batch."
                ),
                advice=say(
                    "Give that layer statistics (track_running_stats=True, then recalibrate); look for F.batch_norm with "
                    "training=True."
                ),
            )
