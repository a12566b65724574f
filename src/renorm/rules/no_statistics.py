"""BN104: a batch norm without running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import is_lazy


@dataclass(frozen=True, kw_only=True)
class NoStatistics(Rule):
    """A batch norm that holds no statistics normalises every batch by itself, in evaluation too."""

    id: ClassVar[str] = "BN104"
    title: ClassVar[str] = say("no statistics")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if site.tensors is None and not is_lazy(site):
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="warning",
                    value=1.0,
                    unit=many(1, "layer without statistics", "layers without statistics"),
                    limit=0.0,
                    message=say(
                        "This layer keeps no running statistics: it normalises each batch by itself, so what the "
                        "model says of a sample depends on the samples beside it."
                    ),
                    advice=say(
                        "Build the model with track_running_stats=True and estimate the statistics with recalibrate."
                    ),
                )
