"""What a notebook asks of a result: the same numbers as a table, as a figure, and as HTML without a script."""

from __future__ import annotations

import math
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm import faces
from renorm.errors import MissingExtra, UnknownName, UsageError
from renorm.report import diagnosis
from renorm.report.base import Bars, Table, Told
from tests.pages import Page

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


@pytest.fixture
def model() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    made = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    made.train()(torch.randn(200, 3, 10, 10))
    return made.eval()


@pytest.fixture
def batches() -> list[Any]:
    return [(torch.randn(30, 3, 10, 10) * 2 + 1, torch.randint(3, (30,))) for _ in range(2)]


def results(model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    """One of each: diagnosis, score, gap (before and after) and adaptation."""
    import copy

    before = copy.deepcopy(model)
    made = {"diagnosis": renorm.diagnose(model, batches), "score": renorm.evaluate(model, batches)}
    made["adaptation"] = renorm.recalibrate_(model, batches, check=batches)
    made["gap"] = renorm.verify(before, model, batches)
    return made


def test_every_result_has_every_face(model: nn.Module, batches: list[Any]) -> None:
    for name, result in results(model, batches).items():
        page = Page(result._repr_html_())
        assert not {"script", "img", "link", "html"} & {tag for tag, _ in page.tags}, name
        assert len(page.said()) > 20, name
        assert isinstance(result.to_frame(), pd.DataFrame), name
        figure = result.plot()
        assert figure.axes, name
        assert figure._repr_svg_().startswith("<svg"), name


def test_a_diagnosis_as_a_table_worst_first(model: nn.Module, batches: list[Any]) -> None:
    found = renorm.diagnose(model, batches)
    table = found.to_frame()
    assert table.index.name == "site"
    assert list(table.index) == list(found.distances)
    assert table["distance"].to_dict() == dict(found.distances)
    assert table["channels"].to_dict() == {"1": 4, "4": 6}
    for site, shift in found.shifts.items():
        for field, value in shift.layer._asdict().items():
            assert table.loc[site, field] == value
    assert table.loc[found.findings[0].site, "findings"] == found.findings[0].rule
    assert found.to_frame(per="site").equals(table)


def test_the_colours_of_a_diagnosis_are_the_rules_own_verdicts(model: nn.Module, batches: list[Any]) -> None:
    """With a profile a site may lie farther than the general limit and be well: picture and table must not say otherwise."""
    far = [(x * 1.5 + 1, y) for x, y in batches]
    judged, known = renorm.diagnose(model, far), renorm.diagnose(model, far, renorm.profile(model, far))
    assert max(known.distances.values()) > 0.3
    assert known.healthy
    for found, tones in ((judged, {"bad", "doubt"}), (known, {"good"})):
        bars = next(block for block in diagnosis.blocks(found) if isinstance(block, Bars))
        assert {tone for name, _, tone in bars.items if found.distances[name] > 0.3} <= tones
        table = diagnosis.blocks(found)[-1]
        assert isinstance(table, Table)
        assert [row[-1] for row in table.rows if isinstance(row[-1], Told) and row[-1].tone in tones]


def test_every_channel_as_a_row(model: nn.Module, batches: list[Any]) -> None:
    found, adaptation = renorm.diagnose(model, batches), renorm.recalibrate_(model, batches)
    for result in (found, adaptation):
        table = result.to_frame(per="channel")
        assert table.index.names == ["site", "channel"]
        assert len(table) == 4 + 6
        for site, shift in result.shifts.items():
            assert table.loc[site]["wasserstein2"].tolist() == shift.wasserstein2.tolist()


def test_an_adaptation_as_a_table(model: nn.Module, batches: list[Any]) -> None:
    adaptation = renorm.recalibrate_(model, batches)
    table = adaptation.to_frame()
    assert table["source_weight"].to_dict() == dict(adaptation.weights)
    assert table["visited"].all()
    far = table["wasserstein2"]
    assert list(far) == sorted(far, reverse=True)


def test_a_site_that_no_batch_reached_is_in_the_tables(model: nn.Module, batches: list[Any]) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = model, nn.BatchNorm2d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    part = Part().eval()
    table = renorm.diagnose(part, batches).to_frame()
    assert list(table.index)[-1] == "spare"
    assert math.isnan(table.loc["spare", "distance"])
    assert not renorm.recalibrate_(part, batches).to_frame().loc["spare", "visited"]


def test_a_score_and_a_gap_are_one_row(model: nn.Module, batches: list[Any]) -> None:
    made = results(model, batches)
    (score,) = made["score"].to_frame().to_dict("records")
    assert score["value"] == made["score"].value
    assert (score["low"], score["high"]) == made["score"].interval
    assert list(score) == ["metric", "value", "low", "high", "count", "nll", "ece"]
    (gap,) = made["gap"].to_frame().to_dict("records")
    assert gap == vars(made["gap"])


def test_what_cannot_be_asked_is_refused(model: nn.Module, batches: list[Any]) -> None:
    made = results(model, batches)
    with pytest.raises(UnknownName, match=r"no per= of to_frame 'chanel'; did you mean 'channel'\?"):
        made["diagnosis"].to_frame(per="chanel")
    with pytest.raises(UsageError, match=r"to_frame\(per='channel'\) was asked of a result that is one row"):
        made["score"].to_frame(per="channel")
    with pytest.raises(UsageError, match="nothing to plot: diagnose was given no batches"):
        renorm.diagnose(model).plot()
    endless = renorm.Gap(max_abs=math.inf, mean_abs=math.inf, agreement=None, first_site=None, samples=3)
    with pytest.raises(UsageError, match="nothing to plot: the outputs differ by numbers that are not finite"):
        endless.plot()


def test_a_score_without_interval_has_nothing_to_plot() -> None:
    bare = renorm.Score(value=1.0, interval=(math.nan, math.nan), count=1, nll=math.nan, ece=math.nan, metric="mse")
    with pytest.raises(UsageError, match="nothing to plot: the interval of mse is not known"):
        bare.plot()
    assert "unknown" in bare._repr_html_()


def test_without_batches_there_are_tables_and_words_all_the_same(model: nn.Module) -> None:
    found = renorm.diagnose(model)
    assert list(found.to_frame().index) == ["1", "4"]
    assert found.to_frame(per="channel").empty
    assert "nothing wrong" in Page(found._repr_html_()).said()


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (renorm.Gap(max_abs=0.0, mean_abs=0.0, agreement=1.0, first_site=None, samples=1), "over 1 sample."),
        (renorm.Gap(max_abs=1.0, mean_abs=0.5, agreement=None, first_site=None, samples=9), "at no norm layer"),
        (renorm.Gap(max_abs=1.0, mean_abs=0.5, agreement=0.25, first_site="bn1", samples=9), "part at bn1"),
        (renorm.Gap(max_abs=1.0, mean_abs=0.5, agreement=0.25, first_site="", samples=9), "part at the model itself"),
    ],
)
def test_a_gap_says_where_the_models_part(gap: renorm.Gap, said: str) -> None:
    assert said in Page(gap._repr_html_()).said()


def test_without_the_extras_a_notebook_still_shows_results(
    model: nn.Module, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = renorm.diagnose(model, batches)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert "Data shift" in Page(found._repr_html_()).said()
    with pytest.raises(MissingExtra, match=r'to_frame\(\) needs pandas, .*"renorm\[tables\]"'):
        found.to_frame()
    with pytest.raises(MissingExtra, match=r'needs matplotlib, .*"renorm\[report\]"'):
        found.plot()


def test_a_figure_can_be_saved_and_pickled(model: nn.Module, batches: list[Any], tmp_path: Any) -> None:
    figure = renorm.diagnose(model, batches).plot()
    figure.savefig(tmp_path / "shift.png")
    assert (tmp_path / "shift.png").stat().st_size > 5000
    assert pickle.loads(pickle.dumps(figure)).axes


def test_what_has_no_face_says_so() -> None:
    for face in (faces.html, faces.figure):
        with pytest.raises(TypeError, match="no face is registered for int"):
            face(3)
    with pytest.raises(TypeError, match="no face is registered for int"):
        faces.frame(3, "")
