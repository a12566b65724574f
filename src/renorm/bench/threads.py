"""Ten complaints from public threads, rebuilt on scikit-learn's digits: does the doctor name the cause, and is it mended?

Each thread makes a network sick in the way that its reporters did, asks the doctor, applies the fix of the first finding
and measures before and after. Lower is better everywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from renorm.bench.digits import Digits, batches, load, network, training
from renorm.doctor import diagnose
from renorm.errors import require
from renorm.rules.base import Finding
from renorm.shift import Shift
from renorm.sites import find_sites
from renorm.watch import watch

__all__ = ["THREADS", "Outcome", "Thread"]


@dataclass(frozen=True)
class Outcome:
    """The first finding, and what was measured while sick and after the mend."""

    first: Finding | None
    before: float
    after: float


@dataclass(frozen=True)
class Thread:
    """A complaint: where it was made, which rule should stand first, what is measured, and how it is rebuilt from a seed."""

    name: str
    cited: str
    rules: tuple[str, ...]
    measure: str
    rebuild: Callable[[int], Outcome]
    by_hand: bool = False  # mended as the finding's advice says: what is wrong is outside the model


def _gap(seed: int) -> Outcome:
    """A momentum of 0.01 and twenty steps: good in train(), bad in eval()."""
    source, rest = load()
    model = _made(seed)
    for site in find_sites(model):
        vars(site.module)["momentum"] = 0.01
    _train(model, source, seed, steps=20)
    return _mended(model, batches(rest, labelled=True), rest)


def _freeze_undone(seed: int) -> Outcome:
    """bn.eval() once, train() every epoch: the statistics follow the new data, and the old task is lost."""
    _, rest = load()
    new = rest.shifted("inverted")

    def lose(mend: Callable[[nn.Module], Any] | None) -> tuple[nn.Module, Finding | None]:
        model = _trained(seed)
        model.requires_grad_(False)
        _head(model).requires_grad_(True)
        optimizer = torch.optim.SGD(_head(model).parameters(), lr=1e-4)
        model.train()
        for site in find_sites(model):
            site.module.eval()
        if mend is not None:
            mend(model)
        with watch(model, optimizer) as watching:
            for images, labels in zip(torch.split(new.images, 50), torch.split(new.labels, 50), strict=True):
                model.train()
                _step(model, optimizer, images, labels)
        return model.eval(), next(iter(watching.findings), None)

    sick, first = lose(None)
    well, _ = lose(first.fix_ if first else None)
    return Outcome(first, _error(sick, rest), _error(well, rest))


def _lightning(seed: int) -> Outcome:
    """track_running_stats=False as Lightning's freeze() left it: in train() the batch still normalises."""
    _, rest = load()
    model = _trained(seed)
    expected = model(rest.images).argmax(1)
    model.train()
    for site in find_sites(model):
        vars(site.module)["track_running_stats"] = False

    def changed() -> float:
        with torch.no_grad():
            answers = torch.cat([model(part) for part in torch.split(rest.images, 8)]).argmax(1)
        return 100 * float((answers != expected).double().mean())

    before = changed()
    first = next(iter(diagnose(model).findings), None)
    for finding in diagnose(model).findings:
        if first is not None and finding.rule == first.rule and finding.fix_ is not None:
            finding.fix_(model)
    return Outcome(first, before, changed())


def _ragged(seed: int) -> Outcome:
    """torch's update_bn over batches of 98 and 2: both count the same."""
    _, rest = load()
    model = _trained(seed)
    order = torch.argsort(rest.images.mean((1, 2, 3)))
    images = torch.cat([rest.images[order[50:148]], rest.images[order[-2:]]])
    update_bn([images[:98], images[98:]], model)
    return _mended(model.eval(), batches(rest), rest)


def _lost_activations(seed: int) -> Outcome:
    """Norm layers that hold their activation, converted by torch's convert_sync_batchnorm."""
    source, rest = load()
    kind = require("timm.layers", extra="images", purpose="norm layers with an activation").BatchNormAct2d
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        for name in ("1", "2", "3"):
            setattr(model, f"bn{name}", kind(getattr(model, f"bn{name}").num_features))
            setattr(model, f"relu{name}", nn.Identity())
    _train(model, source, seed)
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm  # untyped
    return _mended(convert(model).eval(), None, rest)


def _poisoned(seed: int) -> Outcome:
    """One infinite pixel in one batch of training."""
    source, rest = load()
    model = _trained(seed).train()
    images = source.images[:50].clone()
    images[7, 0, 3, 3] = math.inf
    with torch.no_grad():
        model(images)
        for part in torch.split(source.images, 50):  # no later batch heals it
            model(part)
    return _mended(model.eval(), batches(rest), rest)


def _checkpointed(seed: int) -> Outcome:
    """Activation checkpointing, against the same training without it."""
    source, _ = load()
    plain = _made(seed)
    _train(plain, source, seed, steps=20)

    def run(mend: Callable[[nn.Module], Any] | None) -> tuple[float, Finding | None]:
        model = _made(seed)
        if mend is not None:
            mend(model)
        body, optimizer = model[:-1], torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        with watch(model, optimizer) as watching:
            for images, labels in _drawn(source, seed, 20):
                optimizer.zero_grad()
                features: Any = checkpoint(body, images, use_reentrant=False)
                torch.autograd.backward(F.cross_entropy(model[-1](features), labels))
                optimizer.step()
        return _apart(plain, model), next(iter(watching.findings), None)

    before, first = run(None)
    after, _ = run(first.fix_ if first else None)
    return Outcome(first, before, after)


