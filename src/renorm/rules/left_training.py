"""BN501: a model in evaluation with a batch norm left in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import setting
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import unwrap


@dataclass(frozen=True, kw_only=True)
class LeftTraining(Rule):
    """A batch norm in training, in a model in evaluation, normalises by the batch and moves its statistics."""

    id: ClassVar[str] = "BN501"
    title: ClassVar[str] = say("left in training mode")
    needs: ClassVar[tuple[str, ...]] = ("held",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        if unwrap(facts.model).training:
            return
        for site in facts.batch:
            if site.module.training and site.tracks:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error",
                    value=1.0,
                    unit=many(1, "layer in training", "layers in training"),
                    limit=0.0,
                    message=say(
                        "The model is in evaluation, this layer is not: it normalises by the batch, and every forward, an "
                        "exported one too, moves its statistics."
                    ),
                    advice=say("Call model.eval() last, before use and export."),
                    fix_=setting([site.name], label="putting into evaluation", training=False),
                )
