"""BN115: a bias right in front of a batch norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.adjacent import absorbing_bias, layers_before
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class IdleBias(Rule):
    """In training, a bias right in front of a batch norm (in an `nn.Sequential`) is taken off with the mean.

    The mend moves the bias into the running mean: outputs stay, up to rounding.
    """

    id: ClassVar[str] = "BN115"
    title: ClassVar[str] = say("bias that batch norm takes off")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        training = {site.name: site.module.training for site in facts.batch}
        idle = [
            name
            for name, before in layers_before(facts.model).items()
            if training[name]
            if isinstance(bias := getattr(before, "bias", None), Tensor) and bool((bias != 0).any())
        ]
        if idle:
            yield Finding(
                rule=self.id,
                site=idle[0],
                severity="info",
                value=float(len(idle)),
                unit=many(len(idle), "bias that does nothing in training", "biases that do nothing in training"),
                limit=0.0,
                message=say(
                    "The layer in front adds a bias, and this one takes it off with the mean: in training it does "
                    "nothing, in evaluation it is a second mean."
                ),
                advice=say("Build the layer with bias=False, and take the old bias off the running mean."),
                fix_=absorbing_bias(idle),
            )
