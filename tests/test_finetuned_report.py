"""What is shown of a fine-tuning run: curves over its steps, classes and what they were taken for, drift of statistics."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from renorm.evaluate import evaluate
from renorm.events import Epoch, FineTuned, Stepped
from renorm.finetune import finetune_, training
from renorm.recipe import Recipe
from renorm.report import classes, finetuned, terminal
from renorm.report.base import Bar, Lines, Matrix, Report, Table, Words
from renorm.report.pictures import figure, svg
from renorm.shift import Shift
from renorm.sites import find_sites
from tests.reference.confusion import confusion as counted
from tests.test_evaluate import Itself
from tests.test_finetune import data, net

NAMES = ("ant", "bee", "cat")
TABLE = torch.tensor([[6, 2, 0], [0, 0, 4], [1, 0, 9]])


@pytest.fixture(scope="module")
def run() -> tuple[FineTuned, list[tuple[int, float]]]:
    losses: list[tuple[int, float]] = []
    recipe = Recipe(epochs=3, lr=0.02, head="new", policy="all", classes=NAMES)
    for event in training(net(), data(60), data(30, seed=1), recipe):
        if isinstance(event, Stepped):
            losses.append((event.step, event.loss))
    result: Any = event
    return result.result, losses


def titled(result: FineTuned, **options: Any) -> dict[str, Any]:
    return {block.title: block for block in finetuned.blocks(result, **options)}


@pytest.mark.parametrize("shape", [(50, 4), (20, 4, 3, 2)])
def test_the_confusion_counts_every_pair_of_label_and_answer(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=generator)
    labels = torch.randint(3, (shape[0], *shape[2:]), generator=generator)  # no sample is of the last class
    found = evaluate(Itself(), [(logits, labels)]).confusion
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), counted(labels.numpy(), logits.argmax(1).numpy(), 4))
    assert found[3].sum() == 0


def test_where_labels_are_no_classes_or_too_many_there_is_no_confusion() -> None:
    values = torch.randn(8, 2)
    assert evaluate(Itself(), [(values, values)], metric="mse").confusion is None
    assert evaluate(Itself(), [(torch.randn(8, 1001), torch.arange(8))]).confusion is None


def test_classes_are_told_worst_first_with_what_they_were_taken_for() -> None:
    table, matrix = classes.blocks(TABLE, NAMES)
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == ["bee", "ant", "cat"]
    bee, ant, cat = table.rows
    assert bee[1:] == (Bar(0.0, "0.0%"), "0.0%", "4", "cat (4)")
    assert ant[1:] == (Bar(0.75, "75.0%"), "85.7%", "8", "bee (2)")
    assert cat[1:] == (Bar(0.9, "90.0%"), "69.2%", "10", "ant (1)")
    assert isinstance(matrix, Matrix)
    assert (matrix.names, matrix.counts) == (NAMES, ((6, 2, 0), (0, 0, 4), (1, 0, 9)))
    never = classes.blocks(torch.tensor([[3, 0], [0, 0]]), None)[0]
    assert isinstance(never, Table)
    assert never.rows == (("0", Bar(1.0, "100.0%"), "100.0%", "3", "–"),)
    assert "1 classes had no sample." in never.note
    assert classes.result(TABLE, NAMES) == [
        {"class": "ant", "count": 8, "answers": [6, 2, 0]},
        {"class": "bee", "count": 4, "answers": [0, 0, 4]},
        {"class": "cat", "count": 10, "answers": [1, 0, 9]},
    ]


def test_many_classes_are_told_in_part_and_none_not_at_all() -> None:
    many = classes.blocks(torch.eye(80, dtype=torch.int64), None)
    assert len(many) == 1, "eighty squares along a side are dots"
    assert isinstance(many[0], Table)
    assert len(many[0].rows) == 10
    assert "70 more in --format json." in many[0].note
    assert classes.blocks(None, NAMES) == () == classes.blocks(torch.zeros(3, 3, dtype=torch.int64), NAMES)
    assert classes.result(None, NAMES) is None


@pytest.mark.parametrize("count", [2, 8, 9, 15, 60])
def test_a_square_is_as_dark_as_its_share_of_the_row(count: int) -> None:
    pytest.importorskip("matplotlib")
    from renorm.report import pictures

    counts = torch.arange(count * count).reshape(count, count)
    names = tuple(f"a class with a long name {k}" for k in range(count))
    matrix = Matrix("", names=names, counts=tuple(map(tuple, counts.tolist())))
    (axes,) = pictures.figure([matrix]).axes
    shares = counts.double() / counts.sum(1, keepdim=True)
    np.testing.assert_allclose(axes.images[0].get_array(), shares)
    written = [text.get_text() for text in axes.texts]
    assert written == ([str(k) for k in range(1, count * count)] if count <= 8 else [])
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(labels) <= 14
    assert all(len(label) <= 12 for label in labels)
    assert "<svg" in pictures.svg(pictures.figure([matrix]))


def test_losses_and_scores_are_drawn_over_the_steps(run: tuple[FineTuned, list[tuple[int, float]]]) -> None:
    result, losses = run
    drawn = titled(result, losses=losses, names=NAMES)
    loss = drawn["Loss"]
    assert isinstance(loss, Lines)
    (_, _, trained), (_, _, unsure) = loss.items
    assert trained == tuple((float(step), value) for step, value in losses)
    assert [x for x, _ in unsure] == [8.0, 16.0, 24.0]
    assert [y for _, y in unsure] == [e.score.nll for e in result.history if e.score]
    ((_, _, scored),) = drawn["Score on val"].items
    assert scored == tuple(
        (x, 100 * e.score.value) for x, e in zip((8.0, 16.0, 24.0), result.history, strict=True) if e.score
    )
    without = titled(result)["Loss"]  # of a run that had ended before: nothing but what it kept
    assert without.items[0][2] == tuple((x, e.loss) for x, e in zip((8.0, 16.0, 24.0), result.history, strict=True))
    assert titled(result, names=NAMES)["Classes on val, worst first"].rows[0][0] in NAMES


def test_drift_is_the_distance_of_what_a_layer_holds_from_what_it_came_with() -> None:
    model = net()
    before = {site.name: (site.statistics(), site.eps) for site in find_sites(model)}
    drifts = []
    for event in training(model, data(), None, Recipe(epochs=2, lr=0.02, head="keep", policy="all")):
        if isinstance(event, Epoch):
            now = {site.name: site.statistics() for site in find_sites(model)}
            drifts.append((event.drift, now))
    result: Any = event
    drifts.append((result.result.drift, {site.name: site.statistics() for site in find_sites(model)}))
    for drift, now in drifts:
        assert set(drift) == {"1", "4"}
        for name, far in drift.items():
            (was, eps), held = before[name], now[name]
            assert was is not None
            assert held is not None
            assert far == Shift.between(was, held, eps=eps).layer.wasserstein2 > 0
    picture = titled(result.result)["How far statistics drifted from the source"]
    (_, _, means), (farthest, _, line), (_, _, end) = picture.items
    assert means[0] == line[0] == (0.0, 0.0)
    assert means[1][1] == pytest.approx(sum(drifts[0][0].values()) / 2)
    assert line[2][1] == drifts[1][0][farthest] == max(drifts[1][0].values())
    assert end[0][1] == pytest.approx(sum(drifts[2][0].values()) / 2)


def test_statistics_that_stood_still_are_not_drawn() -> None:
    result = finetune_(net(), data(), data(12), policy="head-only", epochs=2, lr=0.02, head="keep")
    assert set(result.drift.values()) == {0.0}
    assert "How far statistics drifted from the source" not in titled(result)


def test_a_solved_head_has_classes_and_no_curves() -> None:
    result = finetune_(net(), data(30), data(12), policy="few-labels", head="new", classes=NAMES)
    assert result.history == ()
    assert str(finetuned.verdict(result, output="x.pt").title).startswith("Fitted without training: accuracy ")
    alone = finetune_(net(), data(30), policy="few-labels", head="new", classes=NAMES)
    assert finetuned.verdict(alone, output="x.pt").title == "Fitted without training"
    assert [row[0] for row in finetuned.blocks(result)[0].rows] == ["policy", "head"], "no rate where no step was taken"
    drawn = titled(result, names=NAMES)
    assert "Loss" not in drawn
    assert "Epochs" not in drawn
    assert drawn["What was taken for what"].names == NAMES


def test_the_checkpoint_keeps_the_history_without_its_tables(tmp_path: Any) -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "head": "keep", "policy": "all", "run": tmp_path}
    first = finetune_(net(), data(), data(12), **options)
    assert first.history[0].score is not None
    assert first.history[0].score.confusion is not None
    again = finetune_(net(), data(), data(12), **options)
    assert again.history == first.history
    assert again.history[0].score is not None
    assert again.history[0].score.confusion is None
    assert again.score is not None
    assert again.score.confusion is not None


def test_the_terminal_tells_the_classes(run: tuple[FineTuned, list[tuple[int, float]]]) -> None:
    result, losses = run
    blocks = finetuned.blocks(result, losses=losses, names=NAMES)
    out = io.StringIO()
    terminal.show(Report("finetune", "", "", Words("Well."), blocks, {}), out)
    assert "Classes on val, worst first" in out.getvalue()
    assert finetuned.result(result, names=NAMES)["classes"][2]["class"] == "cat"
    assert set(finetuned.result(result)["history"][0]["drift"]) == {"1", "4"}


@pytest.mark.parametrize("ends", [(69.0, 81.6667), (0.8, 1.8), (1234.0, 5678.0)])
def test_numbers_of_any_width_leave_the_label_beside_them_whole(ends: tuple[float, float]) -> None:
    drawn = figure([Lines("", items=(("a", "plain", ((0, ends[0]), (72, ends[1]))),), across="step", up="accuracy, %")])
    for _ in range(2):  # whatever was drawn before
        svg(drawn)
        assert drawn.axes[0].yaxis.label.get_window_extent().x0 > -3
