"""trust: the model that is surer where both disagree is believed; scale does not matter; nonsense is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from renorm.errors import UsageError
from renorm.trust import LIMIT, MOVED, UNSEEN, Trust, trust


def answers(labels: Tensor, *, margin: float, classes: int = 4, noise: float = 0.3, seed: int = 0) -> Tensor:
    """Logits that give `labels` with about `margin` between the first and any other class."""
    draw = torch.Generator().manual_seed(seed)
    return noise * torch.randn(len(labels), classes, generator=draw) + margin * torch.nn.functional.one_hot(
        labels, classes
    )


TRUTH = torch.arange(200) % 4
COLLAPSED = torch.zeros(200, dtype=torch.long)


def test_a_collapsed_unsure_source_loses_to_a_sure_adapted_model() -> None:
    verdict = trust(answers(COLLAPSED, margin=2.0), answers(TRUTH, margin=5.0, seed=1))
    assert verdict.better
    assert verdict.evidence > 0.2
    assert verdict.disagreement == pytest.approx(0.75, abs=0.02)


def test_a_sure_source_of_one_class_is_kept_when_adapting_only_flattens() -> None:
    verdict = trust(answers(COLLAPSED, margin=5.0), answers(TRUTH, margin=2.0, seed=1), moved=0.05)
    assert not verdict.better
    assert verdict.reliability > 0.9
    assert "source is believed" in verdict.why


def test_evidence_is_the_relative_difference_of_mean_log_odds_where_they_differ() -> None:
    before = torch.tensor([[3.0, 0.0], [0.0, 9.0]])
    after = torch.tensor([[0.0, 1.0], [0.0, 4.0]])
    verdict = trust(before, after, moved=1.0)
    assert verdict == Trust(False, pytest.approx(1 / (1 + math.exp(-15 * (0.5 + LIMIT)))), verdict.why, -0.5, 0.5)


@given(st.floats(0.1, 50), st.floats(-5, 5), st.integers(0, 9))
def test_scale_and_offset_of_the_logits_change_nothing(scale: float, offset: float, seed: int) -> None:
    before, after = answers(COLLAPSED, margin=3.0, seed=seed), answers(TRUTH, margin=3.0, seed=seed + 1)
    plain, other = trust(before, after), trust(before * scale + offset, after * scale + offset)
    assert other.evidence == pytest.approx(plain.evidence, abs=1e-4)


@given(st.integers(0, 99))
def test_exchanging_the_models_turns_the_evidence_round(seed: int) -> None:
    before, after = answers(COLLAPSED, margin=3.0, seed=seed), answers(TRUTH, margin=4.0, seed=seed + 1)
    assert trust(after, before).evidence == pytest.approx(-trust(before, after).evidence)


def test_without_movement_the_source_is_kept_unless_a_profile_vouches() -> None:
    before, after = answers(COLLAPSED, margin=2.0), answers(TRUTH, margin=5.0, seed=1)
    kept = trust(before, after, moved=0.9 * MOVED)
    assert not kept.better
    assert "moved by" in kept.why
    assert trust(before, after, moved=1.1 * MOVED).better
    assert trust(before, after, source=object(), moved=0.9 * MOVED).better


def test_where_asked_it_must_be_surer_by_two_standard_errors() -> None:
    few = slice(0, 12)  # nine of them part
    for noise, margin, better in ((0.3, 3.0, True), (3.0, 2.2, False)):
        before, after = answers(COLLAPSED, margin=2.0), answers(TRUTH, margin=margin, noise=noise, seed=1)
        assert trust(before[few], after[few], moved=1.0).better
        verdict = trust(before[few], after[few], moved=1.0, strict=True)
        assert verdict.better is better, verdict
        assert better or "standard errors apart where 2 are asked for" in verdict.why
    assert not trust(answers(COLLAPSED, margin=2.0)[:2], answers(TRUTH, margin=8.0)[:2], strict=True).better


def test_less_is_claimed_where_the_movement_is_unknown() -> None:
    before, after = answers(COLLAPSED, margin=2.0), answers(TRUTH, margin=8.0, seed=1)
    assert trust(before, after).reliability == UNSEEN < trust(before, after, moved=1.0).reliability


def test_models_that_agree_lose_nothing() -> None:
    logits = answers(TRUTH, margin=3.0)
    assert trust(logits, 2 * logits)[:2] == (True, 0.5)


def test_indifferent_logits_give_no_evidence() -> None:
    before = torch.zeros(3, 2)
    assert trust(before, before + torch.tensor([0.0, 1e-300], dtype=torch.float64)).evidence >= 0


def test_one_logit_is_the_log_odds_of_a_second_class() -> None:
    before, after = torch.tensor([[3.0], [-2.0]]), torch.tensor([[-1.0], [-2.0]])
    assert (
        trust(before, after).evidence
        == trust(torch.tensor([[0.0, 3.0], [0.0, -2.0]]), torch.tensor([[0.0, -1.0], [0.0, -2.0]])).evidence
        == pytest.approx(-0.5)
    )


def test_every_pixel_of_a_segmentation_counts() -> None:
    before, after = answers(COLLAPSED, margin=2.0), answers(TRUTH, margin=5.0, seed=1)
    maps = [x.reshape(2, 10, 10, 4).movedim(-1, 1) for x in (before, after)]
    assert trust(*maps) == trust(before, after)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3,), (3,)), ((0, 2), (0, 2))])
def test_logits_that_cannot_be_compared_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="on the same samples; got shapes"):
        trust(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_logits_that_are_not_finite_are_refused() -> None:
    bad = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(UsageError, match="adapted logits that are not finite"):
        trust(torch.zeros(1, 2), bad)
