"""BN204: the ranks of one run hold different statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from renorm.mend import writing
from renorm.moments import Moments, merge_all
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say
from renorm.shift import Shift


@dataclass(frozen=True, kw_only=True)
class RanksDisagree(Rule):
    """The statistics of one rank, or of one rank's checkpoint, lie farther from those of all ranks pooled than batches explain.

    Each rank's plain batch norm sees its own share of the data, and a checkpoint holds what one of them saw. Asked with
    `diagnose(ranks=…)`: the checkpoints of other ranks, or "group" on every rank of a running group. The fix writes what all
    ranks hold together, at every layer: the mean of their means, their variances and the variance between them.
    """

    id: ClassVar[str] = "BN204"
    title: ClassVar[str] = say("ranks disagree")
    needs: ClassVar[tuple[str, ...]] = ("ranks",)

    # Pooled sd, mean over channels. ResNet-20 and MobileNet in training on 2 and 4 ranks that see shares of the same images,
    # 24 updates without an exchange: at most 0.04 at 16 images a rank or more, 0.07 at 8; with buffers broadcast 0.03.
    limit: float = 0.1

    def check(self, facts: Facts) -> Iterator[Finding]:
        pooled: dict[str, Moments] = {}
        far: dict[str, tuple[float, int]] = {}
        for site in facts.batch:
            parts = {rank: held[site.name] for rank, held in enumerate(facts.ranks) if site.name in held}
            if len(parts) < 2:
                continue
            every = merge_all(parts.values())
            distances = {r: Shift.between(every, part, eps=site.eps).layer.wasserstein2 for r, part in parts.items()}
            rank = max(distances, key=lambda r: distances[r])
            if isfinite(distances[rank]):
                pooled[site.name] = every
            if isfinite(distances[rank]) and distances[rank] > self.limit:
                far[site.name] = (distances[rank], rank)
        fix_ = writing(pooled, label="pooling the ranks")
        for name, (value, rank) in far.items():
            yield Finding(
                rule=self.id,
                site=name,
                severity="warning",
                value=value,
                unit=say("sd from the statistics of all ranks pooled"),
                limit=self.limit,
                message=say(
                    "The ranks hold different statistics here, number {rank} those farthest from all: each saw its own share "
                    "of the data, and a checkpoint of one knows that share alone.",
                    rank=rank,
                ),
                advice=say(
                    "Write the pooled statistics into every rank, or recalibrate; train with SyncBatchNorm, or shuffle the "
                    "data over the ranks."
                ),
                fix_=fix_,
            )
