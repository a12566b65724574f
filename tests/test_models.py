"""models: every form of name, and for every way to get it wrong one message that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from renorm.checkpoints import write
from renorm.errors import CheckpointError, MissingExtra, ModelError, UnknownName, UsageError
from renorm.models import load_model, open_model
from renorm.preprocessing import Preprocessing
from renorm.provenance import fingerprint
from tests.data import shared

NETS = """
import torch
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Sizes:
    width: int = WIDTH

class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.bn = nn.BatchNorm1d(Sizes().width)
        self.fc = nn.Linear(Sizes().width, num_classes)
    def forward(self, x):
        return self.fc(self.bn(x))

ready = Net(5)

def small(): return Net()
def sized(num_classes=7): return Net(num_classes)
def needs(depth): return Net()
def breaks(): return [][0]
def deep():
    return helper()
def helper(): raise ValueError("the weights are not here")
def leaves(): raise SystemExit(3)
def wrong(): return {"fc.weight": 1}
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


@pytest.fixture(autouse=True)
def _forget_modules() -> object:
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("renorm_model", "neighbour", "pack", "broken")):
            del sys.modules[name]
    assert sys.path == path


# ── factories ──


@pytest.mark.parametrize(("name", "classes"), [("small", 3), ("Net", 3), ("sized", 7), ("ready", 5)])
def test_a_factory_class_or_model_of_a_file_is_a_model_in_eval_mode(nets: Path, name: str, classes: int) -> None:
    model = load_model(f"{nets}:{name}")
    assert model(torch.zeros(2, 4)).shape == (2, classes)
    assert not any(module.training for module in model.modules())
    assert not (nets.parent / "__pycache__").exists()


def test_num_classes_goes_to_a_factory_that_takes_it(nets: Path) -> None:
    assert load_model(f"{nets}:Net", num_classes=11).fc.out_features == 11
    with pytest.raises(UsageError, match=r":small takes no num_classes\. Leave it away"):
        load_model(f"{nets}:small", num_classes=11)
    with pytest.raises(UsageError, match="is a model already, num_classes=11 cannot"):
        load_model(f"{nets}:ready", num_classes=11)


def test_a_module_of_a_package_is_found_from_the_current_folder(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nets.parent / "pack").mkdir()
    (nets.parent / "pack" / "__init__.py").write_text("")
    nets.rename(nets.parent / "pack" / "nets.py")
    monkeypatch.chdir(nets.parent)
    assert isinstance(load_model("pack.nets:small"), nn.Module)
    with pytest.raises(UnknownName, match=r"no factory in pack\.nets: 'smal'; did you mean 'small'"):
        load_model("pack.nets:smal")


