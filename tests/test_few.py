"""A few labels: the blend of statistics that they like best, and the head solved on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import renorm
from renorm.calls import Caller
from renorm.errors import BatchError, UsageError
from renorm.feed import Feed
from renorm.few import SHARES, STRENGTHS, solve_
from renorm.finetune import finetune_
from renorm.heads import new_head_
from renorm.observe import observe
from renorm.split import split
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import data, net


def features(model: nn.Sequential, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model[:9](images)


def test_the_default_with_a_few_dozen_labels_takes_no_step_and_is_undone() -> None:
    model, train, val = net(10), data(24), data(60, seed=1)
    before = photograph(model)
    result = finetune_(model, train, val, classes=["a", "b", "c"])
    assert (result.policy.name, result.steps, result.history) == ("few-labels", 0, ())
    assert result.value is not None
    assert result.value > 0.8
    assert result.why["policy"] == "24 labels in all"
    assert any(note.startswith("the statistics hold") for note in result.notes)
    assert any(note.startswith("the head is a logistic regression") for note in result.notes)
    assert {n for n in result.moved if n[0] in "036"} == set()
    result.restore_()
    assert differences(before, photograph(model)) == []


@pytest.mark.parametrize(
    "options", [{"lr": 0.01}, {"regularisers": "l2_sp"}, {"gradual": True}, {"loss": lambda y, t: y.sum() * 0}]
)
def test_who_asks_for_steps_has_them(options: dict[str, object]) -> None:
    result = finetune_(net(10), data(24), classes=["a", "b", "c"], epochs=1, **options)  # type: ignore[arg-type]
    assert result.policy.name in ("frozen-statistics", "recalibrate-then-freeze")
    assert result.steps == 3


def test_the_head_is_the_regularised_regression_on_the_features_as_they_are_then() -> None:
    model, train = net(), data(45)
    new_head_(model, split(model), 3)
    solved = solve_(model, train, split(model), new=True)
    assert solved.share in SHARES
    assert solved.strength in STRENGTHS
    images, labels = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    values = features(model, images).double()
    weight = model[9].weight.detach().double().requires_grad_()
    bias = model[9].bias.detach().double().requires_grad_()
    # scikit-learn's objective: C times the summed loss and half the squared weights, on features of unit variance
    deviation = values.std(0, correction=0)
    loss = solved.strength * F.cross_entropy(values @ weight.T + bias, labels, reduction="sum")
    loss = loss + 0.5 * (weight * deviation).square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 0.05 * solved.strength


def test_a_kept_head_gets_the_blend_with_the_least_loss_of_its_own() -> None:
    model, train = net(), [(2 * x + 1, y) for x, y in data(30)]
    sites = {s.name: s for s in renorm.find_sites(model)}
    source = {name: site.statistics() for name, site in sites.items()}
    target = observe(model, train, under="batch")
    losses = {}
    twin = net()
    for share in SHARES:
        for site in renorm.find_sites(twin):
            blended = source[site.name].blend(target[site.name].values, source_weight=1 - share, geometric=True)  # type: ignore[union-attr]
            site.write_(blended)
        with torch.no_grad():
            losses[share] = float(np.mean([float(F.cross_entropy(twin(x), y)) for x, y in train[:3]]))
    before = model[9].weight.clone()
    solved = solve_(model, train[:3], split(model), new=False)
    again = {share: loss for share, loss in losses.items() if loss <= min(losses.values()) + 1e-6}
    assert solved.strength is None
    assert solved.share is not None
    assert solved.loss is not None
    assert torch.equal(model[9].weight, before)
    assert solved.loss <= losses[0.0] + 0.2
    assert again


def test_one_label_a_class_has_nothing_to_compare_with() -> None:
    model = net()
    solved = solve_(model, data(3), split(model), new=True)
    assert (solved.loss, solved.strength) == (None, 0.1)
    assert solved.share is not None
    assert 0 < solved.share < 1
    images, labels = data(3)[0]
    assert torch.equal(model(images).argmax(1), labels)


def test_two_classes_and_a_head_without_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    train = data(20, 2)
    solved = solve_(model, train, split(model), new=True)
    assert solved.share is None
    x, y = train[0]
    assert torch.equal(model(x).argmax(1), y)


def test_what_cannot_be_solved_is_refused() -> None:
    maps = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(UsageError, match="a head can be solved only where it is one linear layer"):
        solve_(maps, data(20), split(maps, "2"), new=True)
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 3))
    with pytest.raises((UsageError, BatchError), match=r"one vector per sample|loss"):
        solve_(Mean(tokens), data(20), split(Mean(tokens), "inner.1"), new=True)
    hot = [(x, F.one_hot(y, 3).float()) for x, y in data(20)]
    with pytest.raises(BatchError, match="a head is solved for class indices, one per sample, and batch 0 has other"):
        solve_(net(), hot, split(net()), new=True)


class Mean(nn.Module):
    """Answers for each of several parts of an image, averaged: no vector per sample goes into its head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def test_every_process_would_solve_the_same() -> None:
    train = data(24)
    whole = [y for _, y in Feed(train, 1, 0).epoch(0)]
    assert sum(map(len, whole)) == 24
    heads = []
    for _ in range(2):
        model = net()
        solve_(model, train, split(model), new=True, caller=Caller())
        heads.append(model[9].weight.detach().clone())
    assert torch.equal(*heads)
