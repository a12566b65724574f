"""The method "equal_mix": its formula, the class mix it finds, and that another mix is not taken for another domain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import OneShot, UsageError
from renorm.methods.equal_mix import EqualMix, class_mix, equal_mix
from renorm.methods.pooled import Pooled
from renorm.moments import Moments
from renorm.profile import Profile, profile
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites
from tests.reference import equal_mix as twin

CENTRES = torch.tensor([[2.0, 0, 0, -1], [0, 2, 0, 1], [0, 0, 2, 0]])
EVERY = (1 / 3, 1 / 3, 1 / 3)


def draw(count: int, mix: tuple[float, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around their class's centre, (N, 4), and their classes in the shares `mix`."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([round(count * share) for share in mix]))
    labels = labels[torch.randperm(len(labels), generator=rng)]
    return CENTRES[labels] + 0.6 * torch.randn(len(labels), 4, generator=rng), labels


def trained() -> nn.Sequential:
    """A batch norm that holds the source's statistics, and the best linear classifier of what it gives."""
    x, _ = draw(3000, EVERY, seed=1)
    norm, last = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
    norm.running_mean, norm.running_var = x.mean(0), x.var(0)
    with torch.no_grad():  # linear discriminant: x·c/s² − c·c/2s², written for the normalised x
        weight = CENTRES / 0.36
        last.weight.copy_(weight * norm.running_var.sqrt())
        last.bias.copy_(weight @ norm.running_mean - (CENTRES * weight).sum(1) / 2)
    return nn.Sequential(norm, last).eval()


def known() -> Profile:
    x, labels = draw(600, EVERY, seed=2)
    return profile(trained(), list(zip(x.split(100), labels.split(100), strict=True)))


positive = st.lists(st.floats(0.01, 20), min_size=3, max_size=3)
anywhere = st.lists(st.floats(-5, 5), min_size=3, max_size=3)


@given(st.lists(st.tuples(anywhere, positive), min_size=3, max_size=3))
def test_equal_mix_is_its_formula(given: list[tuple[list[float], list[float]]]) -> None:
    pairs = [(np.array(mean), np.array(var)) for mean, var in given]
    moments = [
        Moments(9, torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64))
        for mean, var in pairs
    ]
    got = equal_mix(*moments, eps=1e-3, widest=10.0)
    mean, var = twin.equal_mix(*pairs, eps=1e-3, widest=10.0)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.var, var, rtol=1e-9)


@given(st.floats(0.2, 5), st.floats(-3, 3))
def test_a_domain_that_scales_and_shifts_is_found_exactly_whatever_the_mix(scale: float, offset: float) -> None:
    x, labels = draw(300, EVERY)
    some = labels < 2
    source, there = Moments.of(x), Moments.of(x[some])
    got = equal_mix(Moments.of(scale * x[some] + offset), there, source, eps=0.0, widest=100.0)
    want = Moments.of(scale * x + offset)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.var, want.var, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 50), st.integers(1, 30))
def test_the_class_mix_is_that_of_the_slow_twin(seed: int, rounds: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(20, 3, generator=rng, dtype=torch.float64).pow(3).add(1e-3)
    probabilities /= probabilities.sum(1, keepdim=True)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    got = class_mix(probabilities, prior, rounds=rounds, enough=0.0)
    np.testing.assert_allclose(got, twin.class_mix(probabilities.numpy(), prior.numpy(), rounds), rtol=1e-6)


@given(st.integers(0, 50), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_shares_are_believed_by_a_power_as_in_the_slow_twin(seed: int, belief: list[float]) -> None:
    rng = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(20, 3, generator=rng, dtype=torch.float64).add(1e-2)
    probabilities /= probabilities.sum(1, keepdim=True)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    got = class_mix(probabilities, prior, rounds=5, enough=0.0, belief=torch.tensor(belief, dtype=torch.float64))
    want = twin.class_mix(probabilities.numpy(), prior.numpy(), 5, np.array(belief))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_class_that_the_source_never_showed_explains_nothing() -> None:
    """Where the model is a little unsure of everything, such a class would take all: its share per prior is the largest."""
    probabilities = torch.tensor([[0.9, 0.095, 0.005]], dtype=torch.float64).expand(50, -1)
    counts = torch.tensor([950.0, 50.0, 0.0], dtype=torch.float64)
    prior = counts / counts.sum()
    assert float(class_mix(probabilities, prior)[2]) > 0.9
    known = (counts / 50).clamp_max(1)
    assert float(class_mix(probabilities, prior, belief=known)[2]) < 0.01


def test_the_class_mix_is_that_of_the_samples_and_doubt_pulls_it_to_the_prior() -> None:
    x, labels = draw(2000, (0.9, 0.1, 0.0))
    with torch.no_grad():
        probabilities = trained()(x).softmax(1).double()
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    free, doubting = class_mix(probabilities, prior), class_mix(probabilities, prior, doubt=0.5)
    share = torch.bincount(labels, minlength=3) / len(labels)
    assert float((free - share).abs().sum()) < 0.02
    assert 0.05 < float(doubting[2]) < 1 / 3


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.1, 0.9, 0.0), EVERY])
def test_statistics_are_those_of_the_target_at_the_sources_mix(mix: tuple[float, ...]) -> None:
    scale, offset = 1.7, torch.tensor([0.8, -0.5, 0.0, 1.0])
    target = (scale * draw(900, mix, seed=5)[0] + offset).split(90)
    whole = Moments.of(scale * draw(9000, EVERY, seed=6)[0] + offset)
    model = trained()
    sites = find_sites(model)
    found = EqualMix().estimate(model, target, sites=sites, caller=Caller(), source=known())
    plain = Pooled(prior=0).estimate(model, target, sites=sites, caller=Caller())
    ours, theirs = (_apart(result.moments["0"], whole) for result in (found, plain))
    assert ours < (0.1 if mix == EVERY else 0.4)
    assert found.samples == 900
    if mix != EVERY:
        assert theirs > 2.5 * ours


