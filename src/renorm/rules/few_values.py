"""BN304: batches with too few values a channel to be normalised by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class FewValues(Rule):
    """A layer that normalises by fewer than `limit` values gives mostly noise, by one value nothing.

    Said of layers in training or without statistics; of others for information, where no batch is larger.
    """

    id: ClassVar[str] = "BN304"
    title: ClassVar[str] = say("too few values for a batch")
    needs: ClassVar[tuple[str, ...]] = ("parts",)

    # Values a channel and batch, N·H·W. The sd of n normal values is off by 1/sqrt(2 n): 18 % at 16.
    limit: int = 16

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            counts = [part[site.name].values.count for part in facts.parts if site.name in part]
            if not counts:
                continue
            restless = site.module.training or site.tensors is None
            # the last batch of a loader is what is left over, and in evaluation nothing is normalised by it
            count = min(counts) if restless else max(counts)
            if count < self.limit:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity=("error" if count <= 1 else "warning") if restless else "info",
                    value=float(count),
                    unit=say("values a channel in a batch (at least this many are wanted)"),
                    limit=float(self.limit),
                    message=say("A batch has so few values a channel that its mean and variance are mostly chance."),
                    advice=say("For training take larger batches, or freeze the statistics (renorm.freeze_)."),
                )
