"""Adapters: small, exact, and refused where they do not belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from renorm.adapters import load_adapter_, save_adapter
from renorm.errors import CheckpointError, FileExists, OpenChange, UsageError
from renorm.finetune import finetune_
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites
from tests import zoo
from tests.contracts.photograph import differences, photograph
from tests.test_finetune import data, net, weights

CARRIED = [
    p
    for p in zoo.cases(without=("lazy", "keras", "compiled", "group"))
    if p.id not in ("no-norm", "quantisation-aware")
]


def test_an_adapter_makes_of_the_base_the_model_it_was_saved_from(tmp_path: Path) -> None:
    tuned = net()
    finetune_(tuned, data(), policy="affine-and-head", epochs=2, head="new", classes=["a", "b", "c"], lr=0.05)
    size = save_adapter(tuned, tmp_path / "a.safetensors")
    assert size == (tmp_path / "a.safetensors").stat().st_size
    base = net()
    before = photograph(base)
    adapter = load_adapter_(base, tmp_path / "a.safetensors")
    x = data()[0][0]
    assert torch.equal(base(x), tuned(x))
    assert set(adapter.names) == {
        f"{n}.{k}" for n in (1, 4) for k in ("weight", "bias", "running_mean", "running_var")
    } | {
        "9.weight",
        "9.bias",
    }
    assert (adapter.outputs, adapter.origin["command"]) == (3, "save_adapter")
    adapter.restore_()
    adapter.restore_()
    assert differences(before, photograph(base)) == []


def test_a_head_of_other_classes_comes_along_and_goes_again(tmp_path: Path) -> None:
    tuned = net(10)
    tuned.pretrained_cfg = {"label_names": tuple("0123456789")}
    finetune_(tuned, data(), policy="affine-and-head", epochs=1, classes=["x", "y", "z"])
    save_adapter(tuned, tmp_path / "a.safetensors")
    base = net(10)
    base.pretrained_cfg = {"label_names": tuple("0123456789")}
    before, old = photograph(base), base[9]
    adapter = load_adapter_(base, tmp_path / "a.safetensors")
    assert (base[9].out_features, adapter.classes) == (3, ("x", "y", "z"))
    assert base.pretrained_cfg["label_names"] == ("x", "y", "z")
    later = recalibrate_(base, data())
    with pytest.raises(OpenChange, match="recalibrate_ came after it"):
        adapter.restore_()
    later.restore_()
    adapter.restore_()
    assert base[9] is old
    assert differences(before, photograph(base)) == []


@pytest.mark.parametrize("case", CARRIED)
def test_every_model_of_the_zoo_takes_its_own_adapter_back(case: zoo.Case, tmp_path: Path) -> None:
    model = case.build()
    save_adapter(model, tmp_path / "own.safetensors")
    before = photograph(model)
    with torch.no_grad():
        for site in find_sites(model):
            for tensor in (*site.affine.values(), *(site.tensors or ())):
                tensor.add_(1.0)
    adapter = load_adapter_(model, tmp_path / "own.safetensors")
    assert differences(before, photograph(model)) == []
    adapter.restore_()
    changed = differences(before, photograph(model))
    assert changed or not any(site.affine or site.tensors for site in find_sites(model))


def test_a_transformers_layer_norms_are_an_adapter_too(tmp_path: Path) -> None:
    model = zoo.named("tokens").build()
    save_adapter(model, tmp_path / "a.safetensors")
    adapter = load_adapter_(zoo.named("tokens").build(), tmp_path / "a.safetensors")
    assert {name.split(".")[0] for name in adapter.names} == {"1", "4", "7", "9"}


def test_loading_looks_for_norm_layers_as_often_in_a_deep_net_as_in_a_shallow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from renorm import adapters

    looks, looked = [], adapters.find_sites
    monkeypatch.setattr(adapters, "find_sites", lambda model: looks.append(model) or looked(model))
    for depth in (2, 20):
        model = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(depth)), nn.Linear(4, 3)
        )
        save_adapter(model, tmp_path / f"{depth}.safetensors")
        looks.clear()
        load_adapter_(model, tmp_path / f"{depth}.safetensors")
        assert len(looks) <= 4


def test_another_base_is_refused_and_untouched(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(net(), file)
    other = net()
    nn.init.zeros_(other[0].bias)
    before = weights(other)
    with pytest.raises(
        CheckpointError, match="the layers are the same, but the weights beside norm layers and head are not"
    ):
        load_adapter_(other, file)
    assert weights(other) == before
    with pytest.raises(CheckpointError, match=r"made for another base: it has no 1\.bias"):
        load_adapter_(zoo.named("root").build(), file)
    wider = nn.Sequential(*net(), nn.BatchNorm1d(3))
    with pytest.raises(CheckpointError, match=r"another base: its 10\.weight is not in the file"):
        load_adapter_(wider, file)
    save_adapter(narrow := net(), tmp_path / "narrow.safetensors")
    narrow[1] = nn.BatchNorm2d(5)
    with pytest.raises(CheckpointError, match=r"holds 1\.bias of shape \(4,\), and the model's is \(5,\)"):
        load_adapter_(narrow, tmp_path / "narrow.safetensors")


def test_files_that_are_no_adapters_and_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as an adapter"):
        load_adapter_(net(), tmp_path / "absent.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="is no adapter: save_adapter did not write it"):
        load_adapter_(net(), tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match=r"an adapter is a \.safetensors file"):
        save_adapter(net(), tmp_path / "a.pt")
    with pytest.raises(FileExists, match="stands there already"):
        save_adapter(net(), tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="has no norm layer that an adapter could keep"):
        save_adapter(nn.Linear(2, 2), tmp_path / "b.safetensors")
