"""BN405: statistics that move where nothing is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import holding
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class Leaked(Rule):
    """An update without gradients, or while validating, takes samples into the statistics that the model must not learn from.

    An error where the layer also trains; a layer that is never updated with gradients is a teacher's or a momentum encoder's,
    and that is a warning. Where another momentum is set meanwhile (`update_bn`, precise BN) statistics are re-estimated on
    purpose, and such updates do not count."""

    id: ClassVar[str] = "BN405"
    title: ClassVar[str] = say("updated in validation")
    needs: ClassVar[tuple[str, ...]] = ("loop",)

    def check(self, facts: Facts) -> Iterator[Finding]:
        counts = facts.loop.counts if facts.loop else {}
        leaks = {name: c.silent + c.validating for name, c in counts.items() if c.silent + c.validating}
        student = [name for name in leaks if counts[name].trained]
        teacher = [name for name in leaks if name not in student]
        if student:
            yield Finding(
                rule=self.id,
                site=student[0],
                severity="error",
                value=float(max(leaks[name] for name in student)),
                unit=many(
                    max(leaks[name] for name in student),
                    "update without gradients or in validation",
                    "updates without gradients or in validation",
                ),
                limit=0.0,
                message=many(
                    len(student),
                    "The statistics of {count} batch norm moved under no_grad or in validation: no_grad does not hold them, "
                    "and validation data leaks into the model.",
                    "The statistics of {count} batch norms moved under no_grad or in validation: no_grad does not hold them, "
                    "and validation data leaks into the model.",
                ),
                advice=say("Call model.eval() before validation and model.train() after it."),
            )
        if teacher:
            yield Finding(
                rule=self.id,
                site=teacher[0],
                severity="warning",
                value=float(max(leaks[name] for name in teacher)),
                unit=many(
                    max(leaks[name] for name in teacher),
                    "update without gradients or in validation",
                    "updates without gradients or in validation",
                ),
                limit=0.0,
                message=many(
                    len(teacher),
                    "{count} batch norm that nothing trains (of a teacher, a target or momentum encoder) moves its statistics "
                    "under no_grad.",
                    "{count} batch norms that nothing trains (a teacher, a target or momentum encoder) move their statistics "
                    "under no_grad.",
                ),
                advice=say("Put the teacher into evaluation, for good: renorm.freeze_(teacher)."),
                fix_=holding(teacher),
            )
