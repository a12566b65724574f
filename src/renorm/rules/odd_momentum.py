"""BN106: a momentum that makes no average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import setting
from renorm.rules.base import Facts, Finding, Rule, Severity
from renorm.said import say
from renorm.sites import Site


@dataclass(frozen=True, kw_only=True)
class OddMomentum(Rule):
    """A momentum of 0 never moves the statistics, one of `limit` or more forgets all but the last batches.

    None (the plain average of all batches) is no fault of its own; it is named for information where the layer trains.
    """

    id: ClassVar[str] = "BN106"
    title: ClassVar[str] = say("odd momentum")
    needs: ClassVar[tuple[str, ...]] = ("batch", "settings")

    # A share of the new batch. At 0.5 the last two batches count three quarters; torch's default is 0.1, and so
    # is every layer's in 45 architectures of timm (tests/test_healthy.py). TensorFlow's 0.9 to 0.999 mean the share of the old.
    limit: float = 0.5
    default: float = 0.1

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if site.tensors is None or not hasattr(site.module, "momentum"):
                continue
            momentum = site.momentum
            if momentum is None and site.module.training:
                yield self._found(site, 0.0, "info")
            elif momentum is not None and (momentum == 0 or momentum >= self.limit):
                yield self._found(site, momentum, "warning")

    def _found(self, site: Site, momentum: float, severity: Severity) -> Finding:
        if severity == "info":
            message = say(
                "momentum is None: the statistics are the plain average of every batch so far, the earliest included."
            )
        elif momentum == 0:
            message = say("momentum is 0: training never moves these statistics, while it normalises by the batch.")
        else:
            message = say(
                "A new batch outweighs all before it: this is the number of TensorFlow or Keras, which means the weight of "
                "the old statistics, or a slip."
            )
        mended = round(1 - momentum, 12) if 0.8 <= momentum < 1 else self.default
        return Finding(
            rule=self.id,
            site=site.name,
            severity=severity,
            value=momentum,
            unit=say("weight of the new batch"),
            limit=self.limit if momentum >= self.limit else 0.0,
            message=message,
            advice=say(
                "Set momentum to 0.1, or to 1 minus a TensorFlow momentum; to hold statistics still, freeze them "
                "(renorm.freeze_)."
            ),
            fix_=setting([site.name], label="setting momentum", momentum=mended),
        )
