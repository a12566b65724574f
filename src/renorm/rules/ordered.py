"""BN305: the batches come in an order: by class, by place, by time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from renorm.moments import TINY, merge_all
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class Ordered(Rule):
    """The means of batches differ more than those of shuffled images would, as a share of the variance between images.

    With shuffled images batch means take `(B − 1) / (N − 1)` of the variance of image means; that is taken off.
    """

    id: ClassVar[str] = "BN305"
    title: ClassVar[str] = say("batches in an order")
    needs: ClassVar[tuple[str, ...]] = ("parts",)

    # Share of the variance between images, mean over channels, at the worst site. ResNet-20, ResNet-8 and MobileNet, 200
    # images in batches of 20 and 50: shuffled 0.00 to 0.02, sorted by class 0.07 to 0.41.
    limit: float = 0.05

    def check(self, facts: Facts) -> Iterator[Finding]:
        shares = {site.name: share for site in facts.batch if (share := self._share(facts, site.name)) is not None}
        worst = max(shares, key=lambda name: shares[name], default=None)
        if worst is not None and shares[worst] > self.limit:
            yield Finding(
                rule=self.id,
                site=worst,
                severity="warning",
                value=shares[worst],
                unit=say("of the variance between images lies between batches"),
                limit=self.limit,
                message=say(
                    "The batches differ more than shuffled ones would: they come ordered by class, place or time. "
                    "Batch statistics, and averages of them, then follow the order."
                ),
                advice=say(
                    "Shuffle the loader. What this doctor and recalibrate measure is pooled, and does not mind."
                ),
            )

    @staticmethod
    def _share(facts: Facts, name: str) -> float | None:
        images = [part[name].images for part in facts.parts if name in part]
        # three batches, and images enough in each for their mean to be one
        if len(images) < 3 or min(m.count for m in images) < 4:
            return None
        whole = merge_all(images)
        between = torch.stack([m.count / whole.count * (m.mean - whole.mean).square() for m in images]).sum(0)
        varies = whole.var > 1e-6 * facts.observed[name].values.var + TINY
        if not bool(varies.any()):
            return None
        chance = (len(images) - 1) / (whole.count - 1)
        share = (between / whole.var.clamp_min(TINY))[varies].mean()
        return float((share - chance) / (1 - chance))
