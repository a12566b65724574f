"""BN102: a freeze that the next train() undoes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import freezing
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Thaws(Rule):
    """A batch norm that stands still now, in a model that trains, moves again after the next call of `train()`.

    A layer is taken as meant to be frozen where it alone is in evaluation in a model in training, or where its affine is
    frozen in a model that trains something else.
    """

    id: ClassVar[str] = "BN102"
    title: ClassVar[str] = say("freeze that train() undoes")
    needs: ClassVar[tuple[str, ...]] = ("thawing",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.thawing:
            yield Finding(
                rule=self.id,
                site=site.name,
                severity="warning",
                value=1.0,
                unit=many(1, "layer that train() sets moving again", "layers that train() sets moving again"),
                limit=0.0,
                message=say(
                    "This layer looks frozen, but train() puts it back into training, and its statistics then move."
                ),
                advice=say("Freeze it so that train() passes it by: renorm.freeze_(model)."),
                fix_=freezing(site),
            )
