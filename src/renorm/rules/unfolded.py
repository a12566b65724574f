"""BN504: an exported graph that still has batch norms which the layer in front could carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Unfolded(Rule):
    """In an ONNX or `.pt2` file, a batch norm stands right behind a convolution or linear layer that nothing else reads."""

    id: ClassVar[str] = "BN504"
    title: ClassVar[str] = say("left unfolded in the graph")
    needs: ClassVar[tuple[str, ...]] = ("graph",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        graph = facts.graph or ()
        left = [norm for norm in graph if norm.carrier and not norm.training]
        if left:
            yield Finding(
                rule=self.id,
                site=left[0].name,
                severity="info",
                value=float(len(left)),
                unit=many(
                    len(left),
                    "batch norm that the layer in front could carry",
                    "batch norms that the layer in front could carry",
                ),
                limit=0.0,
                message=say(
                    "This layer is a scale and a shift of what the layer in front gives, and costs a pass over memory that "
                    "it need not."
                ),
                advice=say(
                    "Export with renorm export MODEL -o FILE, which folds what can be folded and proves each fold."
                ),
            )
