"""The kind of shift: each trace tells its kind, a profile tells more, and a planted shift is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from renorm.accuracy import Look
from renorm.bench.base import Cell, Row
from renorm.bench.estimate import Estimate
from renorm.bench.estimate_table import Fit, fit, points, table
from renorm.doctor import diagnose
from renorm.kind import Kind, Traces, classes_of, kind, moved_at, traces
from renorm.observe import observe
from renorm.profile import profile
from renorm.report import diagnosis as page
from renorm.report.language import translated
from renorm.sites import find_sites
from tests.data import shared

FIT = 0.97  # as sure as at home, all but


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (Traces(0.005, 0.1, FIT), "none"),
        (Traces(0.3, 0.1, FIT), "covariate"),
        (Traces(0.005, 0.8, FIT), "label"),
        (Traces(0.3, 0.8, FIT), "covariate and label"),
        (Traces(0.3, 0.2, 0.6), "content"),
        (Traces(0.04, 0.2, 0.73), "content"),
        (Traces(0.3, 0.2, 0.76), "covariate"),  # what moved explains some of it
        (Traces(0.01, 0.1, None), "none"),
        (Traces(0.5, 0.1, None), "covariate"),
        (Traces(0.01, 0.8, None), "label"),
    ],
)
def test_each_trace_tells_its_kind(found: Traces, name: str) -> None:
    assert kind(found).name == name
    assert kind(found).sure > 0.5
    assert kind(found).traces == found


@given(st.floats(0, 10), st.floats(0, 1), st.one_of(st.none(), st.floats(0.01, 2)))
def test_probabilities_are_probabilities_and_more_of_a_trace_is_more_of_its_kind(
    values: float, classes: float, sure: float | None
) -> None:
    found = kind(Traces(values, classes, sure))
    assert 0 <= found.sure <= 1
    assert all(0 <= part <= 1 for part in found.parts.values())
    assert kind(Traces(values + 0.1, classes, sure)).parts["covariate"] >= found.parts["covariate"]
    assert kind(Traces(values, min(1, classes + 0.1), sure)).parts["label"] >= found.parts["label"]
    if sure is None:
        assert found.parts["content"] == 0
    else:
        assert kind(Traces(values, classes, sure / 2)).parts["content"] >= found.parts["content"]


def test_where_values_moved_the_less_of_two_class_mixes_is_believed() -> None:
    assert classes_of(0.7, 0.1, values=0.0, known=True) == 0.7
    assert classes_of(0.7, 0.1, values=1.0, known=True) == pytest.approx(0.13)
    assert classes_of(0.1, 0.7, values=1.0, known=False) == 0.1


def one_hot(labels: Tensor, classes: int = 4) -> Tensor:
    return 0.96 * torch.nn.functional.one_hot(labels, classes).double() + 0.01


def test_classes_are_compared_with_equal_shares_where_nothing_is_known() -> None:
    even, one = one_hot(torch.arange(80) % 4), one_hot(torch.zeros(80, dtype=torch.long))
    assert traces(Look(even, even, None), values=0.0).classes == pytest.approx(0, abs=1e-6)
    assert traces(Look(one, even, None), values=0.0).classes > 0.6
    assert traces(Look(one, even, None), values=1.0).classes == pytest.approx(0, abs=1e-6)
    assert traces(Look(one, even, None), values=0.0).sure is None


# ── planted ──


def pictures(labels: Tensor, *, seed: int = 0) -> Tensor:
    """Each class has its own bright quarter."""
    x = 0.4 * torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for quarter in range(4):
        rows, columns = 4 * (quarter // 2), 4 * (quarter % 2)
        x[labels == quarter, :, rows : rows + 4, columns : columns + 4] += 1.5
    return x


@pytest.fixture(scope="module")
def learnt() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)),
    )
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(60):
        labels = torch.randint(4, (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(pictures(labels, seed=step)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        model(pictures(torch.arange(2000) % 4, seed=99))
    return model.eval()


def told(model: nn.Module, x: Tensor, *, known: bool) -> Kind:
    labels = torch.arange(400) % 4
    source = profile(model, [(pictures(labels, seed=7), labels)]) if known else None
    found = diagnose(model, list(x.split(64)), source).kind
    assert found is not None
    return found


@pytest.mark.parametrize("known", [True, False])
def test_planted_shifts_are_named(learnt: nn.Module, known: bool) -> None:
    even, one = torch.arange(256) % 4, torch.ones(256, dtype=torch.long)
    assert told(learnt, pictures(even, seed=5), known=known).name == "none"
    assert told(learnt, 0.3 * pictures(even, seed=5) + 0.6, known=known).name == "covariate"
    if known:
        assert told(learnt, pictures(one, seed=5), known=True).name == "label"
        noise = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        assert told(learnt, 0.5 * noise, known=True).parts["content"] > 0.3


def test_at_the_classes_own_mix_label_shift_moves_nothing(learnt: nn.Module) -> None:
    labels = torch.arange(400) % 4
    source = profile(learnt, [(pictures(labels, seed=7), labels)])
    sites = [site for site in find_sites(learnt) if site.kind == "batch"]
    seen = observe(learnt, [pictures(torch.ones(256, dtype=torch.long), seed=5)], under="running")
    only = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert moved_at(only, source, seen, sites) < 0.1 * moved_at(source.prior, source, seen, sites)
    assert moved_at(only, source, {}, sites) == 0.0


# ── said ──


def test_reports_say_the_kind_and_the_estimate_in_both_languages(learnt: nn.Module) -> None:
    labels = torch.arange(400) % 4
    source = profile(learnt, [(pictures(labels, seed=7), labels)])
    for x, part, wanted in (
        (pictures(labels, seed=8), "no shift", "没有偏移"),
        (0.3 * pictures(labels, seed=8) + 0.6, "covariate shift", "协变量偏移"),
    ):
        diagnosis = diagnose(learnt, list(x.split(64)), source)
        blocks = page.blocks(diagnosis)
        assert any(part in getattr(block, "title", "") for block in blocks)
        assert any(wanted in getattr(block, "title", "") for block in translated(blocks, "zh"))
        assert any("Estimated without labels" in getattr(block, "title", "") for block in blocks)
        result = page.result(diagnosis)
        assert diagnosis.estimate is not None
        assert result["estimate"]["accuracy"] == diagnosis.estimate.value
        assert result["kind"]["name"] == (diagnosis.kind.name if diagnosis.kind else "")
    alone = page.blocks(diagnose(learnt, [pictures(labels)]))
    assert any("equal shares of all classes are assumed" in getattr(block, "text", "") for block in alone)


# ── the suite ──


def rows(errors: Any = (0.0, 0.05, 0.1)) -> list[Row]:
    found = []
    for bed in ("resnet8", "resnet20"):
        for shift, moved in (("as_it_is", 0.005), ("fog", 0.2)):
            for seed, error in enumerate(errors):
                agree = 0.3 + error if moved > 0.1 else 0.9
                values = {"confidence": 0.9, "agreement": agree, "mixed": agree, "threshold": 0.8, "difference": 0.85}
                values |= {"moved": moved, "moved_alone": moved, "samples": 256.0, "home": 0.9, "home_confidence": 0.95}
                values |= {"classes": 0.1, "classes_alone": 0.1, "classes_pooled": 0.05, "sure": 0.9}
                values["accuracy"] = 0.3 if moved > 0.1 else 0.8
                found.append(Row(Cell.of(bed=bed, shift=shift, classes=10, seed=seed), values))
    return found


def test_a_fit_holds_nine_in_ten_of_what_it_was_fitted_on() -> None:
    made = fit(points(rows()), True)
    assert sum(made.covers(p, True) for p in points(rows())) >= 0.9 * 12
    assert not all(Fit(made.far, (0.0, 0.0)).covers(p, True) for p in points(rows((0.3,) * 3)))


def test_the_table_stands_with_any_part_of_the_rows() -> None:
    assert "12 cells with a truth, 4 cases" in table(rows())
    assert "each network in turn" in table(rows())
    assert "true, told" in table(rows()[:1])
    assert "nothing is" in table([])


def test_a_cell_measures_what_the_table_reads() -> None:
    suite = Estimate(shared("nets.py").parent)
    cells = list(suite.cells())
    assert len({(c["bed"], c["shift"], c["classes"]) for c in cells}) >= 40
    values = suite.run_cell(next(c for c in cells if c["bed"] == "mobilenet_vww" and c["classes"] == 1))
    assert "12 cells with a truth" in suite.table(rows())
    assert suite.table([Row(cells[0], values)])
