"""export: what the file gives is what the model gives, or there is no file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from renorm.checkpoints import read_weights
from renorm.cli import main
from renorm.errors import BatchError, CheckpointError, FileExists, MissingExtra, ModelError, UsageError
from renorm.export import SUFFIXES, export, preflight
from renorm.fold import fold, load_folded_, was_folded
from renorm.provenance import fingerprint
from tests import zoo
from tests.contracts.photograph import differences, photograph, process
from tests.test_fold import Net
from tests.zoo import lived

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

IMAGE = (3, 6, 6)
every_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, named)]


def run_program(path: Path, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [torch.export.load(path).module()(*inputs)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(("suffix", "run"), [(".onnx", run_onnx), (".pt2", run_program)])
def test_the_file_runs_by_itself_on_any_number_of_samples(
    suffix: str, run: Callable[..., Sequence[Tensor]], folder: Path
) -> None:
    model, example = zoo.named("bn2d").build(), torch.randn(1, *IMAGE)
    before, around = photograph(model), process()
    result = export(model, folder / f"m{suffix}", example)
    assert differences(before, photograph(model)) == []
    assert process() == around
    assert result.max_rel_error < 1e-5
    assert result.format == suffix[1:]
    assert result.folded is not None
    assert result.folded.kept == {}
    assert result.notes == ()
    for samples in (1, 2, 5):
        x = torch.randn(samples, *IMAGE)
        with torch.no_grad():
            torch.testing.assert_close(run(folder / f"m{suffix}", x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_onnx_holds_no_norm_and_its_origin(folder: Path) -> None:
    model = zoo.named("bn2d").build()
    export(model, folder / "m.onnx", torch.randn(2, *IMAGE), origin={"command": "by hand", "who": "a test"})
    written = onnx.load(folder / "m.onnx")
    onnx.checker.check_model(written)
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}
    origin = json.loads({entry.key: entry.value for entry in written.metadata_props}["provenance"])
    assert origin["model"] == fingerprint(model)
    assert origin["folded"] == ["1", "4"]
    assert (origin["command"], origin["who"]) == ("by hand", "a test")
    assert origin["torch"] == torch.__version__


def test_a_program_and_weights_hold_their_origin(folder: Path) -> None:
    model = zoo.named("bn2d").build()
    for suffix in (".pt2", ".safetensors"):
        export(model, folder / f"m{suffix}", torch.randn(2, *IMAGE))
    extra = {"provenance": ""}
    torch.export.load(folder / "m.pt2", extra_files=extra)
    weights = read_weights(folder / "m.safetensors")
    assert weights.provenance is not None
    for origin in (json.loads(extra["provenance"]), weights.provenance):
        assert origin["model"] == fingerprint(model)
        assert origin["folded"] == ["1", "4"]
        assert origin["kept"] == {}


def test_weights_fit_the_folded_model(folder: Path) -> None:
    model = zoo.named("bn2d").build()
    x = torch.randn(2, *IMAGE)
    export(model, folder / "m.safetensors", x)
    again = fold(model, x).model
    for tensor in again.parameters():
        tensor.data.zero_()
    again.load_state_dict(read_weights(folder / "m.safetensors").state)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_folding_the_norms_are_in_the_file(folder: Path) -> None:
    model = zoo.named("bn2d").build()
    result = export(model, folder / "m.safetensors", torch.randn(2, *IMAGE), folds=False)
    assert result.folded is None
    assert "1.running_mean" in read_weights(folder / "m.safetensors").state


def test_a_model_without_norms_is_exported_too(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).eval()
    result = export(model, folder / "m.onnx", torch.randn(2, 5))
    assert result.folded is None
    x = torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(folder / "m.onnx", x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["two-inputs-by-name", "returns-dict", "returns-tuple", "data-parallel", "compiled"])
def test_models_of_every_face_are_exported(name: str, folder: Path) -> None:
    case = zoo.named(name)
    result = export(case.build(), folder / "m.onnx", case.batch())
    assert result.max_rel_error < 1e-5


def test_a_small_network_of_timm(folder: Path) -> None:
    timm = pytest.importorskip("timm")
    model = lived(timm.create_model("test_efficientnet", num_classes=5))
    for suffix in (".onnx", ".pt2"):
        result = export(model, folder / f"m{suffix}", torch.randn(2, 3, 64, 64))
        assert result.max_rel_error < 1e-4


def test_a_fixed_batch(folder: Path) -> None:
    model = lived(
        Net(lambda self, x: self.bn(self.conv(x)).reshape(3, -1), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    )
    x = torch.randn(3, *IMAGE)
    with pytest.raises(ModelError, match=r"torch\.export cannot trace Net: .*dynamic_batch=False"):
        export(model, folder / "m.pt2", x)
    assert list(folder.iterdir()) == []
    assert export(model, folder / "m.pt2", x, dynamic_batch=False).max_rel_error < 1e-5


# ── folded weights come back ──


def test_folded_weights_make_a_folded_model_of_the_one_they_came_from(folder: Path) -> None:
    pytest.importorskip("timm")
    model, x = zoo.named("timm-efficientnet").build(), torch.randn(2, 3, 32, 32)
    export(model, folder / "m.safetensors", x)
    again = zoo.named("timm-efficientnet").build()
    for tensor in again.parameters():
        tensor.data.zero_()
    loaded = load_folded_(again, folder / "m.safetensors")
    assert loaded.missing == ()
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert again.conv_stem.bias.requires_grad


def test_folded_weights_of_another_model_change_nothing(folder: Path) -> None:
    export(zoo.named("bn2d").build(), folder / "m.safetensors", torch.randn(2, *IMAGE))
    for name, why in (("look-alike", "with a norm at '1'|does not fit"), ("tokens", "with a norm at|does not fit")):
        model = zoo.named(name).build()
        before = photograph(model)
        with pytest.raises(CheckpointError, match=why):
            load_folded_(model, folder / "m.safetensors")
        assert differences(before, photograph(model)) == []
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"is of a model with a norm at '1', where this one has none"):
        load_folded_(model, folder / "m.safetensors")


def test_weights_that_were_not_folded_are_refused_as_such(folder: Path) -> None:
    model = zoo.named("bn2d").build()
    export(model, folder / "m.safetensors", torch.randn(2, *IMAGE), folds=False)
    assert not was_folded(folder / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not say which norms were folded"):
        load_folded_(model, folder / "m.safetensors")


# ── preflight ──


def test_the_preflight_remarks_what_a_reader_should_know() -> None:
    assert preflight(zoo.named("bn2d").build()) == ()
    assert preflight(nn.Linear(2, 2)) == ()
    assert "1 batch norms hold no statistics (1 first)" in preflight(zoo.named("no-statistics").build())[0]
    assert "never calibrated (0 first): mean 0, variance 1" in preflight(nn.Sequential(nn.BatchNorm1d(3)).eval())[0]
    assert "momentum is None at 1 batch norms (1 first)" in preflight(zoo.named("momentum-none").build())[0]


@every_suffix
def test_a_norm_in_training_mode_is_refused(suffix: str, folder: Path) -> None:
    model = zoo.named("mixed-modes").build()
    with pytest.raises(UsageError, match=r"1 of 2 batch norms are in training mode, 1 first.*model\.eval\(\)"):
        export(model, folder / f"m{suffix}", torch.randn(2, *IMAGE))
    assert list(folder.iterdir()) == []


# ── nothing half written ──


@every_suffix
def test_a_file_that_gives_other_answers_is_not_written_not_even_with_force(
    suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: nn.Module, path: Path, *rest: Any) -> Any:
        answers = right(model, path, *rest)
        return lambda call: [out + 1 for out in answers(call)]

    import sys

    writers = sys.modules["renorm.export"]._WRITERS
    right = writers[suffix]
    monkeypatch.setitem(writers, suffix, off)
    (folder / f"old{suffix}").write_bytes(b"mine")
    for name in ("new", "old"):
        with pytest.raises(ModelError, match=r"gives other answers than the model.*Nothing was written"):
            export(zoo.named("bn2d").build(), folder / f"{name}{suffix}", torch.randn(2, *IMAGE), force=True)
    assert [p.name for p in folder.iterdir()] == [f"old{suffix}"]
    assert (folder / f"old{suffix}").read_bytes() == b"mine"


@every_suffix
def test_an_existing_file_stays(suffix: str, folder: Path) -> None:
    file = folder / f"m{suffix}"
    file.write_bytes(b"mine")
    with pytest.raises(FileExists, match="stands there already"):
        export(zoo.named("bn2d").build(), file, torch.randn(2, *IMAGE))
    assert file.read_bytes() == b"mine"
    export(zoo.named("bn2d").build(), file, torch.randn(2, *IMAGE), force=True)
    assert file.read_bytes() != b"mine"


def test_another_suffix_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"models are exported as \.onnx, \.pt2, \.safetensors"):
        export(zoo.named("bn2d").build(), folder / "m.h5", torch.randn(2, *IMAGE))


def test_an_operation_that_onnx_lacks_is_named(folder: Path) -> None:
    model = Net(lambda self, x: torch.linalg.eigvals(self.fc(x)[:, :, :2] @ x.mT[:, :2]).abs(), fc=nn.Linear(5, 5))
    with pytest.raises(ModelError, match=r"Net cannot be written as ONNX: .*eig"):
        export(model.eval(), folder / "m.onnx", torch.randn(2, 2, 5))
    assert list(folder.iterdir()) == []


def test_a_model_that_cannot_be_traced_is_named(folder: Path) -> None:
    model = Net(lambda self, x: x * float(np.asarray(self.fc(x).detach().numpy()).sum()), fc=nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"torch\.export cannot trace Net"):
        export(model.eval(), folder / "m.pt2", torch.randn(2, 3))
    assert list(folder.iterdir()) == []


def test_a_missing_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"writing m\.onnx needs .*renorm\[export\]"):
        export(zoo.named("bn2d").build(), folder / "m.onnx", torch.randn(2, *IMAGE))


# ── the command line ──

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model[1].running_mean.uniform_(); model[1].running_var.uniform_(0.5, 2)
    return model

def unfoldable():
    return nn.Sequential(nn.Identity(), nn.BatchNorm2d(3))
"""


