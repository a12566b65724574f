"""Tables and signals: a network trained on the first batches or some patients, recalibrated to those that come later."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from renorm.adapt import adapt_
from renorm.adapters import load_adapter_, save_adapter
from renorm.finetune import finetune_
from renorm.profile import Profile, profile
from renorm.recalibrate import recalibrate_

__all__ = ["LABELLED", "LEFT_OUT", "WAYS", "adapted", "beats", "gas", "through_adapter"]

WAYS = ("source", "plain", "auto", "profile", "check")
EVERY = 200  # beats of a patient, of up to a few thousand: the first ones, in time
LABELLED = 64  # rows of the target that have labels, where norm layers are trained
LEFT_OUT = 6  # patients that are not trained on, drawn by the seed

Part = tuple[Tensor, Tensor]


@lru_cache(maxsize=4)
def gas(data: Path, seed: int) -> tuple[nn.Module, Part, dict[str, Part]]:
    """A network with three batch norms, one for its input, trained on batches 1 and 2; those; and batches 3 to 6."""
    with np.load(data / "gas_drift.npz", allow_pickle=False) as file:
        x, labels, batch = (torch.from_numpy(file[name]) for name in ("X", "labels", "batch"))
    first = batch <= 2
    middle, deviation = x[first].mean(0), x[first].std(0)
    parts = {str(later): (((x - middle) / deviation)[batch == later], labels[batch == later]) for later in (3, 4, 5, 6)}
    source = ((x - middle) / deviation)[first], labels[first]
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.BatchNorm1d(128)]  # drift is then the input's to mend, where it is simplest
    for inputs in (128, 64):
        layers += [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return _fitted(nn.Sequential(*layers, nn.Linear(64, 6)), source, seed=seed, epochs=30), source, parts


@lru_cache(maxsize=4)
def beats(data: Path, seed: int) -> tuple[nn.Module, Part, dict[str, Part]]:
    """A convolution in time on the heart beats of most patients, what it was trained on, and the patients left out."""
    with np.load(data / "ecg_ds1.npz", allow_pickle=False) as file:
        volts, classes, record = file["X_uV"], file["labels"], file["record"]
    rows = np.concatenate([np.flatnonzero(record == patient)[:EVERY] for patient in np.unique(record)])
    x = torch.from_numpy(volts[rows].astype(np.float32) / 1000)[:, None]  # mV
    labels, owner = torch.from_numpy(classes[rows].astype(np.int64)), torch.from_numpy(record[rows].astype(np.int64))
    left_out = np.random.default_rng(seed).permutation(np.unique(record))[:LEFT_OUT]
    apart = torch.isin(owner, torch.from_numpy(left_out.astype(np.int64)))
    source = x[~apart], labels[~apart]
    parts = {str(patient): (x[owner == int(patient)], labels[owner == int(patient)]) for patient in left_out}
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv1d(inputs, outputs, 7, stride=2, padding=3, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(128, 5))
    return _fitted(model, source, seed=seed, epochs=8), source, parts


def adapted(way: str, model: nn.Module, source: Part, target: Part) -> Mapping[str, float]:
    """A copy of `model` after one of `WAYS`, "stream" or "affine"; its accuracy on the target in per cent.

    "stream" answers batches of 50 while it learns from them. "affine" trains the norm layers on the first 64 rows and their
    labels, and is measured on the others; what it learnt goes through an adapter's file.
    """
    known = profiled(model, source) if way in ("profile", "check", "stream") else None
    base, model = model, deepcopy(model)
    # in time order one batch is one gas or one rhythm; who has all of them at hand can shuffle
    order = torch.randperm(len(target[1]), generator=Generator().manual_seed(0))
    x, labels = target[0][order], target[1][order]
    batches, values = list(torch.split(x, 100)), {"accepted": 1.0}
    if way in ("plain", "auto"):
        recalibrate_(model, batches, prior=0 if way == "plain" else "auto")
    elif way in ("profile", "check"):
        found = recalibrate_(model, batches, source=known, check=batches if way == "check" else None)
        values["accepted"] = float(found.accepted)
    elif way == "stream":
        stream = adapt_(model, "shrink", source=known)
        answers = torch.cat([stream(part).argmax(1) for part in torch.split(x, 50)])
        return {**values, **_right(answers, labels)}
    elif way == "affine":
        with torch.random.fork_rng(devices=[]):
            finetune_(model, [(x[:LABELLED], labels[:LABELLED])], policy="affine-only", epochs=20, head="keep")
        x, labels = x[LABELLED:], labels[LABELLED:]
        values |= through_adapter(model, base, x)
    with torch.no_grad():
        return {**values, **_right(model.eval()(x).argmax(1), labels)}


def _right(answers: Tensor, labels: Tensor) -> dict[str, float]:
    return {"accuracy": 100 * (answers == labels).double().mean().item(), "samples": len(labels)}


@torch.no_grad()
def through_adapter(model: nn.Module, base: nn.Module, *inputs: Tensor, **named: Tensor) -> dict[str, float]:
    """The size of an adapter's file made of `model`, and whether `base` with it answers as `model` does, to the bit."""
    other = deepcopy(base)
    with TemporaryDirectory() as folder:
        size = save_adapter(model, Path(folder, "tuned.safetensors"))
        load_adapter_(other, Path(folder, "tuned.safetensors"))
    same = torch.equal(model.eval()(*inputs, **named), other.eval()(*inputs, **named))
    return {"adapter_bytes": float(size), "adapter_same": float(same)}


@lru_cache(maxsize=2)
def profiled(model: nn.Module, source: Part) -> Profile:
    """What the source's owner tells once."""
    return profile(model, list(zip(torch.split(source[0], 100), torch.split(source[1], 100), strict=True)))


def _fitted(model: nn.Module, source: Part, *, seed: int, epochs: int) -> nn.Module:
    x, labels = source
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    shuffle = Generator().manual_seed(seed)
    whole = len(x) // 64 * 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (whole // 64))
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=shuffle)[:whole], 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[rows]), labels[rows]))
            optimizer.step()
            schedule.step()
    return model.eval()
