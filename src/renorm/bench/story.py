"""The story that `renorm demo` tells: a network meets shifted copies of its digits, and is measured before and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from renorm.bench.digits import Digits, batches
from renorm.doctor import Diagnosis, diagnose
from renorm.evaluate import Score, evaluate
from renorm.profile import Profile
from renorm.recalibrate import recalibrate_

__all__ = ["ADAPTING", "FEW", "FewClasses", "Meeting", "few_classes", "meet", "score"]

ADAPTING = 400  # target images that recalibration sees, without labels; the rest measure the error
FEW = (0, 1, 2)  # the digits that are present where only a few are


@dataclass(frozen=True)
class Meeting:
    """The network meets one shifted copy of the digits.

    `diagnosis` is the doctor's, `distance` that of the worst `site` in source sd; `tried` is what recalibration gives, kept
    or not; `exact` says whether after the undo every tensor and every output was as before, bit for bit.
    """

    shift: str
    site: str
    distance: float
    before: Score
    tried: Score
    accepted: bool
    why: str
    exact: bool
    diagnosis: Diagnosis

    @property
    def after(self) -> Score:
        """What the user is left with."""
        return self.tried if self.accepted else self.before


@dataclass(frozen=True)
class FewClasses:
    """Scores on a target that holds the digits `FEW` alone: as it is, re-estimated, and re-estimated with a profile."""

    shift: str
    source: Score
    plain: Score
    profiled: Score


def meet(model: nn.Module, target: Digits, shift: str) -> Meeting:
    """Diagnose, recalibrate without labels, measure, undo; `model` is the same afterwards."""
    moved = target.shifted(shift)
    unlabelled, measured = batches(moved[:ADAPTING]), moved[ADAPTING:]
    before, held, said = score(model, measured), _tensors(model), _outputs(model, measured)
    diagnosis = diagnose(model, unlabelled)
    site, distance = next(iter(diagnosis.distances.items()))

    adaptation = recalibrate_(model, unlabelled, check=unlabelled)
    accepted, why = adaptation.accepted, adaptation.why
    if not accepted:  # do it all the same, to show what it would have cost
        adaptation = recalibrate_(model, unlabelled)
    tried = score(model, measured)
    adaptation.restore_()

    same = all(now.equal(then) for now, then in zip(_tensors(model), held, strict=True))
    exact = same and _outputs(model, measured).equal(said)
    return Meeting(shift, site, distance, before, tried, accepted, why, exact, diagnosis)


def few_classes(model: nn.Module, known: Profile, target: Digits, shift: str) -> FewClasses:
    """Three scores where the target holds `FEW` of the ten classes; `model` is the same afterwards."""
    moved = target.shifted(shift)
    present = moved[torch.isin(moved.labels, torch.tensor(FEW))]
    half = len(present) // 2
    unlabelled, measured = batches(present[:half]), present[half:]
    before = score(model, measured)
    plain = recalibrate_(model, unlabelled, prior=0)
    after = score(model, measured)
    plain.restore_()
    profiled = recalibrate_(model, unlabelled, source=known)
    best = score(model, measured)
    profiled.restore_()
    return FewClasses(shift, before, after, best)


def score(model: nn.Module, labelled: Digits) -> Score:
    """The model's accuracy on labelled digits."""
    return evaluate(model, batches(labelled, labelled=True))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def _outputs(model: nn.Module, digits: Digits) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = model(digits.images)
    return outputs
