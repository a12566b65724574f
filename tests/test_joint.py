"""A labelled source and an unlabelled target: told apart while training, the target's batch norms at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.errors import BatchError, OneShot, UnknownName, UsageError
from renorm.events import Epoch, Finished, Stepped
from renorm.finetune import finetune_, training
from renorm.joint import ENTROPY
from renorm.layers import PerDomain, Transferable
from renorm.recipe import Recipe
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import data, net, weights

Batch = tuple[Tensor, Tensor]


def shifted(samples: int = 48, seed: int = 5) -> list[Batch]:
    away = torch.tensor([0.0, 5.0, -5.0])[:, None, None]  # more than what tells the classes apart
    return [(x + away, y) for x, y in data(samples, seed=seed)]


@pytest.mark.parametrize(("joint", "kind"), [("per_domain", PerDomain), ("transferable", Transferable)])
def test_the_target_is_learnt_without_its_labels(joint: Any, kind: type) -> None:
    model = net()
    before = photograph(model)
    target, val = [x for x, _ in shifted()], shifted(60, seed=6)
    recipe = Recipe(epochs=5, lr=0.02, head="keep", target=target, joint=joint)
    norms = [model[1], model[4]]
    for event in training(model, data(60), val, recipe):
        if isinstance(event, Stepped | Epoch):
            assert isinstance(model[1], kind)
        elif isinstance(event, Finished):
            result = event.result
    assert [model[1], model[4]] == norms
    alone = net()
    other = finetune_(alone, data(60), val, epochs=5, lr=0.02, head="keep", policy="all")
    assert result.value is not None
    assert other.value is not None
    assert result.value > max(0.8, other.value + 0.1)
    assert result.why["policy"] == "source and target train together"
    images = torch.cat(target)
    with torch.no_grad():
        seen = model[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, seen.mean(1), rtol=1e-4, atol=1e-4)
    result.restore_()
    assert differences(before, photograph(model)) == []


def test_labels_of_the_target_are_scored_and_never_trained() -> None:
    trained = []
    for labels in (0, 1):
        model = net()
        target = [(x, (y + labels) % 3) for x, y in shifted()]
        result = finetune_(model, data(), epochs=2, lr=0.02, head="keep", target=target)
        assert result.score is not None
        assert result.score.count == 48
        trained.append(weights(model))
    assert trained[0] == trained[1]
    unlabelled = finetune_(net(), data(), epochs=1, lr=0.02, head="keep", target=[x for x, _ in shifted()])
    assert unlabelled.score is None


def test_the_entropy_of_the_target_falls_by_its_weight() -> None:
    answers = []
    for weight in (0.0, 3.0):
        model, target = net(), [x for x, _ in shifted()]
        finetune_(
            model, data(), epochs=2, lr=0.02, head="keep", target=target, joint="transferable", target_weight=weight
        )
        with torch.no_grad():
            logs = model(torch.cat(target)).log_softmax(1)
        answers.append(float(-(logs.exp() * logs).sum(1).mean()))
    assert answers[1] < 0.95 * answers[0]
    assert Recipe().target_weight == ENTROPY


def test_a_run_that_was_stopped_goes_on_to_the_same(tmp_path: Path) -> None:
    def recipe(run: Path) -> Recipe:
        target = [x for x, _ in shifted()]
        return Recipe(epochs=2, lr=0.02, head="keep", target=target, joint="per_domain", run=run, save_every=1)

    whole = net()
    for _ in training(whole, data(), None, recipe(tmp_path / "whole")):
        pass
    model = net()
    for event in training(model, data(), None, recipe(tmp_path / "cut")):
        if isinstance(event, Stepped) and event.step == 4:
            break
    assert weights(model) == weights(net())
    for event in training(model, data(), None, recipe(tmp_path / "cut")):
        if isinstance(event, Stepped):
            assert event.step >= 4
    assert weights(model) == weights(whole)


def test_what_does_not_go_together_is_refused() -> None:
    target = [x for x, _ in shifted()]

    def asked(**options: Any) -> None:
        finetune_(net(), data(), **{"lr": 0.02, "head": "keep", "target": target, **options})

    before = weights(net())
    with pytest.raises(UsageError, match="target= was given together with regularisers="):
        asked(regularisers="l2_sp")
    with pytest.raises(UsageError, match="target= was given together with gradual="):
        asked(gradual=True)
    with pytest.raises(UsageError, match="target= was given together with forward="):
        asked(forward=lambda model, batch: model(batch[0]))
    with pytest.raises(UsageError, match="target= was given together with a policy under which no batch norm"):
        asked(policy="frozen-statistics")
    with pytest.raises(UnknownName, match="per_doman"):
        asked(joint="per_doman")
    with pytest.raises(UsageError, match="target_weight is a number of at least 0; got -1"):
        asked(target_weight=-1)
    with pytest.raises(OneShot, match="target= reads its batches several times"):
        asked(target=iter(target))
    with pytest.raises(BatchError, match="target= holds no batch"):
        asked(target=DataLoaderOf([]), val=data())
    with pytest.raises(BatchError, match=r"their inputs are \(8, 3, 8, 8\) and \(4, 3, 6, 6\)"):
        asked(target=[torch.zeros(4, 3, 6, 6)])
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    labelled = [(x, y[:, None, None].expand(-1, 6, 6)) for x, y in data()]
    with pytest.raises(UsageError, match="joint training needs a model whose logits are one row per sample"):
        finetune_(maps, labelled, target=target, policy="all", head="keep", lr=0.02)
    assert weights(net()) == before


class DataLoaderOf:
    """An iterable of batches that is no list."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)
