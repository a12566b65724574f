"""evaluate: the numbers are scikit-learn's and scipy's, the interval holds what it says, and bad labels are named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn
from torch.utils.data import DataLoader

from renorm import evaluate
from renorm.errors import BatchError, UnknownName, UsageError


class Itself(nn.Module):
    """A model whose logits are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (203,), generator=generator)
    logits = torch.randn(203, 4, generator=generator) + 1.5 * nn.functional.one_hot(labels, 4)
    return logits, labels


def batches(logits: torch.Tensor, labels: torch.Tensor, size: int = 50) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(logits.split(size), labels.split(size), strict=True))


def test_the_named_metrics_are_scikit_learns_over_all_samples_at_once(
    answers: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, labels = answers
    p, y = logits.softmax(1).numpy(), labels.numpy()
    expected = {
        "accuracy": metrics.accuracy_score(y, p.argmax(1)),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, p.argmax(1)),
        "top5": 1.0,
        "f1": metrics.f1_score(y, p.argmax(1), average="macro"),
        "auroc": metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "nll": metrics.log_loss(y, p),
    }
    for name, value in expected.items():
        assert evaluate(Itself(), batches(logits, labels), name).value == pytest.approx(value, abs=1e-6), name


def test_ece_is_the_gap_between_confidence_and_accuracy_per_bin(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    confidence, predicted = (v.numpy() for v in logits.softmax(1).max(1))
    right = predicted == labels.numpy()
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    expected = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    score = evaluate(Itself(), batches(logits, labels))
    assert score.ece == pytest.approx(expected, abs=1e-5)
    assert score.nll == pytest.approx(metrics.log_loss(labels.numpy(), logits.softmax(1).numpy()), abs=1e-6)
    assert score.count == 203


def test_the_accuracy_interval_covers_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        labels = (
            torch.rand(60, generator=generator) < 0.9
        ).long()  # the model says 1 always: right with probability 0.9
        low, high = evaluate(Itself(), [(torch.tensor([[0.0, 1.0]]).expand(60, 2), labels)]).interval
        covered += low <= 0.9 <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_a_function_of_all_outputs_gets_a_bootstrap_interval(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers

    def accuracy(outputs: torch.Tensor, truth: torch.Tensor) -> float:
        assert outputs.shape == (203, 4)
        return float((outputs.argmax(1) == truth).float().mean())

    ours, named = evaluate(Itself(), batches(logits, labels), accuracy), evaluate(Itself(), batches(logits, labels))
    assert ours.value == pytest.approx(named.value)
    assert ours.metric == "accuracy"
    assert ours.interval == pytest.approx(named.interval, abs=0.02)


def test_outputs_that_are_no_tensors_reach_the_function_as_they_are() -> None:
    class Boxes(nn.Module):
        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": row} for row in x]

    def metric(outputs: list[list[dict[str, torch.Tensor]]], labels: list[torch.Tensor]) -> float:
        return float(sum(len(batch) for batch in outputs))

    score = evaluate(Boxes(), [(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(2, 2), torch.zeros(2))], metric)
    assert score.value == 5
    assert math.isnan(score.interval[0])
    assert math.isnan(score.nll)


def test_segmentation_counts_pixels_and_its_interval_counts_images() -> None:
    logits = torch.zeros(4, 2, 3, 3)
    logits[:, 1] = 1
    labels = torch.ones(4, 3, 3, dtype=torch.long)
    labels[0] = 0
    score = evaluate(Itself(), [(logits, labels)])
    assert score.value == pytest.approx(0.75)
    assert score.count == 4
    assert score.interval[0] < 0.5  # four images say little


def test_regression() -> None:
    x, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0])
    assert evaluate(Itself(), [(x, y)], "mse").value == pytest.approx(1 / 3)
    assert evaluate(Itself(), [(x, y)], "mae").value == pytest.approx(1 / 3)
    assert math.isnan(evaluate(Itself(), [(x, y)], "mae").nll)


def test_what_cannot_be_scored_is_refused_with_the_way_out(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = answers
    with pytest.raises(BatchError, match=r"evaluate needs labels, but batch 1 has none; pass \(inputs, labels\)"):
        evaluate(Itself(), [(logits, labels), logits])
    with pytest.raises(BatchError, match=r"labels run from 1 to 9, but the model has 4 classes \(0 to 3\)"):
        evaluate(Itself(), [(logits[:2], torch.tensor([1, 9]))])
    with pytest.raises(UnknownName, match="there is no metric 'acuracy'; did you mean 'accuracy'"):
        evaluate(Itself(), [(logits, labels)], "acuracy")
    with pytest.raises(
        UsageError, match=r"the metric 'f1' needs logits .* found float32 of shape \(203, 4\) and float32"
    ):
        evaluate(Itself(), [(logits, labels.float())], "f1")
    with pytest.raises(BatchError, match="evaluate was given batches, but there was none in them"):
        evaluate(Itself(), [])


def test_evaluating_leaves_the_mode_and_the_generators_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Itself()).train()
    state = torch.get_rng_state()
    score = evaluate(model, [(torch.eye(4), torch.arange(4))])
    assert score.value == 1.0  # dropout was off
    assert model[0].training
    assert torch.equal(torch.get_rng_state(), state)


# ── groups ──


