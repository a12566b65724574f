"""BN202: the counter of batches is missing or no integer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from renorm.mend import at_sites, count_
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Counter(Rule):
    """Under momentum None the counter is the weight of what is held: without it the next batch replaces the statistics."""

    id: ClassVar[str] = "BN202"
    title: ClassVar[str] = say("counter missing or no integer")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if site.tensors is None or not hasattr(site.module, "num_batches_tracked"):
                continue
            counter: Any = site.module.num_batches_tracked
            odd = not isinstance(counter, Tensor) or counter.is_floating_point()
            forgets = site.momentum is None and site.name not in facts.new and not odd and int(counter) == 0
            if odd or forgets:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="info",
                    value=1.0,
                    unit=many(1, "counter that does not count", "counters that do not count"),
                    limit=0.0,
                    message=say(
                        "num_batches_tracked is missing, fractional, or 0 beside statistics that were estimated: with "
                        "momentum None the next batch in training would replace them."
                    ),
                    advice=say(
                        "Set it to the number of batches behind the statistics; with a momentum it has no effect."
                    ),
                    fix_=at_sites([site.name], count_, label="setting the counter"),
                )
