"""BN101: the affine is frozen, and the statistics go on moving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import freezing
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class HalfFrozen(Rule):
    """A batch norm in training whose weight and bias ask for no gradient still moves its statistics with every forward."""

    id: ClassVar[str] = "BN101"
    title: ClassVar[str] = say("half frozen")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            affine = site.affine.values()
            if affine and site.module.training and site.tracks and not any(p.requires_grad for p in affine):
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error",
                    value=1.0,
                    unit=many(
                        1,
                        "layer whose affine is frozen and whose statistics are not",
                        "layers whose affine is frozen and whose statistics are not",
                    ),
                    limit=0.0,
                    message=say(
                        "Weight and bias are frozen, but the statistics move with every forward in training: "
                        "requires_grad=False does not hold them."
                    ),
                    advice=say("Hold the statistics too: renorm.freeze_(model)."),
                    fix_=freezing(site),
                )
