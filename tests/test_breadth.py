"""Suite breadth: does it notice what it is there to notice?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from renorm.bench import breadth, families
from renorm.bench.base import Cell, Row
from renorm.bench.breadth import Breadth
from renorm.bench.breadth_table import table, wrong
from renorm.bench.runner import Finished, run_suite
from renorm.cli import main
from renorm.errors import ModelError
from renorm.observe import observe
from renorm.sites import find_sites

timm = pytest.importorskip("timm")


@pytest.fixture
def suite() -> Breadth:
    return Breadth(data=Path())


def cell(suite: Breadth, member: str) -> Cell:
    (found,) = [each for each in suite.cells() if each["member"] == member]
    return found


def ran(suite: Breadth, member: str) -> Row:
    chosen = cell(suite, member)
    return Row(chosen, {name: float(value) for name, value in suite.run_cell(chosen).items()})


def test_there_are_more_than_a_hundred_families_and_timm_knows_every_member(suite: Breadth) -> None:
    assert len(list(suite.cells())) >= 150
    assert len(list(Breadth(data=Path(), size="full").cells())) > len(list(suite.cells()))
    known = set(timm.list_models())
    assert {member for member, _ in families.FAMILIES.values()} <= known
    assert len({cell.key for cell in suite.cells()}) == len(list(suite.cells()))


def test_the_members_are_the_smallest_of_their_families(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ["lcnet_050", "lcnet_035", "tf_mixnet_s", "mixnet_m", "test_resnet", "resnet18", "resnet10t", "resnet32ts"]
    monkeypatch.setattr("timm.list_models", lambda: some)
    assert families.choose() == {
        "lcnet": ("lcnet_035", 1.64),
        "mixnet": ("tf_mixnet_s", 4.13),
        "resnet": ("resnet10t", 5.44),
        "resnet (byobnet)": ("resnet32ts", 17.96),
    }


def test_batch_norms_in_one_family_and_none_in_another(suite: Breadth) -> None:
    lcnet, mixed, plain = (ran(suite, name) for name in ("lcnet_035", "edgenext_xx_small", "convnext_zepto_rms"))
    assert wrong(lcnet) == wrong(mixed) == wrong(plain) == []
    assert lcnet.values["batch"] == lcnet.values["changed"] == 27
    assert 0 < lcnet.values["running"] < 1e-6
    assert 0 < lcnet.values["by batch"] < 1e-5
    assert mixed.values["refused"] == plain.values["refused"] == 1
    assert plain.values["other"] == 15
    text = table([lcnet, mixed, plain], left_out=24)
    assert text.startswith("**3 families, 0 wrong**")
    assert "24 families whose smallest member" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 + 2
    assert {line.count("|") for line in lines} == {13}
    broken = replace(lcnet, values={**lcnet.values, "not undone": 2.0})
    assert "1 wrong" in table([broken, mixed], left_out=0)
    assert "| not undone |" in table([broken, mixed], left_out=0)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("missed", 1.0, "missed"),
        ("invented", 1.0, "invented"),
        ("running", 2e-6, "observe running"),
        ("by batch", 2e-5, "observe by batch"),
        ("output", 1e-3, "normalisation"),
        ("not kept", 1.0, "not kept"),
        ("changed", 3.0, "not changed"),
        ("refused", 1.0, "refused"),
        ("unseen", 1.0, "unseen"),
    ],
)
def test_every_number_that_may_be_wrong_is_called_so(name: str, value: float, said: str) -> None:
    right = {"missed": 0, "invented": 0, "unseen": 0, "not undone": 0, "not kept": 0, "running": 1e-7, "by batch": 1e-6}
    right |= {"output": 1e-6, "changed": 4, "batch": 4, "unvisited": 0, "refused": 0}
    row = Row(Cell.of(family="a", member="b"), right)
    assert wrong(row) == []
    assert wrong(replace(row, values={**right, name: value})) == [said]


def test_a_wrong_site_measurement_or_undo_is_noticed(suite: Breadth, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_first(model: nn.Module) -> list[Any]:
        return find_sites(model)[1:]

    def shifted(model: nn.Module, batches: Any, **how: Any) -> Any:
        seen = observe(model, batches, **how)
        first = next(iter(seen))
        seen[first] = seen[first]._replace(values=replace(seen[first].values, mean=seen[first].values.mean + 1e-3))
        return seen

    class Kept:
        def restore_(self) -> None:
            pass

    def moving(model: nn.Module, batches: Iterator[Any], **how: Any) -> Any:
        for module in breadth._holders(model).values():
            module.running_mean.add_(1)
        for _ in batches:
            pass
        return Kept()

    with monkeypatch.context() as patch:
        patch.setattr(breadth, "find_sites", without_the_first)
        assert "missed" in wrong(ran(suite, "lcnet_035"))
    with monkeypatch.context() as patch:
        patch.setattr(breadth, "observe", shifted)
        assert {"observe running", "observe by batch"} <= set(wrong(ran(suite, "lcnet_035")))
    with monkeypatch.context() as patch:
        patch.setattr(breadth, "recalibrate_", moving)
        assert {"not undone", "not kept"} <= set(wrong(ran(suite, "lcnet_035")))
    with monkeypatch.context() as patch:
        patch.setattr(breadth, "recalibrate_", lambda *args, **how: Kept())
        with pytest.raises(AssertionError, match="a loader failed, and recalibrate_ did not say so"):
            ran(suite, "lcnet_035")


def test_a_model_that_takes_no_size_is_an_error() -> None:
    class Picky(nn.Module):
        pretrained_cfg = {"input_size": (3, 72, 72)}  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(x.shape)

    with pytest.raises(ModelError, match=r"Picky takes none of the sizes \[64, 96"):
        breadth._smallest(Picky())


def test_it_runs_and_needs_no_data(
    suite: Breadth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {name: families.FAMILIES[name] for name in ("lcnet", "starnet")}
    monkeypatch.setattr(breadth, "FAMILIES", some)
    finished = list(run_suite(suite, out=tmp_path, processes=1))[-1]
    assert isinstance(finished, Finished)
    assert "    renorm bench breadth --size quick" in finished.text
    assert "**2 families, 0 wrong**" in finished.text
    assert main(f"bench breadth -o {tmp_path}".split()) == 0
    assert "2 families, 0 wrong" in capsys.readouterr().out
    assert main(f"bench speed -o {tmp_path}".split()) == 2
    assert "--data should be the folder with nets.py" in capsys.readouterr().err


def test_the_loader_that_is_to_fail_does() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        list(breadth._broken([torch.zeros(1)]))
