"""BN111: channels that say the same of everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from renorm.adjacent import sites_before
from renorm.initial import was_trained
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class DeadChannels(Rule):
    """More than a share of a trained layer's channels have weight 0, or lie below 0 by three deviations in front of a ReLU.

    Of what follows a layer only a ReLU next to it in an `nn.Sequential`, or within the layer itself, is known.
    """

    id: ClassVar[str] = "BN111"
    title: ClassVar[str] = say("dead channels")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    # A share of the channels. ResNet-20, ResNet-8 and MobileNet have 0 to 0.03 over all layers (17, 0 and 11 channels of
    # weight 0); a tenth is worth the pruning.
    limit: float = 0.1
    weight_below: float = 1e-6

    def check(self, facts: Facts) -> Iterator[Finding]:
        before_relu = set(sites_before(facts.model, nn.ReLU))
        for site in facts.batch:
            weight, bias = (getattr(site.module, name, None) for name in ("weight", "bias"))
            if not was_trained(site) or not isinstance(weight, Tensor) or weight.dim() != 1:
                continue
            weight = weight.detach().abs()
            dead = weight < self.weight_below
            if site.name in before_relu and isinstance(bias, Tensor):
                dead |= bias.detach() + 3 * weight < 0
            share = float(dead.cpu().double().mean())
            if share > self.limit:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="info",
                    value=share,
                    unit=say("of the channels"),
                    limit=self.limit,
                    message=say(
                        "These channels say the same of every input: their weight is 0, or what they say never passes "
                        "the ReLU behind."
                    ),
                    advice=say("They can be pruned without a change of the output."),
                )
