"""BN502: an exported graph whose batch norm normalises by the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class GraphTraining(Rule):
    """In an ONNX or `.pt2` file, a batch norm in training mode (or that gives new statistics) uses the batch's moments."""

    id: ClassVar[str] = "BN502"
    title: ClassVar[str] = say("exported in training mode")
    needs: ClassVar[tuple[str, ...]] = ("graph",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        training = [norm for norm in facts.graph or () if norm.training]
        for norm in training:
            yield Finding(
                rule=self.id,
                site=norm.name,
                severity="error",
                value=float(len(training)),
                unit=many(len(training), "batch norm in training in the graph", "batch norms in training in the graph"),
                limit=0.0,
                message=say(
                    "In this graph the layer normalises by the batch it is given: every answer depends on the samples beside "
                    "it, and a single image is normalised by itself."
                ),
                advice=say("Call model.eval(), then export again (renorm export refuses to write such a file)."),
            )
