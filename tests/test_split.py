"""split: the head and the stages of nets from every library, told by names alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from renorm.errors import UnknownName, UsageError
from renorm.sites import parameters_of
from renorm.split import Split, split
from tests import zoo
from tests.contracts.photograph import differences, photograph, process

TIMM = {
    "resnet18": ("fc",),
    "convnext_atto": ("head.fc",),
    "vit_tiny_patch16_224": ("head",),
    "efficientnet_b0": ("classifier",),
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
    "levit_128s": ("head.linear", "head_dist.linear"),
    "densenet121": ("classifier",),
}
TORCHVISION = {
    "resnet18": ("fc",),
    "mobilenet_v3_small": ("classifier.3",),
    "squeezenet1_1": ("classifier.1",),
    "convnext_tiny": ("classifier.2",),
    "vit_b_32": ("heads.head",),
    "googlenet": ("fc", "aux1.fc2", "aux2.fc2"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_says_itself_what_its_head_is(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        found = split(timm.create_model(name))
    assert found.head == TIMM[name]
    assert len(found.stages) >= 4


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_nets_end_where_their_logits_are_made(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        found = split(models.get_model(name, weights=None, **options))
    assert found.head == TORCHVISION[name]
    assert len(found.stages) >= 4


def test_segmentation_nets_have_an_auxiliary_head_too() -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    with torch.device("meta"):
        found = split(models.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True))
    assert found.head == ("classifier.4", "aux_classifier.4")


def test_transformers_nets_have_as_head_what_stands_beside_the_base_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    assert split(model).head == ("classifier",)
    assert split(model).stages[1:] == tuple((f"resnet.encoder.stages.{i}",) for i in range(4))
    assert split(model.resnet).head == ()


def test_a_model_of_that_shape_needs_no_transformers() -> None:
    class Net(nn.Module):
        base_model_prefix = "body"
        config: Any = None

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.dropout = nn.Dropout()
            self.score = nn.Linear(2, 3)

    assert split(Net()).head == ("score",)
    del Net.base_model_prefix
    net = Net()
    assert split(net).head == ("score",)  # the last linear layer
    net.base_model_prefix = "elsewhere"  # type: ignore[assignment]
    assert split(net).head == ()


def test_the_stages_of_a_resnet() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        found = split(timm.create_model("resnet18"))
    assert found.stages == (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    assert [found.stage_of(n) for n in ("bn1.weight", "layer1.0.conv1.weight", "layer4", "fc.bias")] == [0, 1, 4, 5]
    assert found.is_head("fc.weight")
    assert not found.is_head("fcs.weight")


def test_what_stands_beside_the_stages_counts_to_the_first_of_its_module() -> None:
    found = Split(head=("head",), stages=(("stem",), ("body.0",), ("body.1",)))
    assert found.stage_of("position") == 0
    assert found.stage_of("body.token") == 1
    assert found.stage_of("body.1.conv") == 2
    assert Split(head=(), stages=()).stage_of("anything") == 0


@pytest.mark.parametrize("case", zoo.cases())
def test_every_parameter_has_its_stage_and_nothing_changes(case: zoo.Case) -> None:
    model = case.build()
    names = list(parameters_of(model))
    before, around = photograph(model), process()
    found = split(model)
    assert differences(before, photograph(model)) == []
    assert process() == around
    stages = {found.stage_of(name) for name in names}
    assert stages <= set(range(len(found.stages) + 1))
    assert any(found.is_head(name) for name in names) == bool(found.head)
    parts = [part for stage in found.stages for part in stage]
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize("case", zoo.cases(only=("wrapped",)))
def test_a_wrapped_model_is_split_as_the_model_inside(case: zoo.Case) -> None:
    assert split(case.build()).head == ("8",)


def test_a_head_can_be_named() -> None:
    model = zoo.named("bn2d").build()
    assert split(model, head="3").head == ("3",)
    assert split(model, head=["3", "8"]).stages == (("0", "1", "4"),)
    with pytest.raises(UnknownName, match="there is no module for the head 'heat'"):
        split(model, head="heat")
    with pytest.raises(UsageError, match="the head was said to be '2', a ReLU without parameters"):
        split(model, head="2")
