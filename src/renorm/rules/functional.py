"""BN312: batch norm called as a function, out of reach of everything that looks for layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Functional(Rule):
    """A forward pass that calls `F.batch_norm` with statistics of no layer has batch norms that no tool can find or mend."""

    id: ClassVar[str] = "BN312"
    title: ClassVar[str] = say("batch norm out of reach")
    needs: ClassVar[tuple[str, ...]] = ("observed",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        calls = facts.observed.functional
        if calls:
            yield Finding(
                rule=self.id,
                site="",
                severity="info",
                value=float(calls),
                unit=many(
                    calls, "call of F.batch_norm in one forward pass", "calls of F.batch_norm in one forward pass"
                ),
                limit=0.0,
                message=say(
                    "The model calls batch norm as a function, with statistics that belong to no layer: these places "
                    "can be neither measured nor recalibrated."
                ),
                advice=say("Put a torch.nn.BatchNorm layer in their place; the same statistics and weights fit it."),
            )
