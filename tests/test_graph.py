"""graph: one watched forward says who wrote what a norm reads, and who else reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.graph import Graph, watch
from renorm.sites import find_sites
from tests import zoo
from tests.contracts.photograph import differences, photograph, process
from tests.zoo import lived


def watched(model: nn.Module, example: Any) -> Graph:
    return watch(model, example, sites=find_sites(model), caller=Caller())


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_watching_changes_nothing_and_sees_every_site_that_runs(case: zoo.Case) -> None:
    model = case.settled()
    before, around = photograph(model), process()
    caller = Caller(forward=case.forward, output=case.output)
    graph = watch(model, case.batch(), sites=find_sites(model), caller=caller)
    assert differences(before, photograph(model)) == []
    assert process() == around
    visited = {visit.site.partition("@")[0] for visit in graph.visits}
    assert {name.partition("@")[0] for name in case.reached(model)} <= visited


def test_who_wrote_what_a_norm_reads_and_who_reads_what_it_gives() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
    graph = watched(model, torch.randn(2, 3, 6, 6))
    (visit,) = graph.visits
    assert visit.entry is not None
    assert visit.exit is not None
    assert str(graph.writer(visit.entry)) == "convolution in 0"
    assert [o.where for o in graph.readers(visit.entry)] == ["1"]
    assert [str(o) for o in graph.readers(visit.exit)] == ["relu in 2"]
    weights = [o.args["weight"] for o in graph.operations if o.name == "convolution"]
    assert graph.owners[weights[0].value] == [("0", "weight")]
    last = graph.operations[-1]
    assert (last.name, last.where) == ("addmm", "4")
    assert last.writes[0].value in graph.returned


class Path(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, self.conv(x))


def entry(graph: Graph) -> tuple[str, list[str]]:
    (visit,) = graph.visits
    assert visit.entry is not None
    writer = graph.writer(visit.entry)
    outside = [o.name for o in graph.readers(visit.entry) if o.visit is None]
    return "" if writer is None else writer.name, outside


def _pooled_then_normed(self: Any, y: Tensor) -> Tensor:
    return self.bn(torch.nn.functional.max_pool2d(y, 2))


def _overwritten(self: Any, y: Tensor) -> Tensor:
    y.relu_()
    return self.bn(y)


def _changed_later(self: Any, y: Tensor) -> Tensor:
    return self.bn(y).sum() + y.mul_(2)


def _written_through_a_view(self: Any, y: Tensor) -> Tensor:
    y[:, 0] = 0
    return self.bn(y)


@pytest.mark.parametrize(
    ("between", "writer", "others"),
    [
        (lambda self, y: self.bn(y), "convolution", []),
        (lambda self, y: self.bn(y) + y, "convolution", ["add"]),
        (lambda self, y: self.bn(y) + y.flatten(1).sum(1)[:, None, None, None], "convolution", ["sum"]),
        (lambda self, y: self.bn(y.transpose(2, 3).flip(0)), "flip", []),
        (lambda self, y: self.bn(y.transpose(2, 3)), "convolution", []),
        (lambda self, y: (self.bn(y), y.chunk(2, 1)), "convolution", []),
        (lambda self, y: (self.bn(y), y.chunk(2, 1)[0].exp()), "convolution", ["exp"]),
        (_pooled_then_normed, "max_pool2d_with_indices", []),
        (_overwritten, "relu_", []),
        (_changed_later, "convolution", ["mul_"]),
        (_written_through_a_view, "fill_", []),
        (lambda self, y: self.bn(torch.zeros(1, 4, 4, 4)) + y, "zeros", []),
    ],
)
def test_views_are_looked_through_and_writes_are_not(between: Any, writer: str, others: list[str]) -> None:
    graph = watched(lived(Path(between)), torch.randn(1, 3, 4, 4))
    assert entry(graph) == (writer, others)


def test_freed_memory_that_is_used_again_is_another_value() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                x = x.exp().log()
            return self.bn(x)

    graph = watched(lived(Chain()), torch.rand(2, 4))
    assert entry(graph)[0] == "log"
    assert len({place.value for o in graph.operations for place in o.writes}) >= 101


def test_a_surrounding_inference_mode_makes_no_difference() -> None:
    model = lived(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)))
    x = torch.randn(2, 3)
    outside = watched(model, x)
    with torch.inference_mode():
        inside = watched(model, x)
    assert [o.name for o in inside.operations] == [o.name for o in outside.operations]


def test_a_failing_forward_leaves_no_hook() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = photograph(model)
    with pytest.raises(RuntimeError, match="expected input") as caught:
        watched(model, torch.randn(2, 5, 6, 6))
    assert "batch 0" in caught.value.__notes__[0]
    assert differences(before, photograph(model)) == []