def test_a_model_given_as_such_is_copied(nets: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    loaded = load_model(model)
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded is not model
    assert not loaded.training
    assert open_model(lambda: model).spec == "<lambda>"


def test_a_missing_factory_lists_those_of_the_file(nets: Path) -> None:
    with pytest.raises(UnknownName, match=r"no factory in .*nets\.py: 'smal'; did you mean 'small'\?") as caught:
        load_model(f"{nets}:smal")
    assert caught.value.known == (
        *("Net", "Sizes", "breaks", "deep", "helper", "leaves", "needs", "ready", "sized", "small", "wrong"),
    )
    with pytest.raises(
        UsageError, match=r"nets\.py names no factory\. Known: Net, .*small, wrong\. Use .*nets\.py:NAME"
    ):
        load_model(str(nets))


def test_a_factory_that_fails_is_reported_with_its_line(nets: Path) -> None:
    with pytest.raises(
        ModelError, match=r":breaks failed: IndexError: list index out of range \(nets\.py, line \d+\)\."
    ):
        load_model(f"{nets}:breaks")
    line = NETS.splitlines().index('def helper(): raise ValueError("the weights are not here")') + 1
    with pytest.raises(ModelError, match=rf"ValueError: the weights are not here \(nets\.py, line {line}\)\."):
        load_model(f"{nets}:deep")
    with pytest.raises(ModelError, match=r":leaves failed: SystemExit: 3"):
        load_model(f"{nets}:leaves")
    with pytest.raises(ModelError, match=r"missing 1 required .* 'depth'\. It is called without arguments: write"):
        load_model(f"{nets}:needs")
    with pytest.raises(ModelError, match=r"returned a dict, not a torch\.nn\.Module\. A state goes into a checkpoint"):
        load_model(f"{nets}:wrong")


def test_errors_of_renorm_inside_a_factory_pass_as_they_are(nets: Path) -> None:
    nets.write_text("from renorm.errors import DataError\ndef f():\n    raise DataError('mine')\n")
    with pytest.raises(ValueError, match=r"^mine$"):
        load_model(f"{nets}:f")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nosuchpackage", r"ModuleNotFoundError: No module named 'nosuchpackage' \(nets\.py, line 1\)"),
        ("\ndef f(:", r"SyntaxError: .*line 2"),
        ("x = 1\nexit(2)", r"SystemExit: 2 \(nets\.py, line 2\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_reported_in_one_line(nets: Path, code: str, message: str) -> None:
    nets.write_text(code)
    with pytest.raises(ModelError, match=rf"nets\.py cannot be imported: {message}") as caught:
        load_model(f"{nets}:f")
    assert "\n" not in str(caught.value)
    assert "renorm_model_nets" not in sys.modules


def test_files_and_modules_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no file nowhere\.py\. Correct the path"):
        load_model("nowhere.py:f")
    with pytest.raises(ModelError, match=r"there is no file y+\.py\. Correct the path"):
        load_model("y" * 5000 + ".py:net")
    with pytest.raises(ModelError, match=r"no module 'nosuchpackage' in the current folder or among the installed"):
        load_model("nosuchpackage.nets:f")
    (tmp_path / "broken.py").write_text("import nosuchpackage")
    with pytest.raises(ModelError, match=r"broken cannot be imported: it needs nosuchpackage, which is not installed"):
        load_model("broken:f")
    (tmp_path / "broken2.py").write_text("1 / 0")
    with pytest.raises(ModelError, match=r"broken2 cannot be imported: ZeroDivisionError"):
        load_model("broken2:f")


def test_names_of_no_known_form_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'resnet18' names no model; did you mean 'timm:resnet18'\? Use timm:NAME, "):
        load_model("resnet18")
    with pytest.raises(UsageError, match=r"'zzz' names no model\. Use"):
        load_model("zzz")


# ── checkpoints ──


def test_a_checkpoint_is_loaded_and_reported(nets: Path) -> None:
    source = load_model(f"{nets}:sized")
    path = nets.parent / "w.safetensors"
    write(source, path, provenance={"command": "test"})
    model = open_model(f"{nets}:sized", checkpoint=path)
    assert fingerprint(model.module) == fingerprint(source)
    assert model.checkpoint is not None
    assert model.checkpoint.provenance == {"command": "test"}
    with pytest.raises(CheckpointError, match="num_classes=7"):
        load_model(f"{nets}:small", checkpoint=path)


def test_pretrained_and_checkpoint_exclude_each_other(nets: Path) -> None:
    with pytest.raises(UsageError, match="pretrained weights and a checkpoint were both asked for"):
        load_model("timm:resnet18", pretrained=True, checkpoint="w.pt")
    with pytest.raises(UsageError, match="has no published weights that renorm could fetch"):
        load_model(f"{nets}:small", pretrained=True)


def test_the_networks_with_real_weights_open_by_name() -> None:
    path = shared("nets.py")
    model = open_model(f"{path}:resnet20", checkpoint=shared("weights/resnet20-12fca82f.th"))
    assert model.preprocessing == Preprocessing(
        input_size=(3, 32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert model.notes == (
        "left aside beside 'state_dict': best_prec1",
        "19 counters or extra states stand on one side only; the model's were kept",
    )
    assert model.classes is None


# ── zoos ──


def test_timm_models_are_random_from_one_seed_and_say_so() -> None:
    state = torch.get_rng_state()
    model = open_model("timm:resnet10t", num_classes=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.module.num_classes == 5
    assert not model.module.training
    assert model.preprocessing is not None
    assert model.preprocessing.input_size == (3, 176, 176)
    assert model.notes == ("weights are random (seed 0): give a checkpoint, or ask for the pretrained ones",)
    assert fingerprint(load_model("timm:resnet10t", num_classes=5)) == fingerprint(model.module)
    assert model.classes is None


def test_models_of_imagenet_know_its_classes() -> None:
    for spec in ("timm:resnet10t", "torchvision:squeezenet1_1"):
        classes = open_model(spec).classes
        assert classes is not None
        assert classes[:2] == ("n01440764", "n01443537")
        assert len(classes) == 1000
    assert open_model("torchvision:squeezenet1_1", num_classes=4).classes is None
    net = nn.Identity()
    net.pretrained_cfg = {"label_names": ["cat", "dog"]}  # type: ignore[assignment]
    assert open_model(net).classes == ("cat", "dog")


def test_a_torchvision_model_carries_the_preprocessing_of_its_weights() -> None:
    model = open_model("torchvision:squeezenet1_1", num_classes=4)
    assert model.preprocessing == Preprocessing(
        input_size=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        crop=0.875,
    )
    assert model.module(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_a_torchvision_model_of_another_task_fetches_nothing_and_states_no_preprocessing() -> None:
    model = open_model("torchvision:lraspp_mobilenet_v3_large")
    assert model.preprocessing is None
    assert "pixels become its input" in model.notes[-1]


def test_unknown_models_of_a_zoo_offer_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no timm model 'resnet51'; did you mean 'resnet5"):
        load_model("timm:resnet51")
    with pytest.raises(UnknownName, match=r"no timm model 'resnet18\.a1_in2k'; did you mean 'resnet18\.a1_in1k'"):
        load_model("timm:resnet18.a1_in2k")
    with pytest.raises(UnknownName, match=r"no torchvision model 'resnet19'; did you mean 'resnet1"):
        load_model("torchvision:resnet19")


def test_weights_that_cannot_be_fetched_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    message = (
        r"pretrained weights of .*resnet.* could not be fetched, nor are they in the cache .*give them as a checkpoint"
    )
    with pytest.raises(ModelError, match=message):
        load_model("torchvision:resnet18", pretrained=True)
    monkeypatch.setattr("timm.create_model", _no_network)
    with pytest.raises(ModelError, match=message):
        load_model("timm:resnet18", pretrained=True)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no route to host")


def test_a_zoo_that_cannot_build_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("bad width")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ModelError, match=r"timm:resnet18 could not be built: AssertionError: bad width\."):
        load_model("timm:resnet18")


def test_a_missing_zoo_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r'timm:resnet18 needs timm, .*"renorm\[images\]"'):
        load_model("timm:resnet18")
