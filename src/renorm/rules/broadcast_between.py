"""BN409: two forwards before one backward, with buffers broadcast between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say
from renorm.sites import wrappers


@dataclass(frozen=True, kw_only=True)
class BroadcastBetween(Rule):
    """Each forward writes rank 0's buffers into the other ranks: a second before the backward overwrites the first's."""

    id: ClassVar[str] = "BN409"
    title: ClassVar[str] = say("buffers broadcast between two forwards")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        stack = [w for w in wrappers(facts.model) if isinstance(w, nn.parallel.DistributedDataParallel)]
        moving = [name for name, counts in (facts.loop.counts if facts.loop else {}).items() if counts.trained]
        waiting = facts.loop.waiting if facts.loop else 0
        if moving and waiting > 1 and any(map(_syncs, stack)):
            yield Finding(
                rule=self.id,
                site=moving[0],
                severity="warning",
                value=float(waiting),
                unit=say("forwards before one backward"),
                limit=1.0,
                message=say(
                    "The model is called {waiting} times before one backward, and DistributedDataParallel broadcasts its "
                    "buffers at each call: the statistics of the first are overwritten, which some versions of torch refuse.",
                    waiting=waiting,
                ),
                advice=say(
                    "Pass forward_sync_buffers=False (before torch 2.15 broadcast_buffers=False), use SyncBatchNorm, "
                    "or put both inputs into one call."
                ),
            )


def _syncs(wrapper: nn.parallel.DistributedDataParallel) -> bool:
    """Whether buffers are broadcast at each forward; newer versions name the switch otherwise, and warn of the old name."""
    return bool(vars(wrapper).get("forward_sync_buffers", vars(wrapper).get("broadcast_buffers", False)))