def _apart(a: Moments, b: Moments) -> float:
    return float(((a.mean - b.mean).square() / b.var + (0.5 * torch.log(a.var / b.var)).square()).mean().sqrt())


def test_data_that_did_not_shift_keep_their_source() -> None:
    model = trained()
    held = model[0].running_mean.clone()
    target = draw(900, (0.8, 0.2, 0.0), seed=7)[0].split(90)
    found = recalibrate_(model, target, source=known())
    assert found.weights["0"] > 0.4
    assert float((model[0].running_mean - held).abs().max()) < 0.1


def test_a_profile_may_be_given_as_its_file(tmp_path: Any) -> None:
    known().save(tmp_path / "source.profile")
    target = draw(300, EVERY, seed=8)[0].split(100)
    one, other = trained(), trained()
    recalibrate_(one, target, source=tmp_path / "source.profile")
    recalibrate_(other, target, source=known())
    torch.testing.assert_close(one[0].running_mean, other[0].running_mean, rtol=1e-5, atol=1e-5)


def test_an_uneven_source_says_that_other_mixes_are_hardly_believed() -> None:
    x, labels = draw(600, (0.96, 0.03, 0.01), seed=3)
    uneven = profile(trained(), [(x, labels)])
    assert uneven.is_uneven
    assert uneven.belief.tolist() == pytest.approx([uneven.evenness, uneven.evenness * 0.36, uneven.evenness * 0.12])
    target = draw(300, (0.5, 0.4, 0.1))[0].split(100)
    assert "mixed so unevenly" in recalibrate_(trained(), target, source=uneven).notes[0]


def test_a_class_mix_that_still_changes_is_said() -> None:
    target = draw(300, (1.0, 0.0, 0.0))[0].split(100)
    found = recalibrate_(trained(), target, source=known(), options={"passes": 1})
    assert found.passes == 1
    assert any("the class mix still changed by" in note for note in found.notes)
    assert recalibrate_(trained(), target, source=known()).notes == ()


def test_a_class_mix_that_feeds_on_itself_is_not_believed() -> None:
    """Where samples say little of their class a mix grows pass by pass; the source's own makes the model as sure."""
    noise = 0.6 * torch.randn(600, 4, generator=torch.Generator().manual_seed(9))
    target = (0.5 * draw(600, (1.0, 0.0, 0.0), seed=3)[0] + noise).split(100)
    trusting, wary = trained(), trained()
    held = Moments(1, wary[0].running_mean.clone(), wary[0].running_var.clone())
    before = recalibrate_(trusting, target, source=known(), options={"surer": -1.0})
    found = recalibrate_(wary, target, source=known())
    assert "the class mix still changed by" in before.notes[0]
    assert "did not settle, and with it the model is hardly surer (-0.0" in found.notes[0]
    assert len(before.notes) == len(found.notes) == 1
    assert (before.passes, found.passes) == (9, 9)  # six in search of a mix, two without, and one to compare
    # at the source's mix the target's moments are its own, blended with what is held
    whole = held.blend(Moments.of(torch.cat(target)), source_weight=found.weights["0"], cross_term=False)
    assert _apart(Moments(1, wary[0].running_mean, wary[0].running_var), whole) < 0.01
    assert _apart(Moments(1, trusting[0].running_mean, trusting[0].running_var), whole) > 0.2


@pytest.mark.parametrize(("surer", "believed"), [(0.025, True), (0.2, False)])
def test_a_class_mix_that_grew_is_believed_where_the_model_is_surer_with_it(surer: float, believed: bool) -> None:
    target = (0.2 * draw(600, (1.0, 0.0, 0.0), seed=4)[0]).split(100)
    found = recalibrate_(trained(), target, source=known(), options={"surer": surer})
    assert any("hardly surer" in note for note in found.notes) != believed


def test_without_a_profile_it_is_refused() -> None:
    with pytest.raises(UsageError, match=r"compares the target with a profile of the source; make one with"):
        recalibrate_(trained(), [draw(30, EVERY)[0]], method="equal_mix")


def test_an_iterator_is_refused() -> None:
    with pytest.raises(OneShot, match="the method 'equal_mix' reads its batches several times"):
        recalibrate_(trained(), iter([draw(30, EVERY)[0]]), source=known())


def test_a_model_with_other_classes_is_refused() -> None:
    class Wider(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, 2)

    with pytest.raises(UsageError, match="the profile has 3 classes and the model gives logits of 6"):
        recalibrate_(Wider(*trained()).eval(), [draw(30, EVERY)[0]], source=known())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes is how often the batches are read, 1 or more; got 0"),
        ({"passes": 1.5}, r"passes is how often .* got 1\.5"),
        ({"settled": -0.1}, "settled, doubt and images are 0 or more; got -0.1"),
        ({"doubt": -1}, "settled, doubt and images are 0 or more"),
        ({"surer": 1.5}, "surer is a relative difference of log odds, -1 to 1; got 1.5"),
        ({"widest": 0.5}, "widest is a ratio of standard deviations, 1 or more; got 0.5"),
        ({"widest": math.nan}, "widest is a ratio"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EqualMix(**options)
