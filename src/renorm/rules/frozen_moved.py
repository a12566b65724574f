"""BN205: statistics that moved though the layer is said to be frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from renorm.freeze import holds_statistics
from renorm.mend import writing
from renorm.moments import Moments, as_float64
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class FrozenMoved(Rule):
    """A layer whose affine does not train, and is the checkpoint's, holds other statistics than the checkpoint.

    A layer that `freeze_` or a policy holds is left out: statistics of the target may have been put there on purpose.
    """

    id: ClassVar[str] = "BN205"
    title: ClassVar[str] = say("frozen, yet moved")
    needs: ClassVar[tuple[str, ...]] = ("file", "held")

    def check(self, facts: Facts) -> Iterator[Finding]:
        moved: dict[str, float] = {}
        before: dict[str, Moments] = {}
        for site in facts.batch:
            affine = site.affine
            mean, var = (_of(facts, site.name, key) for key in ("running_mean", "running_var"))
            frozen = bool(affine) and not any(p.requires_grad for p in affine.values())
            if (
                not frozen
                or holds_statistics(site.module)
                or site.name not in facts.held
                or mean is None
                or var is None
            ):
                continue
            same = all(_equal(p, _of(facts, site.name, key)) for key, p in affine.items())
            far = float(((facts.held[site.name].mean - mean).abs() / (var + site.eps).sqrt()).max())
            if same and (far > 0 or bool((facts.held[site.name].var != var).any())):
                moved[site.name], before[site.name] = far, Moments(float("inf"), mean, var)
        if moved:
            worst = max(moved, key=lambda name: moved[name])
            yield Finding(
                rule=self.id,
                site=worst,
                severity="error",
                value=moved[worst],
                unit=say("source sd that a mean has moved by"),
                limit=0.0,
                message=many(
                    len(moved),
                    "Weight and bias are frozen and those of the checkpoint, but the statistics of {count} layer are not: "
                    "they moved in training.",
                    "Weight and bias are frozen and those of the checkpoint, but the statistics of {count} layers are not: "
                    "they moved in training.",
                ),
                advice=say(
                    "Put the checkpoint's statistics back (the doctor's fix), and freeze with renorm.freeze_(model)."
                ),
                fix_=writing(before, label="putting the checkpoint's statistics back"),
            )


def _of(facts: Facts, site: str, key: str) -> Tensor | None:
    tensor = (facts.file or {}).get(f"{site}.{key}".lstrip("."))
    return None if tensor is None else as_float64(tensor).cpu()


def _equal(parameter: Tensor, tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and parameter.shape == tensor.shape
        and bool((as_float64(parameter.detach()).cpu() == tensor).all())
    )
