"""checkpoints: no code of a file is run, all of it loads or nothing, and what is written loads elsewhere."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from renorm.checkpoints import load_, read, read_weights, writable, write
from renorm.errors import CheckpointError, FileExists, UsageError
from renorm.provenance import fingerprint, provenance
from tests.data import shared


def small(classes: int = 3, *, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2), flat=nn.Flatten(), fc=nn.Linear(2, classes))
        )


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


ORIGIN = provenance(command="renorm recalibrate", model="m", data="d")


class Malice:
    """Unpickling this would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


# ── reading ──


def test_a_legacy_file_saved_from_a_gpu_and_from_dataparallel_loads() -> None:
    path = shared("weights/resnet20-12fca82f.th")
    spec = importlib.util.spec_from_file_location("shared_nets", shared("nets.py"))
    assert spec is not None
    assert spec.loader is not None
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    model = nets.resnet20()
    report = load_(model, path)
    assert report.count == 97  # 20 convolutions, 19 BN of four tensors, the head's bias
    assert report.notes == (
        "left aside beside 'state_dict': best_prec1",
        "19 counters or extra states stand on one side only; the model's were kept",
    )
    assert not report.missing
    assert all(value.device.type == "cpu" for value in read(path).values())
    assert "conv1.weight" in read(path)


def test_a_cuda_storage_in_a_file_is_read_to_the_cpu(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    # the legacy format names the device of each storage as a short string
    data = path.read_bytes()
    short, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert data.count(short) == 1
    path.write_bytes(data.replace(short, cuda))
    assert read(path)["a"].device.type == "cpu"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = small()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    other = small(seed=1)
    load_(other, path)
    assert fingerprint(other) == fingerprint(model)


def test_a_bare_file_loads_into_wrapped_models(tmp_path: Path) -> None:
    model = small()
    path = saved(tmp_path / "w.pt", model.state_dict())
    wrapped = [
        nn.DataParallel(small(seed=1)),
        torch.compile(small(seed=1)),
        torch.optim.swa_utils.AveragedModel(small(seed=1)),
    ]
    for other in wrapped:
        load_(other, path)  # type: ignore[arg-type]
        assert fingerprint(other) == fingerprint(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_containers_are_opened_and_the_rest_is_named(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "w.pt", {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: small().state_dict()})
    weights = read_weights(path)
    assert set(weights.state) == set(small().state_dict())
    assert weights.notes == (f"left aside beside {key!r}: epoch, args",)


def test_an_average_is_taken_and_said_unless_refused(tmp_path: Path) -> None:
    ema, plain = {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    path = saved(tmp_path / "w.pt", {"state_dict": plain, "state_dict_ema": ema, "optimizer": {"state": {}}})
    weights = read_weights(path)
    assert weights.state["a"] == 1
    assert weights.notes[0] == "took 'state_dict_ema'; the file holds 'state_dict' too"
    weights = read_weights(path, averaged=False)
    assert weights.state["a"] == 0
    assert weights.notes[0] == "took 'state_dict'; the file holds 'state_dict_ema' too"


def test_an_averaged_model_and_a_nested_average_are_read(tmp_path: Path) -> None:
    model = torch.optim.swa_utils.AveragedModel(small())
    path = saved(tmp_path / "w.pt", {"ema": {"decay": 0.99, "shadow": model.state_dict()}, "model": {}})
    assert set(read(path)) == set(small().state_dict())


def test_entries_that_are_no_tensors_are_dropped_and_counted(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"a": torch.ones(1), "epoch": 3, 5: torch.ones(1)})
    weights = read_weights(path)
    assert list(weights.state) == ["a"]
    assert weights.notes == ("dropped 2 entries that are no tensors",)


# ── refusing ──


@pytest.mark.parametrize("form", ["raw", "zip", "legacy", "beside weights"])
def test_a_pickle_is_refused_without_running_it(tmp_path: Path, form: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "w.pt"
    content = {"state_dict": {"a": torch.ones(1)}, "x": Malice(trace)} if form == "beside weights" else Malice(trace)
    if form == "raw":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        saved(path, content, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(
        CheckpointError, match=r"(?s)\((posix|nt)\.system\), which may run code.*never unpickles.*re-save"
    ):
        read(path)
    assert not trace.exists()


def test_a_whole_model_is_refused_with_a_way_out_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.pt", small())
    with pytest.raises(
        CheckpointError, match=r"holds Python objects \(torch\.nn\.modules\.container\.Sequential\)"
    ) as e:
        read(path)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in str(e.value).splitlines()[-2:]), {})
    assert set(read(tmp_path / "weights.pt")) == set(small().state_dict())


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is no checkpoint", b"PK\x03\x04 half a zip", b"<!DOCTYPE html><html></html>"]
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} \({len(content)} bytes\) is damaged, or neither .* again\."):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w"
    if kind == "safetensors":
        save_file(small().state_dict(), path)
    else:
        saved(path, small().state_dict(), _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="is damaged, or neither"):
        read(path)


def test_other_unusable_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint file .*nowhere\.pt\. Correct the path"):
        read(tmp_path / "nowhere.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, not weights.*git lfs pull"):
        read(tmp_path / "lfs.pt")
    with pytest.raises(CheckpointError, match=r"holds a list, not tensors by name\. Save model\.state_dict\(\)"):
        read(saved(tmp_path / "list.pt", [torch.ones(1)]))
    with pytest.raises(CheckpointError, match=r"holds no tensors \(found: epoch, lr\)"):
        read(saved(tmp_path / "none.pt", {"epoch": 1, "lr": 0.1}))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_torchscript_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript program.*torch\.jit\.load\(.*\)\.state_dict\(\)"):
        read(tmp_path / "w.pt")


# ── loading ──


def refused(model: nn.Module, path: Path) -> str:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="nothing was loaded") as caught:
        load_(model, path)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    return str(caught.value)


