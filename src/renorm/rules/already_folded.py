"""BN505: a network that arrives without batch norm, as one does whose batch norms were folded into its convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import bare_convolutions


@dataclass(frozen=True, kw_only=True)
class AlreadyFolded(Rule):
    """No norm layer anywhere and a bias at every convolution: batch norms were folded into them, or never stood there."""

    id: ClassVar[str] = "BN505"
    title: ClassVar[str] = say("looks folded already")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        bare = bare_convolutions(facts.model)
        if bare:
            yield Finding(
                rule=self.id,
                site=bare[0],
                severity="info",
                value=float(len(bare)),
                unit=many(
                    len(bare),
                    "convolution with a bias and no norm layer in the model",
                    "convolutions with a bias and no norm layer in the model",
                ),
                limit=0.0,
                message=say(
                    "This model looks as if its batch norms had been folded into its convolutions (or it was made without "
                    "any): there are no statistics that new data could recalibrate."
                ),
                advice=say(
                    "Recalibrate before folding, on the checkpoint this came from. What rounding or pruning moved since then, "
                    "renorm.repair_(model, source, batches) mends in the biases (bias correction)."
                ),
            )
