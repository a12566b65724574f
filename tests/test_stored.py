"""A file alone: the norm layers of weights, ONNX and .pt2 are found as the model has them, and judged without its code."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm.checkpoints import write
from renorm.doctor import diagnose_file
from renorm.errors import CheckpointError, UsageError
from renorm.sites import find_sites
from renorm.stored import read_contents, skeleton
from tests.data import shared
from tests.test_cli import Ran, folder, refused
from tests.test_cli import renorm as command

__all__ = ["command", "folder"]  # fixtures


class Net(nn.Module):
    """Two batch norms behind convolutions, one of them read twice, and one that follows an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.last = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.head(self.last(x + self.inner(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for site in find_sites(model):
        nn.init.uniform_(site.module.weight, 0.5, 1.5)
    for _ in range(3):
        model.train()(torch.randn(32, 3, 8, 8))
    return model.eval()


def program(model: nn.Module, path: Path, *, training: bool = False) -> Path:
    exported = torch.export.export(model.train(training), (torch.randn(4, 3, 8, 8),))
    model.eval()
    torch.export.save(exported, path)
    return path


def onnx(path: Path, *, training: int = 0, extra: bool = False, mean: float = 0.5) -> Path:
    """Conv → BatchNormalization, as an exporter in training mode would write it or not."""
    package = pytest.importorskip("onnx")
    make, numpy = package.helper, package.numpy_helper
    held = {"bn.weight": 1.2, "bn.bias": 0.1, "bn.running_mean": mean, "bn.running_var": 2.0}
    tensors = [numpy.from_array(torch.tensor([v, 2 * v]).numpy(), name) for name, v in held.items()]
    tensors.append(numpy.from_array(torch.ones(2, 3, 1, 1).numpy(), "conv.weight"))
    outputs = ["y", "new_mean", "new_var"] if extra else ["y"]
    nodes = [
        make.make_node("Conv", ["x", "conv.weight"], ["c"]),
        make.make_node(
            "BatchNormalization",
            ["c", *held],
            outputs,
            name="/bn/Norm",
            epsilon=1e-3,
            momentum=0.99,
            training_mode=training,
        ),
    ]
    values = [
        make.make_tensor_value_info(n, package.TensorProto.FLOAT, ["n", c, 4, 4]) for n, c in (("x", 3), ("y", 2))
    ]
    model = make.make_model(make.make_graph(nodes, "g", values[:1], values[1:], tensors))
    package.save(model, str(path))
    return path


def rules(path: Path) -> list[str]:
    return [finding.rule for finding in diagnose_file(path).findings]


def held(model: nn.Module) -> dict[str, tuple[float, ...]]:
    return {
        site.name: tuple(torch.cat([t.double() for t in site.tensors or ()]).tolist())
        for site in find_sites(model)
        if site.kind == "batch"
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_give_the_layers_that_the_model_has(net: Net, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"net{suffix}"
    write(net, file, provenance={})
    contents = read_contents(file)
    assert held(skeleton(contents.norms)) == held(net)
    diagnosis = diagnose_file(file)
    assert diagnosis.healthy
    assert diagnosis.findings == ()
    assert "nothing of eps" in diagnosis.notes[-1]
    assert all(norm.training is None and norm.eps is None for norm in contents.norms)


def test_what_is_wrong_with_weights_is_found_without_the_code(net: Net, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["bn.running_var"][2] = float("nan")
    state["last.running_mean"].zero_()
    state["last.running_var"].fill_(1)
    state["inner.1.running_mean"], state["inner.1.running_var"] = (
        state[f"inner.1.{key}"].half() for key in ("running_mean", "running_var")
    )
    state["inner.1.num_batches_tracked"] = state["inner.1.num_batches_tracked"].float()
    write(state, tmp_path / "sick.safetensors", provenance={})
    found = {(f.rule, f.site) for f in diagnose_file(tmp_path / "sick.safetensors").findings}
    assert found >= {("BN108", "bn"), ("BN105", "last"), ("BN110", "inner.1"), ("BN202", "inner.1")}
    assert all(finding.fix_ is None for finding in diagnose_file(tmp_path / "sick.safetensors").findings)


def test_statistics_that_were_not_saved_are_missed(net: Net, tmp_path: Path) -> None:
    state = {name: value for name, value in net.named_parameters()}
    file = tmp_path / "parameters.safetensors"
    write({name: value.detach() for name, value in state.items()}, file, provenance={})
    diagnosis = diagnose_file(file)
    assert {f.site for f in diagnosis.findings if f.rule == "BN201"} == {
        "bn",
        "inner.1",
    }  # nothing tells that last is one
    assert "2 layers hold no running statistics" in diagnosis.notes[0]


def test_layer_norms_and_biased_convolutions_are_not_taken_for_batch_norms(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 4))
    write(model, tmp_path / "none.pt", provenance={})
    diagnosis = diagnose_file(tmp_path / "none.pt")
    assert (diagnosis.sites, diagnosis.healthy) == ((), True)


def test_the_root_itself_may_be_the_norm(tmp_path: Path) -> None:
    write(nn.BatchNorm2d(3), tmp_path / "root.pt", provenance={})
    assert [site.name for site in find_sites(skeleton(read_contents(tmp_path / "root.pt").norms))] == [""]


def test_a_program_in_evaluation_is_read_as_it_is(net: Net, tmp_path: Path) -> None:
    contents = read_contents(program(net, tmp_path / "net.pt2"))
    assert held(skeleton(contents.norms)) == held(net)
    by_name = {norm.name: norm for norm in contents.norms}
    assert [(n.eps, n.momentum, n.training) for n in by_name.values()] == [
        (1e-3, 0.01, False),
        (1e-5, 0.1, False),
        (1e-5, 0.1, False),
    ]
    assert [bool(by_name[name].carrier) for name in ("bn", "inner.1", "last")] == [True, True, False]
    findings = {finding.rule: finding for finding in diagnose_file(tmp_path / "net.pt2").findings}
    assert (findings["BN504"].value, findings["BN504"].severity) == (2.0, "info")


def test_a_program_in_training_is_an_error(net: Net, tmp_path: Path) -> None:
    found = diagnose_file(program(net, tmp_path / "net.pt2", training=True)).findings
    assert [f.site for f in found if f.rule == "BN502"] == ["bn", "inner.1", "last"]
    assert found[0].severity == "error"


def test_a_folded_program_has_nothing_left(net: Net, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    renorm.export(model, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8))
    assert rules(tmp_path / "m.pt2") == []


@pytest.mark.parametrize(
    ("how", "found"), [({}, ["BN504"]), ({"training": 1}, ["BN502"]), ({"extra": True}, ["BN502"])]
)
def test_onnx_graphs_are_read(tmp_path: Path, how: dict[str, Any], found: list[str]) -> None:
    file = onnx(tmp_path / "m.onnx", **how)
    (norm,) = read_contents(file).norms
    assert (norm.name, norm.eps, norm.momentum) == ("bn", pytest.approx(1e-3), pytest.approx(0.01))
    assert held(skeleton([norm])) == {"bn": (0.5, 1.0, 2.0, 4.0)}
    assert rules(file) == found


def test_onnx_with_impossible_statistics_is_an_error(tmp_path: Path) -> None:
    assert rules(onnx(tmp_path / "m.onnx", mean=float("nan")))[0] == "BN108"


def test_onnx_whose_statistics_are_computed_is_said_to_be_so(tmp_path: Path) -> None:
    package = pytest.importorskip("onnx")
    model = package.load(str(onnx(tmp_path / "m.onnx")))
    del model.graph.initializer[:]
    package.save(model, str(tmp_path / "m.onnx"))
    diagnosis = diagnose_file(tmp_path / "m.onnx")
    assert diagnosis.notes == ("the statistics of 1 batch norms are computed in the graph, not held",)


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not this at all" * 9)
    if name == "m.onnx":
        pytest.importorskip("onnx")
    with pytest.raises(CheckpointError, match=r"cannot be read as .* Export it again"):
        read_contents(tmp_path / name)


def test_a_program_without_its_graph_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/models/other.json", json.dumps({}))
    with pytest.raises(CheckpointError, match=r"torch 2\.9 and later"):
        read_contents(tmp_path / "m.pt2")


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model file"):
        read_contents(tmp_path / "absent.onnx")
    with pytest.raises(UsageError, match="Give one of these, or the model"):
        read_contents(tmp_path / "m.tflite")


# ── on the command line ──


def test_a_checkpoint_alone_is_examined(net: Net, folder: Path, command: Any) -> None:
    write(net, folder / "net.safetensors", provenance={})
    ran: Ran = command("doctor --checkpoint net.safetensors")
    assert ran.code == 0, ran.err
    assert "3 batch norms, all with sound statistics" in ran.out
    assert command("doctor net.safetensors --format json").json["result"]["healthy"]
    state = {**net.state_dict(), "bn.running_var": torch.full((6,), -1.0)}
    write(state, folder / "bad.safetensors", provenance={})
    ran = command("doctor --checkpoint bad.safetensors")
    assert ran.code == 1
    assert "BN108" in ran.out
    assert command("doctor bad.safetensors --ignore.BN108 known").code == 0


def test_what_needs_the_model_is_refused_for_a_file_alone(net: Net, folder: Path, command: Any) -> None:
    write(net, folder / "net.safetensors", provenance={})
    refused(command("doctor"), "needs MODEL, or --checkpoint FILE alone")
    for words in ("net.safetensors digits", "--checkpoint net.safetensors --fix -o o.pt", "net.safetensors --source f"):
        refused(command(f"doctor {words}"), "which needs the model")


@pytest.mark.parametrize("weights", ["resnet20-12fca82f.th", "resnet8_cifar10.pt", "mobilenet025_vww.pt"])
def test_real_checkpoints_alone_are_healthy(weights: str) -> None:
    diagnosis = diagnose_file(shared(f"weights/{weights}"))
    assert diagnosis.healthy
    assert len(diagnosis.sites) in (7, 19, 27)