@pytest.fixture
def wards() -> list[str]:
    return ["north", "south", "east", "west"] * 50 + ["attic"] * 3


@pytest.mark.parametrize("metric", ["accuracy", "nll", "balanced_accuracy"])
def test_a_group_scores_as_if_it_were_alone_and_the_worst_comes_first(
    answers: tuple[torch.Tensor, torch.Tensor], wards: list[str], metric: str
) -> None:
    logits, labels = answers
    score = evaluate(Itself(), batches(logits, labels), metric, groups=wards)
    assert set(score.groups) == set(wards)
    names = np.array(wards)
    for name, found in score.groups.items():
        rows = torch.from_numpy(np.flatnonzero(names == name))
        alone = evaluate(Itself(), [(logits[rows], labels[rows])], metric)
        for field in ("value", "count", "nll", "ece", "metric"):
            assert getattr(found, field) == pytest.approx(getattr(alone, field)), (name, field)
        assert found.interval == pytest.approx(alone.interval, nan_ok=True)
        assert found.groups == {}
    values = [found.value for found in score.groups.values()]
    assert values == sorted(values, reverse=metric == "nll")
    whole = evaluate(Itself(), batches(logits, labels), metric)
    assert (score.value, score.interval, score.count) == (whole.value, whole.interval, 203)
    assert whole.groups == {}


def test_groups_ride_in_the_batch_or_are_told_by_a_function(
    answers: tuple[torch.Tensor, torch.Tensor], wards: list[str]
) -> None:
    logits, labels = answers
    wanted = evaluate(Itself(), batches(logits, labels), groups=wards).groups
    numbers = torch.tensor([sorted(set(wards)).index(ward) for ward in wards])
    dicts = [
        {"x": x, "labels": y, "ward": w}
        for x, y, w in zip(logits.split(50), labels.split(50), _split(wards), strict=True)
    ]
    assert evaluate(Itself(), dicts, groups="ward").groups == wanted
    tuples = list(zip(logits.split(50), labels.split(50), numbers.split(50), strict=True))
    by_number = evaluate(Itself(), tuples, groups=lambda batch: batch[2]).groups
    assert {sorted(set(wards))[int(name)]: score for name, score in by_number.items()} == wanted
    assert evaluate(Itself(), batches(logits, labels), groups=numbers).groups == by_number


def _split(names: list[str], size: int = 50) -> list[list[str]]:
    return [names[k : k + size] for k in range(0, len(names), size)]


def test_a_loader_that_shuffles_carries_its_groups_through_its_workers(
    answers: tuple[torch.Tensor, torch.Tensor], wards: list[str]
) -> None:
    logits, labels = answers
    rows = [{"x": x, "labels": y, "ward": w} for x, y, w in zip(logits, labels, wards, strict=True)]
    loader = DataLoader(rows, batch_size=32, shuffle=True, num_workers=2)  # type: ignore[arg-type]
    got = evaluate(Itself(), loader, groups="ward")
    wanted = evaluate(Itself(), batches(logits, labels), groups=wards)
    assert {name: score.value for name, score in got.groups.items()} == {n: s.value for n, s in wanted.groups.items()}


def test_groups_that_do_not_fit_are_refused(answers: tuple[torch.Tensor, torch.Tensor], wards: list[str]) -> None:
    logits, labels = answers
    with pytest.raises(UsageError, match=r"got 3 names for 203 samples with 203 rows of outputs and 203 labels"):
        evaluate(Itself(), batches(logits, labels), groups=["a", "b", "c"])
    with pytest.raises(
        UsageError, match=r"groups='ward' names an entry of each batch, but a tuple with no named entries"
    ):
        evaluate(Itself(), batches(logits, labels), groups="ward")
    with pytest.raises(UsageError, match=r"but a dict with entries x, labels came"):
        evaluate(Itself(), [{"x": logits, "labels": labels}], groups="ward")

    class Lists(Itself):
        def forward(self, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:  # type: ignore[override]
            return [{"a": row, "b": row} for row in x]

    with pytest.raises(UsageError, match=r"got 203 names for 203 samples with outputs that are no one tensor"):
        evaluate(Lists(), batches(logits, labels), lambda outputs, labels: 0.0, groups=wards)


def test_a_group_whose_value_is_unknown_is_looked_at_first() -> None:
    logits, labels = torch.tensor([[2.0, 0], [0, 2], [2, 0]]), torch.tensor([0, 1, 1])
    score = evaluate(
        Itself(), [(logits, labels)], lambda out, y: math.nan if len(y) == 1 else float(len(y)), groups=list("aab")
    )
    assert list(score.groups) == ["b", "a"]


def test_auroc_leaves_out_classes_that_a_group_does_not_have() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 3), torch.tensor([0] * 20 + [1, 2] * 10)
    groups = evaluate(Itself(), [(logits, labels)], "auroc", groups=["one"] * 20 + ["two"] * 20).groups
    assert list(groups) == ["one", "two"]
    assert math.isnan(groups["one"].value)
    part = logits[20:].softmax(1).numpy()
    wanted = np.mean([metrics.roc_auc_score(labels[20:].numpy() == k, part[:, k]) for k in (1, 2)])
    assert groups["two"].value == pytest.approx(wanted, abs=1e-6)
    assert groups["two"].interval[0] < wanted < groups["two"].interval[1]
