"""BN109: a channel that is multiplied so much that the smallest change of its input is a large one of its output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class HugeGain(Rule):
    """The largest gain `|weight| / sqrt(var + eps)` of a layer exceeds a limit.

    A tiny variance alone is common in sound networks, beside a tiny weight or a larger eps, and harms nothing.
    """

    id: ClassVar[str] = "BN109"
    title: ClassVar[str] = say("huge gain")
    needs: ClassVar[tuple[str, ...]] = ("held", "broken", "settings")

    # Output units per input unit. The largest of ResNet-20, ResNet-8 and MobileNet (visual wake words, 1,718 of 2,736
    # variances below 10 eps) are 4, 9 and 53; a variance of 0 with weight 1 and eps 1e-5 gives 316. Of 45 untrained
    # architectures of timm 4 exceed the limit, with activations that have all but died out.
    limit: float = 150.0

    def check(self, facts: Facts) -> Iterator[Finding]:
        for site in facts.batch:
            held = facts.held.get(site.name)
            if held is None or site.name in facts.broken or site.eps <= 0:
                continue
            weight = getattr(site.module, "weight", None)
            gains = (held.var.clamp_min(0) + site.eps).rsqrt()
            if isinstance(weight, Tensor) and weight.shape == gains.shape:
                gains = gains * weight.detach().abs().to(gains)
            gain = float(gains.max()) if gains.numel() else 0.0
            if gain > self.limit:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="warning",
                    value=gain,
                    unit=say("units out for one unit in, at the worst channel"),
                    limit=self.limit,
                    message=say(
                        "A channel's variance is so small, beside its weight, that the slightest change of its input "
                        "is blown up."
                    ),
                    advice=say(
                        "Look at what the channel saw in training (constant inputs, half precision); estimate the "
                        "statistics anew with recalibrate, prior 0."
                    ),
                    fix_=facts.estimating(site.name),
                )
