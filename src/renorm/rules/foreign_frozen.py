"""BN113: frozen batch norms of a class of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class ForeignFrozen(Rule):
    """A layer that keeps its affine as buffers (FrozenBatchNorm2d and its copies) can be neither trained nor thawed."""

    id: ClassVar[str] = "BN113"
    title: ClassVar[str] = say("frozen class of its own")
    needs: ClassVar[tuple[str, ...]] = ("held",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        frozen = [
            site
            for site in facts.batch
            if site.name in facts.held and not site.affine and "weight" in site.module._buffers and not site.tracks
        ]
        if frozen:
            yield Finding(
                rule=self.id,
                site=frozen[0].name,
                severity="info",
                value=float(len(frozen)),
                unit=many(len(frozen), "layer that is frozen by its class", "layers that are frozen by their class"),
                limit=0.0,
                message=say(
                    "These layers keep their affine as buffers: no optimiser, train() or thaw reaches them. They can be "
                    "recalibrated."
                ),
                advice=say("To train them, rebuild the model with nn.BatchNorm2d; the same checkpoint fits."),
            )
