"""BN103: statistics that are kept but not tracked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import setting
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Untracked(Rule):
    """With `track_running_stats=False` beside buffers, evaluation normalises by statistics that training does not move."""

    id: ClassVar[str] = "BN103"
    title: ClassVar[str] = say("statistics kept, not tracked")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if site.tensors is not None and getattr(site.module, "track_running_stats", True) is False:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error",
                    value=1.0,
                    unit=many(
                        1,
                        "layer that keeps statistics and does not track them",
                        "layers that keep statistics and do not track them",
                    ),
                    limit=0.0,
                    message=say(
                        "track_running_stats is False though statistics are there: training normalises by the batch, "
                        "evaluation by the statistics, so the layer is neither frozen nor consistent."
                    ),
                    advice=say("Set track_running_stats to True and freeze the layer: renorm.freeze_(model)."),
                    fix_=setting(
                        [site.name], label="tracking statistics again", track_running_stats=True, training=False
                    ),
                )
