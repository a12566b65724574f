"""Averaged weights: which mean they are, that their statistics are their own, and that a run goes on with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm.errors import UnknownName, UsageError
from renorm.events import Epoch, Finished, Stepped
from renorm.feed import Feed
from renorm.finetune import finetune_, training
from renorm.recipe import Recipe
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import data, interrupted, net, weights

RUN: dict[str, Any] = {"epochs": 4, "lr": 0.02, "head": "keep", "policy": "all"}


def trajectory(average: str | None, **options: Any) -> tuple[nn.Module, list[dict[str, Tensor]], list[float]]:
    """The model at the end, its trained weights after each step, and the rates of the steps."""
    model = net()
    seen, rates = [], []
    for event in training(model, data(), None, Recipe(**RUN, average=average, **options)):
        if isinstance(event, Stepped):
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            rates.append(event.lr)
    return model, seen, rates


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_the_weights_are_the_mean_over_the_steps_that_numpy_gives(average: str) -> None:
    model, seen, _ = trajectory(average, ema_decay=0.7)
    assert len(seen) == 20
    for name, parameter in model.named_parameters():
        steps = [each[name].double().numpy() for each in seen]
        if average == "swa":
            wanted = np.mean(steps[15:], axis=0)
        else:
            wanted = steps[0]
            for taken, step in enumerate(steps[1:], start=1):
                decay = min(0.7, (1 + taken) / (10 + taken))
                wanted = decay * wanted + (1 - decay) * step
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_statistics_are_those_of_a_fresh_exact_pass_and_no_copy(average: str) -> None:
    model, _, _ = trajectory(average)
    copied, _, _ = trajectory(None)
    again = copy.deepcopy(model)
    for norm in (again[1], again[4]):
        norm.reset_running_stats()
    renorm.recalibrate_(again, Feed(data(), 4, 0).epoch(4), prior=0)  # in the batches that the run reads last
    for norm, fresh, other in ((model[1], again[1], copied[1]), (model[4], again[4], copied[4])):
        torch.testing.assert_close(norm.running_mean, fresh.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, fresh.running_var, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(norm.running_var, other.running_var, rtol=1e-3), "those of the last weights differ"


def test_the_rate_of_swa_stays_over_the_last_quarter_and_training_is_else_the_same() -> None:
    _, plain, falling = trajectory(None)
    _, swa, rates = trajectory("swa")
    _, ema, same = trajectory("ema")
    assert rates[:15] == falling[:15]
    assert set(rates[15:]) == {rates[15]}
    assert falling[-1] < rates[-1] < 0.02
    assert same == falling
    for one, other in (*zip(plain[:15], swa[:15], strict=True), *zip(plain, ema, strict=True)):
        assert all(torch.equal(one[name], other[name]) for name in one), "what is averaged does not change what trains"


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_validation_scores_the_average_under_its_own_statistics_and_changes_nothing(average: str) -> None:
    val = data(30, seed=1)
    model, stepped, scores = net(), [], []
    for event in training(model, data(), val, Recipe(**RUN, average=average, metric="nll")):
        if isinstance(event, Stepped):
            stepped.append({name: p.detach().clone() for name, p in model.named_parameters()})
        elif isinstance(event, Epoch):
            assert event.score is not None
            scores.append(event.score.value)
            trained = stepped[-1]
            assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
        else:
            result = getattr(event, "result", None)
    assert isinstance(event, Finished)
    assert result is not None
    assert result.value == pytest.approx(scores[-1], rel=1e-5), "the last epoch is scored as the result is"
    assert any("mean of those after" in note for note in result.notes)
    twin = net()
    finetune_(twin, data(), **RUN, average=average)
    assert weights(twin) == weights(model), "looking changes nothing"


@pytest.mark.parametrize("after", [3, 17, 20])
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_a_run_that_was_stopped_goes_on_with_its_average(average: str, after: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {**RUN, "average": average}
    whole, parts = net(), net()
    finetune_(whole, data(), **options)
    interrupted(parts, data(), tmp_path, after=after, **options)
    assert weights(parts) == weights(net())
    finetune_(parts, data(), **options, run=tmp_path, save_every=1)
    assert weights(parts) == weights(whole)


@pytest.mark.parametrize("policy", ["recalibrate-then-freeze", "head-only"])
def test_statistics_that_a_policy_holds_stay_under_averaged_weights(policy: str) -> None:
    plain, averaged = net(), net()
    finetune_(plain, data(), **{**RUN, "policy": policy})
    finetune_(averaged, data(), data(30, seed=1), **{**RUN, "policy": policy}, average="ema")
    assert torch.equal(plain[1].running_mean, averaged[1].running_mean)
    assert not torch.equal(plain[9].weight, averaged[9].weight)


@pytest.mark.parametrize("regularisers", ["shrink", "stochnorm", ["l2_sp", "delta"]])
def test_layers_of_a_regulariser_give_the_average_to_the_batch_norms_they_stood_for(regularisers: Any) -> None:
    model, seen = net(), []
    for event in training(
        model, data(), data(12, seed=1), Recipe(**RUN, average="swa", regularisers=_built(regularisers))
    ):
        if isinstance(event, Stepped):
            seen.append(model[1].weight.detach().clone())
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model[1].weight, torch.stack(seen[15:]).mean(0), rtol=1e-5, atol=1e-6)


def _built(names: Any) -> Any:
    from renorm.regularisers.base import build

    return build(names)


def test_a_failure_while_the_average_is_scored_leaves_the_model_bit_identical() -> None:
    model = net()
    before = photograph(model)
    with pytest.raises(ZeroDivisionError, match="by zero"):
        finetune_(model, data(), data(12), **RUN, average="ema", metric=lambda outputs, labels: 1 / 0)
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": iter(data()), "epochs": 1}, "batches can be read only once; give a list"),
        ({"policy": "few-labels"}, "this policy takes none; leave one of the two"),
        ({"ema_decay": 1.0}, r"ema_decay is what is kept at each step, between 0 and 1; got 1\.0"),
        ({"target": [torch.randn(8, 3, 8, 8)]}, "together with average="),
    ],
)
def test_averages_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    train = options.pop("train", data())
    with pytest.raises(UsageError, match=words):
        finetune_(net(), train, **{**RUN, "average": "ema", **options})


def test_half_precision_weights_are_refused_and_an_unknown_average_is_named() -> None:
    half = [(x.bfloat16(), y) for x, y in data()]
    with pytest.raises(UsageError, match=r"the weights are torch\.bfloat16, in which small changes"):
        finetune_(net().bfloat16(), half, **RUN, average="ema")
    with pytest.raises(UnknownName, match="there is no average 'swag'; did you mean 'swa'"):
        finetune_(net(), data(), average="swag")  # type: ignore[arg-type]
