"""recalibrate_: what is kept and what is given back, by labels and without them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm.errors import BatchError, UnknownName, UsageError
from renorm.moments import Moments
from renorm.recalibrate import recalibrate_

CENTRES = torch.tensor([[2.0, 0, 0, -1], [0, 2, 0, 1], [0, 0, 2, 0]])


def draw(count: int, *, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    return CENTRES[labels] + 0.6 * torch.randn(count, 4, generator=rng), labels


def trained() -> nn.Sequential:
    """A classifier of `draw`'s rows: a batch norm that holds their statistics, then the nearest centre."""
    x, _ = draw(3000, seed=1)
    norm, last = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
    norm.running_mean, norm.running_var = x.mean(0), x.var(0)
    with torch.no_grad():
        weight = CENTRES / 0.36
        last.weight.copy_(weight * norm.running_var.sqrt())
        last.bias.copy_(weight @ norm.running_mean - (CENTRES * weight).sum(1) / 2)
    return nn.Sequential(norm, last).eval()


def elsewhere(x: Tensor) -> Tensor:
    """The same rows from another sensor."""
    return 0.4 * x + torch.tensor([3.0, -2.0, 1.0, 0.0])


def statistics(model: nn.Sequential) -> list[Tensor]:
    return [t.clone() for t in model[0].buffers()]


def same(before: list[Tensor], model: nn.Sequential) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model[0].buffers(), strict=True))


def test_a_shift_is_mended_without_labels_and_kept_by_an_unlabelled_check() -> None:
    x, _ = draw(600, seed=2)
    target = list(elsewhere(x).split(100))
    model = trained()
    held_out = draw(2000, seed=3)
    there = [(elsewhere(held_out[0]), held_out[1])]
    before = renorm.evaluate(model, there).value
    found = recalibrate_(model, target, check=target)
    after = renorm.evaluate(model, there).value
    assert found.accepted
    assert found.trust is not None
    assert "mean log odds" in found.why
    assert after > before + 0.3
    assert after > renorm.evaluate(trained(), [held_out]).value - 0.02
    found.restore_()
    assert renorm.evaluate(model, there).value == before


def test_an_absent_class_is_no_shift_and_the_unlabelled_check_says_so() -> None:
    target = list(draw(600, classes=2, seed=4)[0].split(100))
    model = trained()
    before = statistics(model)
    found = recalibrate_(model, target, check=target)
    assert not found.accepted
    assert same(before, model)
    assert "the source is believed" in found.why


def test_labels_decide_by_accuracy() -> None:
    x, labels = draw(600, classes=1, seed=4)
    target = list(x.split(100))
    model = trained()
    before = statistics(model)
    found = recalibrate_(model, target, prior=0, check=[(x, labels)])
    assert not found.accepted
    assert found.trust is None
    assert "on 600 labelled check samples accuracy went from" in found.why
    assert same(before, model)


@pytest.mark.parametrize(("shift", "accepted"), [(0.0, True), (0.3, False)])
def test_where_accuracy_is_equal_the_likelihood_decides(shift: float, accepted: bool) -> None:
    """The classes' own centres are right before and after: what makes them less likely is not kept."""
    x, _ = draw(2000, seed=5)
    model = trained()
    if accepted:
        model[0].running_mean += 0.3
    few = CENTRES, torch.arange(3)
    found = recalibrate_(model, [x - shift], prior=0, check=[few])
    assert found.accepted is accepted
    assert "and the mean negative log likelihood from" in found.why


def test_the_verdict_is_on_the_target_alone_and_the_blend_is_what_is_written() -> None:
    target = [elsewhere(draw(40, seed=6)[0])]
    model = trained()
    held = Moments(float("inf"), model[0].running_mean.double(), model[0].running_var.double())
    found = recalibrate_(model, target, prior=40, check=target)
    assert found.accepted
    assert found.weights["0"] == 0.5
    want = held.blend(Moments.of(target[0]), source_weight=0.5, cross_term=False)
    torch.testing.assert_close(model[0].running_mean.double(), want.mean, rtol=1e-5, atol=1e-6)
    sure = recalibrate_(trained(), target, prior=0, check=target)
    assert found.trust == sure.trust


def test_the_batches_are_counted_for_whoever_averages_on() -> None:
    model = trained()
    recalibrate_(model, list(draw(300)[0].split(100)))
    assert int(model[0].num_batches_tracked) == 3


def test_excluded_sites_keep_their_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    found = recalibrate_(model, [elsewhere(draw(50)[0])], prior=0, exclude="1")
    assert set(found.weights) == {"0"}
    assert bool((model[1].running_mean == 0).all())


def test_leaving_nothing_to_touch_is_refused() -> None:
    with pytest.raises(UsageError, match=r"asked to touch '\*' without '0', and no batch norm is left"):
        recalibrate_(trained(), [draw(9)[0]], exclude="0")


def test_a_single_image_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(BatchError, match=r"given one image in all.*at least two"):
        recalibrate_(model, [torch.randn(1, 3, 4, 4)])


def test_activations_that_overflow_are_refused_and_nothing_stays() -> None:
    model = trained()
    before = statistics(model)
    with pytest.raises(BatchError, match="the statistics measured at '0' are not finite: activations overflow"):
        recalibrate_(model, [draw(50)[0] * 1e25], prior=0)
    assert same(before, model)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"method": "poolde"}, UnknownName, "no method 'poolde'; did you mean 'pooled'"),
        ({"options": {"tolerence": 1}}, UnknownName, "did you mean 'tolerance'"),
        (
            {"method": "equal_mix", "options": {"passes": "many"}},
            UsageError,
            "the method 'equal_mix' was given options it cannot take",
        ),
    ],
)
def test_unknown_methods_and_options_are_refused(asked: dict[str, Any], error: type[Exception], message: str) -> None:
    model = trained()
    before = statistics(model)
    with pytest.raises(error, match=message):
        recalibrate_(model, [draw(50)[0]], **asked)
    assert same(before, model)


def test_a_check_that_fails_gives_the_statistics_back() -> None:
    class Failing:
        """Labelled batches that can be read once."""

        reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            if self.reads > 1:
                raise OSError("the disk is gone")
            return iter([draw(50)])

    model = trained()
    before = statistics(model)
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate_(model, [elsewhere(draw(50)[0])], check=Failing())
    assert same(before, model)
    recalibrate_(model, [draw(50)[0]])  # nothing is left open
