"""Advice follows from measured numbers: the curve is its slow twin's, and planted situations get the setting that fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import renorm
from renorm.advise import Advice, advise
from renorm.calls import Caller
from renorm.curve import Curve, curve
from renorm.errors import NoBatchNorm, UsageError
from renorm.moments import Observed
from renorm.report import advice as page
from renorm.report import html
from renorm.report.base import Report
from renorm.report.language import translated
from renorm.timing import timed
from tests.reference import curve as twin
from tests.test_cli import Ran, folder
from tests.test_cli import renorm as command
from tests.test_doctor import images, trained

__all__ = ["command", "folder"]  # fixtures


def classifier() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*trained(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def choices(advice: Advice) -> dict[str, str]:
    return {str(item.topic): str(item.choice) for item in advice.items}


def batches(count: int, size: int = 16, **how: Any) -> list[Tensor]:
    return list(images(count, **how).split(size))


@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 99))
def test_the_curve_is_its_twins(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.normal(), 1, (size, 3, 4)) for _ in range(2 * (count // 2))]
    var = rng.uniform(0.5, 2, 3)
    seen = [{"bn": Observed.of(torch.tensor(part))} for part in parts]
    whole = {"bn": Observed.of(torch.tensor(np.concatenate(parts)))}
    found = curve(whole, seen, {"bn": torch.tensor(var)})
    assert found is not None
    assert found.single == pytest.approx(twin.single(np.concatenate(parts), var))
    assert found.halves[-1] == (size * len(parts), pytest.approx(twin.halves(parts, var)))
    assert found.error(found.needed(0.1)) <= 0.1 < found.error(max(1, found.needed(0.1) - 1)) or found.needed(0.1) == 2


def test_clusters_show_in_the_halves_and_independent_images_do_not() -> None:
    free = advise(trained(), batches(160), budget=0).curve
    sorted_ = [image + 2.0 * (k % 2) for k, image in enumerate(batches(160))]
    bound = advise(trained(), sorted_, budget=0)
    assert free is not None
    assert bound.curve is not None
    assert free.clustered < 2 < bound.curve.clustered
    assert "Shuffle" in str(bound)


def test_without_two_images_there_is_no_curve() -> None:
    assert curve({"bn": Observed.of(torch.randn(1, 2, 3))}, [], {"bn": torch.ones(2)}) is None
    assert Curve("bn", 0.0, (), 2).clustered == 1.0


def test_the_model_stays_as_it_was_and_every_piece_has_its_number() -> None:
    model = classifier()
    held = {name: value.clone() for name, value in model.state_dict().items()}
    advice = advise(model, batches(64), budget=0.2)
    assert all(value.equal(held[name]) for name, value in model.state_dict().items())
    assert len(advice.items) == 8
    assert all(math.isfinite(item.value) and item.why for item in advice.items)
    assert advice.samples == 64
    assert "BatchNorm2d" in choices(advice)["kind of batch norm"]
    assert choices(advice)["batch size"] == "16 is enough"
    assert advice.timings is not None
    assert set(advice.timings.seconds) == {"native", "channels_last", "folded", "folded, channels_last"}


def test_small_batches_want_more_samples_or_devices_or_another_norm() -> None:
    spread = [
        x + 3 * torch.randn(len(x), 1, 1, 1, generator=torch.Generator().manual_seed(k))
        for k, x in enumerate(batches(96))
    ]
    alone = choices(advise(trained(), spread, batch_size=2, budget=0))
    assert alone["batch size"].endswith("or more on a device")
    assert alone["stay with batch norm?"].startswith("Frozen")
    many = choices(advise(trained(), spread, batch_size=64, devices=32, budget=0))
    assert many["batch size"] == "SyncBatchNorm"
    momenta = [choices(advise(trained(), spread, batch_size=size, budget=0))["momentum"] for size in (2, 16)]
    assert float(momenta[0].split()[0]) < float(momenta[1].split()[0])


def test_far_data_want_recalibrated_and_frozen_statistics() -> None:
    found = choices(advise(classifier(), batches(128, 64, scale=0.1, offset=4.0), budget=0))
    assert found["stay with batch norm?"] == "yes, recalibrated and then frozen"


@pytest.mark.parametrize(
    ("shape", "name"), [((3,), "BatchNorm1d"), ((3, 9), "BatchNorm1d"), ((3, 2, 4, 4), "BatchNorm3d")]
)
def test_the_kind_follows_from_the_rank(shape: tuple[int, ...], name: str) -> None:
    model = nn.Sequential(getattr(nn, name)(3)).eval()
    data = [torch.randn(32, *shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    assert name in choices(advise(model, data, budget=0))["kind of batch norm"]


def test_padding_wants_a_mask() -> None:
    x = torch.randn(32, 3, 20)
    for row, length in enumerate(torch.randint(5, 20, (32,)).tolist()):
        x[row, :, length:] = 0
    found = choices(advise(nn.Sequential(nn.BatchNorm1d(3)).eval(), [x], budget=0))
    assert "mask=" in found["kind of batch norm"]


def test_eps_that_shapes_channels_is_said() -> None:
    model = trained()
    model[1].running_var[:2] = 1e-6
    item = next(item for item in advise(model, batches(64), budget=0).items if item.topic == "eps")
    assert item.value == pytest.approx(2 / 10)
    assert "Keep the one" in item.why


def test_a_model_that_is_rounded_wrong_by_bfloat16_keeps_float32() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)
            nn.init.ones_(self.head.weight)
            with torch.no_grad():
                self.head.weight[1] += 1e-4 * torch.tensor([1.0, -1, 1, -1])
                self.head.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn(x))

    model = Fine().eval()
    assert choices(advise(model, [torch.randn(64, 4)], budget=0))["precision"] == "float32"
    assert "precision" not in choices(advise(trained(), [images(32)], output=lambda y: y.mean(), budget=0))


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="1 or more and budget is seconds"):
        advise(trained(), batches(32), batch_size=0)
    with pytest.raises(NoBatchNorm, match="advise needs batch norm layers"):
        advise(nn.Linear(2, 2), [torch.randn(4, 2)])


# ── timing ──


def test_ways_that_do_not_run_or_do_not_agree_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renorm.timing.COMPILING", 0.0)
    model, batch = classifier(), images(4)

    def broken(_: nn.Module) -> Any:
        def run(x: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("renorm.timing._last", lambda m: nn.Sequential(m, nn.Hardtanh(-0.01, 0.01)))
    found = timed(model, batch, Caller(), samples=4, budget=0.05)
    assert set(found.seconds) == {"native", "folded"}
    assert "gives other answers" in found.left_out["channels_last"]
    assert "does not run" in found.left_out["compiled"]
    assert found.gain >= 1
    assert found.rounds >= 3


def test_what_is_timed_as_compiled_is_compiled_and_its_first_call_is_not_in_the_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from time import sleep

    monkeypatch.setattr("renorm.timing.COMPILING", 0.0)
    calls: list[str] = []

    def compile(run: Any, **options: Any) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            sleep(0.5 if not calls else 0.0)  # as a compiler takes its time once
            calls.append("compiled")
            return run(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    model = classifier()
    found = timed(model, images(4), Caller(), samples=4, budget=0.05)
    assert len(calls) == found.rounds + 1
    assert found.first["compiled"] >= 0.5 > found.seconds["compiled"]
    assert set(found.first) == set(found.seconds)
    assert "_compiled_call_impl" not in {k for k, v in vars(model).items() if v is not None}


def test_a_model_without_statistics_cannot_be_folded_and_is_timed_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    found = timed(model, torch.randn(4, 3), Caller(), samples=4, budget=0.01)
    assert set(found.seconds) == {"native"}
    assert "cannot be folded" in found.left_out["folded"]


# ── faces ──


def test_advice_is_shown_in_words_pictures_and_numbers() -> None:
    advice = advise(classifier(), batches(64), budget=0.05)
    report = Report("advise", "m", "d", page.verdict(advice), page.blocks(advice), page.result(advice))
    assert "Stay with batch norm?" in report.verdict.title
    assert [item["topic"] for item in report.result["items"]] == [str(item.topic) for item in advice.items]
    chinese = translated(report, "zh")
    assert any("momentum：" in getattr(block, "title", "") for block in chinese.blocks)
    pytest.importorskip("matplotlib")
    drawn = html.render(report, lang="zh")
    assert drawn.count("<svg") == 1
    assert "独立图像" in drawn
    shown = advice._repr_html_()
    assert "Measured:" in shown
    assert advice.plot().axes
    pytest.importorskip("pandas")
    assert list(advice.to_frame().columns) == ["choice", "value", "unit", "why"]
    assert page.blocks(Advice(advice.items, None, None, 4))
    with pytest.raises(UsageError, match="nothing to plot"):
        Advice(advice.items, None, None, 4).plot()


def test_the_command_prints_it(folder: Any, command: Any) -> None:
    ran: Ran = command("advise nets.py:net near.npz --batch-size 16 --budget 0.05")
    assert ran.code == 0, ran.err
    assert "Stay with batch norm?" in ran.out
    assert "Milliseconds for 16 samples" in ran.out


def test_it_is_public() -> None:
    assert renorm.advise is advise
