"""BN408: plain batch norm with few samples on each rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say
from renorm.sites import wrappers


@dataclass(frozen=True, kw_only=True)
class SmallPerRank(Rule):
    """Under DistributedDataParallel a plain batch norm normalises by its own rank's samples, however large the whole batch."""

    id: ClassVar[str] = "BN408"
    title: ClassVar[str] = say("few samples per rank")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    # Samples on one rank. The same as BN304's limit on values, for what differs most between batches is samples, not places.
    limit: int = 16

    def check(self, facts: Facts) -> Iterator[Finding]:
        counts = facts.loop.counts if facts.loop else {}
        if not any(isinstance(wrapper, nn.parallel.DistributedDataParallel) for wrapper in wrappers(facts.model)):
            return
        ranks = torch.distributed.get_world_size()
        plain = [s.name for s in facts.batch if not s.synchronises and s.name in counts]
        small = [name for name in plain if 0 < counts[name].samples < self.limit and counts[name].trained]
        if small and ranks > 1:
            yield Finding(
                rule=self.id,
                site=small[0],
                severity="warning",
                value=float(min(counts[name].samples for name in small)),
                unit=say("samples on one rank (at least this many are wanted)"),
                limit=float(self.limit),
                message=say(
                    "{ranks} ranks train together, but each plain batch norm normalises by the few samples of its own rank, "
                    "and statistics differ between ranks.",
                    ranks=ranks,
                ),
                advice=say(
                    "Convert to SyncBatchNorm (with timm's converter where norms hold activations), or freeze the statistics."
                ),
            )