def _accumulated(seed: int) -> Outcome:
    """Sixteen batches of 4 for each step: statistics of the last ten batches, forty images."""
    source, _ = load()

    def run(mend: Callable[[nn.Module], Any] | None) -> tuple[float, Finding | None]:
        model = _trained(seed)
        if mend is not None:
            mend(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        model.train()
        with watch(model, optimizer) as watching:
            for images, labels in _drawn(source, seed, 15, size=64):
                optimizer.zero_grad()
                for part, of_part in zip(torch.split(images, 4), torch.split(labels, 4), strict=True):
                    torch.autograd.backward(F.cross_entropy(model(part), of_part) / 16)
                optimizer.step()
        far = diagnose(model.eval(), batches(source)).distances
        return sum(far.values()) / len(far), next(iter(watching.findings), None)

    before, first = run(None)
    after, _ = run(first.fix_ if first else None)
    return Outcome(first, before, after)


def _averaged(seed: int) -> Outcome:
    """An average of the parameters alone, begun after three steps."""
    source, rest = load()
    model = _made(seed)
    _train(model, source, seed, steps=3)
    average, began = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for part in range(12):
        _train(model, source, seed + 10 * part, steps=10)
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(now.data, 0.5)
    return _mended(average.eval(), batches(rest), rest, checkpoint=began)


def _wrong_pixels(seed: int) -> Outcome:
    """Pixels in 0 to 255 where the network was trained on 0 to 1; mended as the finding says, in the transform."""
    _, rest = load()
    wrong = Digits(rest.images * 255, rest.labels)
    model = _trained(seed)
    first = next(iter(diagnose(model, batches(wrong)).findings), None)
    divided = first is not None and "not divided by 255" in first.message
    mended = Digits(wrong.images / 255, rest.labels) if divided else wrong
    return Outcome(first, _error(model, wrong), _error(model, mended))


ERROR = "error, %"
THREADS: Mapping[str, Thread] = {
    thread.name: thread
    for thread in (
        Thread("good in train(), bad in eval()", "pytorch/pytorch#4741", ("BN301", "BN308"), ERROR, _gap),
        Thread(
            "freeze undone by train()", "pgniewko/gt-pyg#112", ("BN411",), "error on the old task, %", _freeze_undone
        ),
        Thread("Lightning's half freeze", "pytorch-lightning#15062", ("BN103",), "answers that change, %", _lightning),
        Thread("update_bn, ragged batch", "pytorch/pytorch#49082", ("BN301", "BN302"), ERROR, _ragged),
        Thread("SyncBN lost activations", "pytorch/pytorch#187298", ("BN407",), ERROR, _lost_activations),
        Thread("NaN poisoning", "pytorch/pytorch#88474", ("BN108",), ERROR, _poisoned),
        Thread("checkpointing", "pytorch/pytorch#96136", ("BN403",), "sd from training without", _checkpointed),
        Thread("accumulation", "pytorch/pytorch#46516", ("BN404",), "sd from the data", _accumulated),
        Thread("EMA without buffers", "pytorch/ignite#2590", ("BN203",), ERROR, _averaged),
        Thread("pixels not divided by 255", "keras-team/keras#7177", ("BN303",), ERROR, _wrong_pixels, by_hand=True),
    )
}


@lru_cache(maxsize=4)
def _cached(seed: int) -> nn.Sequential:
    *_, model = training(load()[0], seed=seed)
    return model


def _trained(seed: int) -> nn.Sequential:
    """A network trained on the digits, in evaluation; a new copy each time."""
    return copy.deepcopy(_cached(seed))


def _made(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network()


def _head(model: nn.Sequential) -> nn.Module:
    return model[-1]


def _drawn(source: Digits, seed: int, steps: int, *, size: int = 50) -> Sequence[tuple[Tensor, Tensor]]:
    generator = Generator().manual_seed(seed)
    rows = [torch.randint(len(source), (size,), generator=generator) for _ in range(steps)]
    return [(source.images[part], source.labels[part]) for part in rows]


def _train(model: nn.Module, source: Digits, seed: int, *, steps: int = 120) -> None:
    """Train as they come, and leave the model in evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for images, labels in _drawn(source, seed, steps):
        _step(model, optimizer, images, labels)
    model.eval()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(images), labels))
    optimizer.step()


def _mended(model: nn.Module, given: Any, measured: Digits, **options: Any) -> Outcome:
    """Ask the doctor of the model on what is `given`, and apply the fix of the first finding."""
    before = _error(model, measured)
    first = next(iter(diagnose(model, given, **options).findings), None)
    if first is not None and first.fix_ is not None:
        first.fix_(model)
    return Outcome(first, before, _error(model, measured))


@torch.no_grad()
def _error(model: nn.Module, digits: Digits) -> float:
    return 100 * float((model(digits.images).argmax(1) != digits.labels).double().mean())


def _apart(one: nn.Module, other: nn.Module) -> float:
    """How far the statistics of two networks lie apart, in sd, at the worst layer."""
    pairs = zip(find_sites(one), find_sites(other), strict=True)
    held = [(a.statistics(), b.statistics(), a.eps) for a, b in pairs]
    return max(Shift.between(a, b, eps=eps).layer.wasserstein2 for a, b, eps in held if a is not None and b is not None)
