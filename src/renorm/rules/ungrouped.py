"""BN402: norm parameters that the optimiser does not know, or holds though they are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.groups import enrol_
from renorm.mend import Fix, putting_aside, regrouping
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Ungrouped(Rule):
    """A norm layer's parameter that asks for a gradient in no group never trains; a frozen one with an old gradient moves.

    The fix adds the first to the optimiser that was given (not once a scheduler counts its groups), and puts the gradients of
    the second aside.
    """

    id: ClassVar[str] = "BN402"
    title: ClassVar[str] = say("norm parameters outside the groups")
    needs: ClassVar[tuple[str, ...]] = ("optimizers",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        inside = {id(p) for o in facts.optimizers for group in o.param_groups for p in group["params"]}
        pairs = [(site.name, p) for site in facts.sites for p in site.affine.values()]
        missing = [name for name, p in pairs if p.requires_grad and id(p) not in inside]
        stale = [name for name, p in pairs if not p.requires_grad and id(p) in inside and p.grad is not None]
        if missing:
            yield self._found(
                missing,
                unit=many(len(missing), "norm parameter in no group", "norm parameters in no group"),
                message=say(
                    "These parameters ask for a gradient, but no group of the optimiser holds them: they never train."
                ),
                advice=say(
                    "Make the optimiser anew, with renorm.parameter_groups(model, lr), after the last change of the model."
                ),
                fix_=regrouping(list(dict.fromkeys(missing)), facts.optimizers, enrol_),
            )
        if stale:
            yield self._found(
                stale,
                unit=many(
                    len(stale),
                    "frozen norm parameter with a gradient in a group",
                    "frozen norm parameters with a gradient in a group",
                ),
                message=say(
                    "These parameters are frozen, but the optimiser holds them with a gradient of before: momentum and weight "
                    "decay still move them."
                ),
                advice=say("Freeze with renorm.freeze_(model), which puts the gradient aside, or set it to None."),
                fix_=putting_aside(list(dict.fromkeys(stale))),
            )

    def _found(self, names: list[str], *, unit: str, message: str, advice: str, fix_: Fix | None) -> Finding:
        return Finding(
            rule=self.id,
            site=names[0],
            severity="warning",
            value=float(len(names)),
            unit=unit,
            limit=0.0,
            message=message,
            advice=advice,
            fix_=fix_,
        )