def test_another_head_is_recognised(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", small(5).state_dict())
    assert refused(small(3), path).splitlines()[1:] == [
        "  2 of another shape: fc.weight (5, 2), here (3, 2); fc.bias (5,), here (3,)",
        "  Only fc differs, 5 outputs against 3: build the model with num_classes=5.",
    ]


def test_a_checkpoint_of_another_model_is_listed_by_kind_on_one_screen(tmp_path: Path) -> None:
    state = {**small().state_dict(), **{f"more.{k}": torch.ones(1) for k in range(100)}, "conv.weight": torch.ones(7)}
    del state["conv.bias"]
    message = refused(small(), saved(tmp_path / "w.pt", state))
    assert "w.pt does not fit Sequential" in message
    assert "1 missing in the file: conv.bias\n" in message
    assert "100 unexpected in the file: more.0, more.1, more.2, more.3, more.4, … (95 more)\n" in message
    assert "1 of another shape: conv.weight (7,), here (2, 1, 3, 3)\n" in message
    assert "strict=False" in message
    assert len(message.splitlines()) < 10


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    assert "Not one name is shared" in refused(small(), saved(tmp_path / "w.pt", {"other": torch.ones(1)}))


def test_what_fits_loads_when_not_strict(tmp_path: Path) -> None:
    source = small(5)
    state = {**source.state_dict(), "more": torch.ones(1)}
    del state["bn.bias"]
    model = small(3, seed=1)
    report = load_(model, saved(tmp_path / "w.pt", state), strict=False)
    assert report.missing == ("bn.bias",)
    assert report.unexpected == ("more",)
    assert report.shapes == {"fc.weight": ((5, 2), (3, 2)), "fc.bias": ((5,), (3,))}
    assert report.count == 6
    assert torch.equal(model.conv.weight, source.conv.weight)


def test_missing_counters_are_tolerated_and_said(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["bn.num_batches_tracked"]
    model = small(seed=1)
    model.bn.num_batches_tracked += 7  # type: ignore[operator]
    report = load_(model, saved(tmp_path / "w.pt", state))
    assert report.notes == ("1 counters or extra states stand on one side only; the model's were kept",)
    assert model.bn.num_batches_tracked == 7


def test_a_tensor_with_two_names_may_have_either_in_the_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = copy.deepcopy(model.state_dict())
    del state["b.weight"]
    report = load_(model, saved(tmp_path / "w.pt", state))
    assert report.missing == ()


def test_a_lazy_model_takes_its_shapes_from_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d())
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).state_dict()
    load_(model, saved(tmp_path / "w.pt", state))
    assert fingerprint(model) == fingerprint(state)


# ── writing ──


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_what_is_written_loads_with_its_origin(tmp_path: Path, suffix: str) -> None:
    model = small()
    path = tmp_path / f"w{suffix}"
    write(nn.DataParallel(model), path, provenance=ORIGIN)
    other = small(seed=1)
    report = load_(other, path)
    assert fingerprint(other) == fingerprint(model)
    assert report.provenance == ORIGIN
    assert report.notes == ()
    if suffix == ".safetensors":
        small(seed=1).load_state_dict(load_file(path))
    else:
        small(seed=1).load_state_dict(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_shared_and_strided_tensors_are_written_under_each_name(tmp_path: Path, suffix: str) -> None:
    one = torch.arange(6.0).reshape(2, 3)
    state: dict[str, Tensor] = {"a": one, "b": one, "row": one[0], "turned": one.t()}
    write(state, tmp_path / f"w{suffix}", provenance={})
    back = read(tmp_path / f"w{suffix}")
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_nothing_is_written_over_or_half(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExists, match="stands there already"):
        write(small(), path, provenance=ORIGIN)
    with pytest.raises(TypeError, match=r"not serializable|must be"):
        write(small(), path, provenance={("not", "json"): 1}, force=True)
    assert path.read_bytes() == b"old"
    write(small(), path, provenance=ORIGIN, force=True)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_an_unknown_suffix_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"out\.onnx: weights are written as \.safetensors, \.pt, \.pth"):
        writable(tmp_path / "out.onnx")
    with pytest.raises(UsageError, match="there is no folder"):
        writable(tmp_path / "nowhere" / "out.pt")


def test_an_origin_that_is_not_ours_is_no_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"provenance": "a lab in Lund"})
    assert read_weights(tmp_path / "w.safetensors").provenance is None
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"provenance": json.dumps({"by": "us"})})
    assert read_weights(tmp_path / "w.safetensors").provenance == {"by": "us"}