@pytest.fixture
def nets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    (folder / "nets.py").write_text(NETS)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "data.npz", images=images)
    np.savez(folder / "labelled.npz", images=images, labels=np.arange(6) % 2)
    return folder


def test_fold_writes_weights_and_says_what_went(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("fold nets.py:net data.npz -o folded.safetensors".split()) == 0
    assert "1 of 1 batch norms are folded" in capsys.readouterr().out
    weights = read_weights(nets / "folded.safetensors")
    assert "1.running_mean" not in weights.state
    assert weights.provenance is not None
    assert weights.provenance["folded"] == ["1"]
    assert main("evaluate nets.py:net labelled.npz --checkpoint folded.safetensors".split()) == 0
    capsys.readouterr()
    assert main("fold nets.py:net --input 3x8x8 -o again.pt --format json".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert list(result) == ["folded", "kept", "max_rel_error", "errors", "output", "notes"]


def test_nothing_to_fold_writes_nothing_and_says_why(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("fold nets.py:unfoldable --input 3x8x8 -o folded.safetensors".split()) == 1
    out = capsys.readouterr().out
    assert "No batch norm can be folded" in out
    assert "it reads the model's input" in " ".join(out.split())
    assert not (nets / "folded.safetensors").exists()


def test_export_writes_a_file_that_runs(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("export nets.py:net data.npz -o net.onnx".split()) == 0
    assert "Run from the file, its outputs differ by at most" in " ".join(capsys.readouterr().out.split())
    assert run_onnx(nets / "net.onnx", torch.randn(3, 3, 8, 8))[0].shape == (3, 2)
    origin = json.loads({e.key: e.value for e in onnx.load(nets / "net.onnx").metadata_props}["provenance"])
    assert origin["command"] == "renorm export nets.py:net data.npz -o net.onnx"
    words = "export nets.py:net --input 3x8x8 -o net.pt2 --keep-norms --fixed-batch --format json"
    assert main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["result"]["folded"] is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("fold nets.py:net -o x.pt", "does not say what its input looks like; give DATA, or --input"),
        ("fold nets.py:net --input 3,8,8 -o x.pt", "--input is the size of one sample, such as 3x224x224; got 3,8,8"),
        ("export nets.py:net --input 3x8x8 -o x.h5", "models are exported as .onnx, .pt2, .safetensors"),
        ("fold nets.py:net --input 3x8x8 -o x.onnx", "weights are written as .safetensors"),
    ],
)
def test_wrong_use_is_said(words: str, part: str, nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(nets.iterdir())
    assert main(words.split()) == 2
    assert part in " ".join(capsys.readouterr().err.split())
    assert sorted(p for p in nets.iterdir() if p.name != "__pycache__") == before


def test_the_size_of_the_input_is_the_models_own(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main("fold timm:test_resnet -o folded.pt".split()) == 0
    assert "15 of 15" in capsys.readouterr().out


@pytest.mark.parametrize("folds", [True, False])
def test_an_example_without_values_is_refused_and_nothing_is_written(folds: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(BatchError, match="on the meta device, where tensors have no values"):
        export(model, tmp_path / "m.pt2", torch.ones(2, 3, 8, 8, device="meta"), folds=folds)
    with pytest.raises(UsageError, match="weights have no values"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("meta"), torch.ones(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []
