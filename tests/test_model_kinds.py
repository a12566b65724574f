"""Models that are no plain classifier, through the verbs: detection, segmentation, Keras, compiled and wrapped ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm.cli import main
from renorm.models import load_model, open_model
from tests.contracts.photograph import differences, photograph
from tests.zoo import leave_group, lived

pytest.importorskip("torchvision")


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


# ── detection ──

Found = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    """SSDlite with random weights, with batch norms in its backbone and in its heads; images stay small."""
    model = load_model("torchvision:ssdlite320_mobilenet_v3_large", num_classes=3)
    model.transform.min_size, model.transform.max_size = (64,), 64
    model.transform.fixed_size = (64, 64)
    return lived(model)


def scenes(batches: int = 2, size: int = 3) -> list[tuple[list[Tensor], Found]]:
    """As a detector's loader gives them: lists of images of several sizes, and of boxes with labels."""
    box = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    return [
        ([photos(1, 10 * k + n)[0, :, : 64 - 4 * n] for n in range(size)], [dict(box) for _ in range(size)])
        for k in range(batches)
    ]


def recall(outputs: list[Found], labels: list[Found]) -> float:
    """The share of true boxes that some detection of any class covers by half (intersection over union)."""
    from torchvision.ops import box_iou

    hits = [
        float(box_iou(truth["boxes"], found["boxes"]).amax(1).ge(0.5).double().mean())
        for batch, answers in zip(outputs, labels, strict=True)
        for found, truth in zip(batch, answers, strict=True)
        if len(found["boxes"])
    ]
    return sum(hits) / max(1, len(hits))


def dense(model: nn.Module, batch: Any) -> list[Tensor]:
    """What a detector computes before it chooses boxes, whose number would differ from model to model."""
    images, _ = model.transform(batch[0] if isinstance(batch, tuple) else batch)
    heads = model.head(list(model.backbone(images.tensors).values()))
    return [heads["bbox_regression"], heads["cls_logits"]]


def test_a_detector_is_observed_recalibrated_and_undone(detector: nn.Module) -> None:
    before = photograph(detector)
    seen = renorm.observe(detector, scenes(), under="batch")
    names = [site.name for site in renorm.find_sites(detector) if site.kind == "batch"]
    assert list(seen) == names
    assert seen.samples == 6
    assert differences(before, photograph(detector)) == []
    adaptation = renorm.recalibrate_(detector, scenes(), include="backbone.*")
    backbone = [name for name in names if name.startswith("backbone.")]
    assert list(adaptation.shifts) == backbone
    assert 0 < len(backbone) < len(names)
    changed = {name.partition(":")[0] for name in differences(before, photograph(detector)) if ":" in name}
    assert changed == set(backbone)
    adaptation.restore_()
    assert differences(before, photograph(detector)) == []


def test_two_detectors_are_compared_before_they_choose_boxes(detector: nn.Module) -> None:
    other = copy.deepcopy(detector)
    assert renorm.verify(detector, other, scenes(), forward=dense).max_abs == 0
    renorm.recalibrate_(other, scenes(), include="backbone.*")
    gap = renorm.verify(detector, other, scenes(), forward=dense)
    assert gap.max_abs > 1e-3
    assert gap.first_site == "backbone.features.0.0.1"


def test_a_detector_is_scored_by_a_function_of_ones_own(detector: nn.Module) -> None:
    score = renorm.evaluate(detector, scenes(), metric=recall)
    with torch.no_grad():
        found = [detector(images) for images, _ in scenes()]
    assert score.value == recall(found, [boxes for _, boxes in scenes()])
    assert score.count == 6
    assert score.metric == "recall"
    with pytest.raises(renorm.RenormError, match=r"needs the model's logits, but its output is a list of 3; say which"):
        renorm.evaluate(detector, scenes())


def test_the_doctor_looks_at_a_detector(detector: nn.Module) -> None:
    assert renorm.diagnose(detector, scenes()).samples == 6


# ── segmentation ──


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    return lived(load_model("torchvision:lraspp_mobilenet_v3_large", num_classes=4))


def masks(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(5)
    return [(photos(count, k), torch.randint(4, (count, 64, 64), generator=rng)) for k in range(2)]


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    guess = logits.argmax(1)
    both = [((guess == k) & (labels == k)).sum() / ((guess == k) | (labels == k)).sum() for k in range(4)]
    return float(torch.stack(both).nan_to_num(0).mean())


def test_segmentation_through_every_verb(segmenter: nn.Module) -> None:
    before = photograph(segmenter)
    adaptation = renorm.recalibrate_(segmenter, masks(), include="backbone.*", prior=0)
    assert adaptation.shifts
    assert all(name.startswith("backbone.") for name in adaptation.shifts)
    other = load_model(segmenter)
    adaptation.restore_()
    assert differences(before, photograph(segmenter)) == []
    gap = renorm.verify(segmenter, other, masks(), output="out")
    assert gap.max_abs > 0
    assert gap.agreement is not None
    score = renorm.evaluate(segmenter, masks())
    with torch.no_grad():
        logits = torch.cat([segmenter(x)["out"] for x, _ in masks()])
    truth = torch.cat([y for _, y in masks()])
    assert score.value == pytest.approx(float((logits.argmax(1) == truth).double().mean()))
    own = renorm.evaluate(segmenter, masks(), metric=mean_iou, output="out")
    assert own.value == pytest.approx(mean_iou(logits, truth))
    assert own.interval[0] <= own.value <= own.interval[1] + 1e-6
    assert renorm.recalibrate_(segmenter, masks(), check=masks()).why.startswith("on 8 labelled check samples")


def test_verify_compares_the_part_that_output_names() -> None:
    class Two(nn.Module):
        def __init__(self, other: int) -> None:
            super().__init__()
            self.other = other

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": x * 2, "boxes": x[: self.other]}

    batches = [torch.randn(4, 3)]
    with pytest.raises(renorm.RenormError, match=r"different outputs: .* point output= at what they share"):
        renorm.verify(Two(1), Two(2), batches)
    assert renorm.verify(Two(1), Two(2), batches, output="out").max_abs == 0


def test_segmentation_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez(
        "scenes.npz",
        images=rng.integers(0, 256, (4, 64, 64, 3)).astype(np.uint8),
        labels=rng.integers(0, 4, (4, 64, 64)),
    )
    words = "torchvision:lraspp_mobilenet_v3_large scenes.npz --num-classes 4"
    assert main(f"evaluate {words} --format json".split()) == 0
    assert 0 < json.loads(capsys.readouterr().out)["result"]["value"] < 1
    assert main(f"recalibrate {words} -o new.safetensors".split()) == 0
    assert main(f"doctor {words} --checkpoint new.safetensors".split()) in (0, 1)


# ── Keras, compiled and wrapped ones, by the names that the command line takes ──

NETS = """
import os
import torch
from torch import nn

def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[1].running_mean.uniform_(-1, 1)
    return model.eval()

def compiled():
    return torch.compile(plain(), backend="eager")

def averaged():
    return torch.optim.swa_utils.AveragedModel(plain())

def parallel():
    return nn.DataParallel(plain())

def ddp():
    import torch.distributed as dist
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(plain())

def keras():
    import warnings
    warnings.simplefilter("ignore")
    import keras
    keras.backend.clear_session()  # or the next copy's layers are numbered on, as in dense_4
    keras.utils.set_random_seed(0)
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), norm, keras.layers.ReLU(), keras.layers.Dense(3)])
    norm.moving_mean.assign(torch.linspace(-1, 1, 8))
    return model
"""


@pytest.mark.filterwarnings("ignore:.*__array__.*copy keyword:DeprecationWarning")
@pytest.mark.parametrize("name", ["plain", "compiled", "averaged", "parallel", "ddp", "keras"])
def test_the_command_line_opens_mends_and_writes_them_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "keras":
        pytest.importorskip("keras")
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    np.savez("far.npz", x=rng.normal(5, 3, (80, 6)).astype(np.float32), y=rng.integers(0, 3, 80))
    try:
        before = load_model(f"nets.py:{name}")
        assert main(f"recalibrate nets.py:{name} far.npz -o new.safetensors --prior 0 --batch-size 80".split()) == 0
        capsys.readouterr()
        after = open_model(f"nets.py:{name}", checkpoint="new.safetensors").module
        (site,) = [site for site in renorm.find_sites(after) if site.kind == "batch"]
        batches = list(torch.from_numpy(np.load("far.npz")["x"]).split(40))
        seen = renorm.observe(after, [torch.cat(batches)], under="batch")
        assert renorm.Shift.between(seen[site.name].values, site.statistics(), eps=1e-3).layer.mean_gap < 1e-4
        assert renorm.verify(before, after, batches).max_abs > 0.1
        assert renorm.evaluate(after, [(torch.cat(batches), torch.from_numpy(np.load("far.npz")["y"]))]).count == 80
        assert main(f"doctor nets.py:{name} far.npz".split()) == 1
        assert main(f"evaluate nets.py:{name} far.npz --checkpoint new.safetensors".split()) == 0
    finally:
        leave_group()
        torch._dynamo.reset()


def test_a_loader_with_workers_is_read_like_any_other() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    images, labels = photos(48) * 5, torch.arange(48) % 4
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, num_workers=2)
    by_list = renorm.observe(model, list(images.split(16)), under="batch")["1"].values
    by_workers = renorm.observe(model, loader, under="batch")["1"].values
    assert torch.equal(by_list.mean, by_workers.mean)
    adaptation = renorm.recalibrate_(model, loader, check=loader, output=lambda out: out.mean((2, 3)))
    assert adaptation.samples == 48
    adaptation.restore_()
