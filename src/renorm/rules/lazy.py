"""BN114: a lazy layer that has seen no input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import is_lazy


@dataclass(frozen=True, kw_only=True)
class Lazy(Rule):
    """Before its first forward a lazy batch norm holds nothing that could be saved, loaded, frozen or measured."""

    id: ClassVar[str] = "BN114"
    title: ClassVar[str] = say("layer without a shape")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            if is_lazy(site):
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error",
                    value=1.0,
                    unit=many(1, "layer that has seen no input", "layers that have seen no input"),
                    limit=0.0,
                    message=say(
                        "This lazy layer has seen no input yet: it has neither channels nor statistics nor weights."
                    ),
                    advice=say("Run the model on one batch, then load the checkpoint."),
                )
