"""Plans: what helps comes first, what harms never does, trying changes nothing, and what was used is cited."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm import layers
from renorm.cite import cite
from renorm.errors import BatchError, NoBatchNorm, UnknownName, UsageError
from renorm.methods import EqualMix, Pooled
from renorm.profile import profile
from renorm.recalibrate import recalibrate_
from renorm.recommend import Plan, recommend
from renorm.report import plan as page
from renorm.report.language import translated
from renorm.trust import Trust
from tests.test_cli import Ran, folder
from tests.test_cli import renorm as command
from tests.test_kind import learnt, pictures

__all__ = ["command", "folder", "learnt"]  # fixtures

LABELS = torch.arange(256) % 4
SHIFTED = 0.2 * pictures(LABELS, seed=5) + 1.5


def right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).double().mean())


def names(plan: Plan) -> list[str]:
    return [str(each.name) for each in plan.ranking]


def test_with_labels_what_helps_comes_first_and_is_undone_bit_for_bit(learnt: nn.Module) -> None:
    held = {name: value.clone() for name, value in learnt.state_dict().items()}
    plan = recommend(learnt, list(SHIFTED.split(32)), LABELS, budget=60.0)
    assert all(value.equal(held[name]) for name, value in learnt.state_dict().items())
    assert plan.labelled
    assert names(plan)[-1] == "leave it as it is"
    assert {"recalibrate", "recalibrate, source forgotten", "fine-tune"} < set(names(plan)) | set(plan.left_out)
    assert plan.best.gain is not None
    assert plan.best.gain > (plan.best.error or 0) > 0
    before = right(learnt, SHIFTED, LABELS)
    undo = plan.apply_(learnt)
    assert right(learnt, SHIFTED, LABELS) > before + 0.1
    undo.restore_()
    assert all(value.equal(held[name]) for name, value in learnt.state_dict().items())


def test_labels_that_ride_in_the_batches_are_used(learnt: nn.Module) -> None:
    riding = [(x, y) for x, y in zip(SHIFTED.split(32), LABELS.split(32), strict=True)]
    plan = recommend(learnt, riding, budget=0.001)
    assert plan.labelled
    assert set(plan.left_out) == {"recalibrate, source forgotten", "fine-tune"}
    assert "seconds were spent" in next(iter(plan.left_out.values()))


@pytest.mark.parametrize("known", [True, False])
def test_without_labels_a_believed_change_comes_first(learnt: nn.Module, known: bool) -> None:
    source = profile(learnt, [(pictures(LABELS, seed=9), LABELS)]) if known else None
    plan = recommend(learnt, list(SHIFTED.split(32)), source=source)
    assert not plan.labelled
    assert names(plan)[0] == ("recalibrate with the profile" if known else "recalibrate")
    assert "the benchmark found" in plan.why
    assert plan.best.trust is not None
    assert plan.best.trust.better
    undo = plan.apply_(learnt)
    assert right(learnt, SHIFTED, LABELS) > 0.8
    undo.restore_()


def test_where_classes_are_missing_plain_recalibration_is_not_put_first(learnt: nn.Module) -> None:
    labels = torch.ones(256, dtype=torch.long)
    x = pictures(labels, seed=5)
    for given in (labels, None):
        plan = recommend(learnt, list(x.split(32)), given)
        assert plan.best.verb == "leave", plan
        assert "no change is" in plan.why
        before = right(learnt, x, labels)
        plan.apply_(learnt).restore_()
        assert right(learnt, x, labels) == before


def test_wrong_preprocessing_is_to_be_corrected_first(learnt: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["renorm.recommend"], "Facts", lambda *_: type("F", (), {"suspect": object()}))
    plan = recommend(learnt, list(SHIFTED.split(32)))
    assert names(plan) == ["leave it as it is"]
    assert "correct it first" in plan.why


def test_a_candidate_that_fails_is_left_out_with_its_reason(learnt: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, *args: Any, **options: Any) -> Any:
        if options.get("prior") == 0:
            raise BatchError("too few of them.\nand more")
        return recalibrate_(model, *args, **options)

    monkeypatch.setattr(sys.modules["renorm.recommend"], "recalibrate_", fails)
    plan = recommend(learnt, list(SHIFTED.split(32)))
    assert plan.left_out == {"recalibrate, source forgotten": "does not run: too few of them."}


def test_what_cannot_be_tried_is_refused(learnt: nn.Module) -> None:
    with pytest.raises(UsageError, match="number of seconds above 0"):
        recommend(learnt, [SHIFTED], budget=0)
    with pytest.raises(BatchError, match="needs 32 samples in two batches; got 256 in 1"):
        recommend(learnt, [SHIFTED])
    with pytest.raises(UsageError, match="one class number for each of the 256 samples"):
        recommend(learnt, list(SHIFTED.split(32)), LABELS[:9])
    with pytest.raises(NoBatchNorm, match="recommend needs batch norm"):
        recommend(nn.Linear(2, 2), [torch.randn(20, 2)] * 2)


# ── shown ──


def test_a_plan_is_shown_in_words_pictures_and_numbers(learnt: nn.Module) -> None:
    labelled = recommend(learnt, list(SHIFTED.split(32)), LABELS, budget=0.001)
    alone = recommend(learnt, list(SHIFTED.split(32)), budget=0.001)
    assert str(labelled).startswith("1. recalibrate: ")
    for plan in (labelled, alone):
        result = page.result(plan)
        assert result["best"] == "recalibrate"
        assert [each["name"] for each in result["ranking"]] == names(plan)
        chinese = translated((page.verdict(plan), *page.blocks(plan)), "zh")
        assert chinese[0].title == "最佳：重新校准"
        assert "Best: recalibrate" in plan._repr_html_()
    pytest.importorskip("matplotlib")
    assert labelled.plot().axes
    with pytest.raises(UsageError, match="no labels"):
        alone.plot()
    pytest.importorskip("pandas")
    assert list(labelled.to_frame()["verb"]) == [each.verb for each in labelled.ranking]


def test_the_commands_recommend_and_do(folder: Any, command: Any) -> None:
    ran: Ran = command("recommend nets.py:net far.npz --batch-size 16 --budget 1 --format json")
    assert ran.code == 0, ran.err
    best = ran.json["result"]["best"]
    ran = command("auto nets.py:net far.npz --batch-size 16 --budget 1 -o out.safetensors --format json")
    result = ran.json["result"]
    assert result["plan"]["best"] == best
    assert (folder / "out.safetensors").exists() == (ran.code == 0) == (result["output"] == "out.safetensors")


def test_auto_writes_what_is_better_and_nothing_else(
    folder: Any, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for good in (True, False):
        verdict = Trust(good, 0.9, "so", 0.5, 0.1)
        monkeypatch.setattr(sys.modules["renorm.recommend"], "trust", lambda *_, verdict=verdict, **__: verdict)
        ran: Ran = command(f"auto nets.py:net unlabelled.npz --batch-size 16 -o {good}.safetensors")
        assert ran.code == (0 if good else 1), ran.err
        assert (folder / f"{good}.safetensors").exists() == good
        assert ("Written to" if good else "Nothing was written") in ran.out


# ── cited ──


def test_what_was_used_is_cited(learnt: nn.Module) -> None:
    plan = recommend(learnt, list(SHIFTED.split(32)), LABELS, budget=0.001)
    assert cite(plan) == Pooled.cites
    adaptation = recalibrate_(learnt, [SHIFTED])
    adaptation.restore_()
    assert cite(adaptation) == cite("pooled") == cite(Pooled()) == Pooled.cites
    assert "saerens2002" in cite(EqualMix)
    assert cite("stochastic") == layers.Stochastic.cites
    assert cite("l2_sp").startswith("@")
    source = profile(learnt, [(pictures(LABELS, seed=9), LABELS)])
    assert cite(recommend(learnt, list(SHIFTED.split(32)), source=source)) == EqualMix.cites
    one = torch.ones(256, dtype=torch.long)
    assert cite(recommend(learnt, list(pictures(one, seed=5).split(32)), one)) == ""


def test_what_cites_nothing_is_refused() -> None:
    with pytest.raises(UnknownName, match="there is no method, layer or regulariser 'tennt'"):
        cite("tennt")
    with pytest.raises(UsageError, match="cite takes a method"):
        cite(3)
