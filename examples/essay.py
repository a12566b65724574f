"""Batch norm in transfer learning, told in six steps on real digits: `python examples/essay.py`.

The order is that of the essay renorm grew from: the layer, transfer, the formula, the code that optimises a pretrained
model's layers, how to choose, and when it hurts. Every number is measured as it is printed; nothing is downloaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import renorm
from renorm.bench import digits
from renorm.bench.digits import Digits
from renorm.layers import BNLayer

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)  # the digits of the old task and of the new one
LABELLED, DRAWS = 50, 3  # images of the new task that have labels; how often they are drawn, for the mean
UNLABELLED = 400  # images of the target that recalibration sees, without labels
FEW = (0, 1, 2)  # the only digits on the ward where re-estimation hurts
POLICIES = ("head-only", "affine-and-head", "all", "recalibrate-then-freeze")
SHIFTS = ("low contrast", "fog", "blur")


@dataclass(frozen=True)
class Told:
    """What the six steps measured; errors in % of images that no step has seen.

    layer     largest mean and variance gap of a normalised batch, and the largest gap to the formula written out
    transfer  error on the new task, by what was allowed to move; mean over `DRAWS`
    formula   how far the same batch comes out in training and in evaluation, in output units, after one batch seen
    code      by shift: source, recalibrated
    choosing  by number of unlabelled images: nothing kept of the source (`prior=0`), `prior="auto"`
    hurts     of the source, plain re-estimation, with a check, with a profile, where only some digits occur
    """

    layer: tuple[float, float, float]
    transfer: dict[str, float]
    formula: float
    code: dict[str, tuple[float, float]]
    choosing: dict[int, tuple[float, float]]
    hurts: dict[str, float]


def tell() -> Told:
    """All six steps, in their order."""
    torch.manual_seed(0)
    source, target = digits.load()
    *_, reader = digits.training(source)
    return Told(
        the_layer(),
        transfer(source, target),
        formula(),
        code(reader, target),
        choosing(reader, target),
        hurts(reader, source, target),
    )


# 1. The layer: each feature of a batch loses its mean and its spread, then gains a learnt weight and bias.


def the_layer() -> tuple[float, float, float]:
    layer = BNLayer(128)  # 128 features; the same class takes sequences, images and volumes
    batch = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.no_grad():
        out = layer(batch)

    seen = renorm.Moments.of(batch)  # mean and *biased* variance, which is what normalises
    by_hand = (batch - seen.mean) / torch.sqrt(layer.eps + seen.var) * layer.weight.detach() + layer.bias.detach()
    held = renorm.Moments.of(out)
    return float(held.mean.abs().max()), float((held.var - 1).abs().max()), float((out - by_hand).abs().max())


# 2. Transfer: a network that reads 0–4 is split into features and head; a new head learns 5–9 from a few labels.


def transfer(source: Digits, target: Digits) -> dict[str, float]:
    *_, pretrained = digits.training(only(source, OLD))
    assert renorm.split(pretrained).head == ("head",)  # the deep part, which decides; all before it makes features
    new = only(source, NEW).shifted("low contrast")  # the new task comes from another camera, too
    measured = only(target, NEW).shifted("low contrast")

    errors = dict.fromkeys(("from scratch", *POLICIES), 0.0)
    for draw in range(DRAWS):
        labelled = new[draw * LABELLED : (draw + 1) * LABELLED]
        for way in errors:
            model = digits.network() if way == "from scratch" else copy.deepcopy(pretrained)
            model.head = nn.Linear(model.head.in_features, 10)
            if way == "recalibrate-then-freeze":
                renorm.recalibrate_(model, digits.batches(labelled, size=LABELLED))
            policy = "all" if way == "from scratch" else way
            errors[way] += fine_tuned(model, labelled, measured, policy) / DRAWS
    return errors


def fine_tuned(model: nn.Module, labelled: Digits, measured: Digits, policy: str, *, epochs: int = 40) -> float:
    """Error after a plain training loop in which only what `policy` names may move."""
    handle = renorm.apply_policy_(model, policy)
    optimiser = torch.optim.AdamW(renorm.parameter_groups(model, lr=1e-3, head_lr=1e-2, weight_decay=1e-2))
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        model.train()  # a policy holds its layers still past this line
        for rows in torch.randperm(len(labelled), generator=shuffle).split(10):
            optimiser.zero_grad()
            F.cross_entropy(model(labelled.images[rows]), labelled.labels[rows]).backward()
            optimiser.step()
    handle.restore_()
    return error(model.eval(), measured)


# 3. The formula, step by step: batch, moments, normalise, activate. In evaluation other moments stand in it.


def formula() -> float:
    layer = BNLayer(128, act=nn.ReLU())
    batch = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.no_grad():
        trained = layer.train()(batch)  # by the moments of this batch
        deployed = layer.eval()(batch)  # by the running ones, which one batch has moved by a tenth of the way
    return float((trained - deployed).abs().max())


# 4. The code: a pretrained reader meets changed images; new statistics come from unlabelled ones in one pass.


def code(reader: nn.Module, target: Digits) -> dict[str, tuple[float, float]]:
    found = {}
    for shift in SHIFTS:
        moved = target.shifted(shift)
        before = error(reader, moved[UNLABELLED:])
        adaptation = renorm.recalibrate_(reader, digits.batches(moved[:UNLABELLED]))
        found[shift] = before, error(reader, moved[UNLABELLED:])
        adaptation.restore_()  # bit for bit
    return found


# 5. Choosing: how much of the source to keep depends on how many images there are to learn from.


def choosing(reader: nn.Module, target: Digits) -> dict[int, tuple[float, float]]:
    moved = target.shifted("low contrast")
    found = {}
    for images in (4, 16, 64, UNLABELLED):
        both = []
        for prior in (0, "auto"):
            adaptation = renorm.recalibrate_(reader, digits.batches(moved[:images]), prior=prior)
            both.append(error(reader, moved[UNLABELLED:]))
            adaptation.restore_()
        found[images] = both[0], both[1]
    return found


# 6. When it hurts: new statistics also describe which classes were there. Two guards notice.


def hurts(reader: nn.Module, source: Digits, target: Digits) -> dict[str, float]:
    present = only(target, FEW)
    unlabelled, measured = digits.batches(present[: len(present) // 2]), present[len(present) // 2 :]
    known = renorm.profile(reader, digits.batches(source, labelled=True))  # the source's owner does this, once
    found = {"source": error(reader, measured)}
    for way, options in {
        "re-estimated": {"prior": 0},
        "with a check": {"check": unlabelled},
        "with a profile": {"source": known},
    }.items():
        adaptation = renorm.recalibrate_(reader, unlabelled, **options)
        found[way] = error(reader, measured)
        if adaptation.accepted:
            adaptation.restore_()
    return found


def only(labelled: Digits, which: tuple[int, ...]) -> Digits:
    """Those images that show one of these digits."""
    return labelled[torch.isin(labelled.labels, torch.tensor(which))]


def error(model: nn.Module, labelled: Digits) -> float:
    """Error in %."""
    return 100 - 100 * renorm.evaluate(model, digits.batches(labelled, labelled=True)).value


def main() -> None:
    torch.set_num_threads(1)  # the tensors are small, and sums in one order give the same digits everywhere
    told = tell()
    mean, var, gap = told.layer
    print("1. The layer: BNLayer(128) on a (32, 128) batch")
    print(f"   largest |mean| {mean:.1e}, largest |variance − 1| {var:.1e}; gap to the formula by hand {gap:.1e}")
    print(f"2. Transfer: 0–4 → 5–9 in low contrast, {LABELLED} labels; error in %, mean of {DRAWS} draws")
    for policy, value in told.transfer.items():
        print(f"   {policy:<24} {value:5.1f}")
    print("3. The formula: training and evaluation are two functions")
    print(f"   the same batch, the same layer: up to {told.formula:.1f} apart")
    print(f"4. The code: statistics from {UNLABELLED} unlabelled images; error in %, before and after")
    for shift, (before, after) in told.code.items():
        print(f"   {shift:<24} {before:5.1f} {after:5.1f}")
    print('5. Choosing: error in % by number of images, with prior=0 and with prior="auto"')
    for images, (forgotten, kept) in told.choosing.items():
        print(f"   {images:<24} {forgotten:5.1f} {kept:5.1f}")
    print(f"6. When it hurts: only the digits {', '.join(map(str, FEW))}; error in %")
    for way, value in told.hurts.items():
        print(f"   {way:<24} {value:5.1f}")


if __name__ == "__main__":
    main()
