"""BN307: padded positions count as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Padded(Rule):
    """At a layer that reads sequences, the repeated positions at the ends move the moments by more than a limit."""

    id: ClassVar[str] = "BN307"
    title: ClassVar[str] = say("padding in the statistics")
    needs: ClassVar[tuple[str, ...]] = ("padding",)

    # Standard deviations of the unpadded values. Set to a third of what counts as a data shift (BN302): padding is no noise,
    # it moves every batch in the same direction.
    limit: float = 0.1

    def check(self, facts: Facts) -> Iterator[Finding]:
        for name, padding in facts.padding.items():
            if padding.moved > self.limit:
                yield Finding(
                    rule=self.id,
                    site=name,
                    severity="warning",
                    value=padding.moved,
                    unit=say("sd that padding moves the moments by"),
                    limit=self.limit,
                    message=say(
                        "Samples end in padding of different lengths, and it is counted as data: mean and variance "
                        "follow how long the others in the batch are."
                    ),
                    advice=say("Leave padded positions out of the statistics, with a mask."),
                )
