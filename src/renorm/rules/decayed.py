"""BN401: weight decay on the scale and shift of norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.groups import spare_
from renorm.mend import regrouping
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Decayed(Rule):
    """Weight decay pulls the weights of norm layers towards 0, and what that costs or gives is contested: a notice.

    The fix moves them to groups of their own without decay, in the optimiser that was given; once a scheduler counts the
    groups there is none, for it would not know the new ones.
    """

    id: ClassVar[str] = "BN401"
    title: ClassVar[str] = say("weight decay on norm layers")
    needs: ClassVar[tuple[str, ...]] = ("optimizers",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        affine = {id(p): site.name for site in facts.sites for p in site.affine.values() if p.requires_grad}
        groups = [group for optimizer in facts.optimizers for group in optimizer.param_groups]
        decayed = {
            id(p): group["weight_decay"] for group in groups if group.get("weight_decay") for p in group["params"]
        }
        found = [key for key in affine if key in decayed]
        if found:
            yield Finding(
                rule=self.id,
                site=affine[found[0]],
                severity="info",
                value=float(len(found)),
                unit=many(
                    len(found),
                    "parameter of a norm layer under weight decay",
                    "parameters of norm layers under weight decay",
                ),
                limit=0.0,
                message=say(
                    "Weight decay {decay:g} pulls weights and biases of norm layers towards 0; most recipes leave them out, "
                    "and whether that matters is contested.",
                    decay=decayed[found[0]],
                ),
                advice=say(
                    "Make the groups with renorm.parameter_groups(model, lr, weight_decay=…), which leaves them out."
                ),
                fix_=regrouping(list(dict.fromkeys(affine[key] for key in found)), facts.optimizers, spare_),
            )
