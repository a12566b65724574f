"""BN411: layers that stood still when the loop began, and moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import holding
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class FreezeLost(Rule):
    """A batch norm that stood still on purpose when the watch began has moved since.

    It was held, in evaluation in a model in training, or its affine frozen; `train()`, a wrapper or a converter undid it."""

    id: ClassVar[str] = "BN411"
    title: ClassVar[str] = say("freeze lost on the way")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        loop = facts.loop
        if loop is None:
            return
        moved = {n: c.trained + c.silent + c.validating for n, c in loop.counts.items() if n in loop.still}
        lost = {name: max(1, moved[name]) for name in loop.counts if moved.get(name) or name in loop.loose}
        if lost:
            yield Finding(
                rule=self.id,
                site=next(iter(lost)),
                severity="warning",
                value=float(max(lost.values())),
                unit=many(
                    max(lost.values()), "update of a layer that stood still", "updates of a layer that stood still"
                ),
                limit=0.0,
                message=many(
                    len(lost),
                    "{count} batch norm that stood still when the loop began has moved since: train() puts a layer in eval() "
                    "back into training, and converters make new layers.",
                    "{count} batch norms that stood still when the loop began have moved since: train() puts a layer in eval() "
                    "back into training, and converters make new layers.",
                ),
                advice=say(
                    "Freeze with renorm.freeze_(model), which train() does not undo, after the last conversion of the model."
                ),
                fix_=holding(list(lost)),
            )
