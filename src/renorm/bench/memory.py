"""Suite `memory`: what a training step keeps, as it is, by `lean_` and by timm's switch, and whether the result is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from time import process_time
from typing import Any, ClassVar, Literal
from weakref import finalize, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from renorm.bench.base import Cell, Row, Suite
from renorm.bench.markdown import table as markdown
from renorm.calls import tensors_in
from renorm.errors import require
from renorm.lean import lean_
from renorm.policy import apply_policy_
from renorm.sites import find_sites, parameters_of

__all__ = ["Alive", "Memory"]

IMAGES = 16
NETWORKS = {  # side of the images
    "quick": {"resnet18": 96, "resnet50": 96, "efficientnet_b0": 96, "densenet121": 64, "convnext_atto": 96},
    "full": {
        **{name: 224 for name in ("resnet18", "resnet50", "mobilenetv3_large_100", "efficientnet_b0", "densenet121")},
        **{name: 224 for name in ("convnext_tiny", "vit_tiny_patch16_224")},
    },
}
POLICIES: tuple[Literal["all", "frozen-statistics"], ...] = ("all", "frozen-statistics")
TURNS = 2


class Memory(Suite):
    """Bytes at the peak of a step and its processor seconds: as it is, by `lean_`, and by timm's `set_grad_checkpointing`."""

    name: ClassVar[str] = "memory"
    revision: ClassVar[int] = 1
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for seed in range(self.seeds):
            for network in NETWORKS[self.size]:
                for policy in POLICIES:
                    yield Cell.of(on=network, policy=policy, seed=seed)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        timm: Any = require("timm", extra="images", purpose="the networks of this suite")
        torch.manual_seed(cell["seed"])
        model: nn.Module = timm.create_model(cell["on"], pretrained=False, num_classes=10).train()
        apply_policy_(model, cell["policy"])
        side = NETWORKS[self.size][cell["on"]]
        images, labels = torch.randn(IMAGES, 3, side, side), torch.randint(10, (IMAGES,))
        models = {"normal": model, "lean": deepcopy(model), "switch": deepcopy(model)}
        lean_(models["lean"])
        switched: Any = models["switch"]
        switched.set_grad_checkpointing(True)
        found: dict[str, float] = {}
        for way, each in models.items():
            _step(each, images, labels)  # gradients lie there from now on, and are not counted
            with Alive() as alive:
                _step(each, images, labels)
            found[f"{way}_bytes"] = alive.peak
        for way in ("lean", "switch"):
            found |= {f"{way}_{what}": value for what, value in _apart(models["normal"], models[way]).items()}
        seconds = dict.fromkeys(models, float("inf"))
        for _ in range(TURNS):
            for way, each in models.items():
                start = process_time()
                _step(each, images, labels)
                seconds[way] = min(seconds[way], process_time() - start)
        return found | {f"{way}_seconds": value for way, value in seconds.items()}

    def table(self, rows: Sequence[Row]) -> str:
        lines = []
        for on, policy in dict.fromkeys((row.cell["on"], row.cell["policy"]) for row in rows):
            here = [row.values for row in rows if (row.cell["on"], row.cell["policy"]) == (on, policy)]
            line = [on, policy, f"{np.median([v['normal_bytes'] for v in here]) / 1e6:.0f}"]
            for way in ("lean", "switch"):
                line += [_median(here, way, "bytes"), _median(here, way, "seconds")]
            for way in ("lean", "switch"):
                line.append(f"{max(max(v[f'{way}_gradients'], v[f'{way}_statistics']) for v in here):.1e}")
            lines.append(line)
        columns = (
            "network",
            "policy",
            "MB",
            "lean, memory",
            "time",
            "switch, memory",
            "time",
            "lean apart",
            "switch apart",
        )
        return "\n".join([ABOUT, markdown(columns, lines, words=2)])


ABOUT = f"""\
A training step of {IMAGES} random images, forward and backward: the most megabytes that its tensors held at once beside
weights, gradients and batch (*MB*), and as multiples of that, and of its processor time, the same step by `lean_` and by timm's
`set_grad_checkpointing`. Memory is counted tensor by tensor on the processor, what a kernel takes meanwhile is not; time is the
least of {TURNS} turns of which each way has one, both medians over seeds. *apart*: the largest difference that a gradient or a
running statistic has after two steps, relative to the largest of its tensor; timm's switch lets batch norms take a batch twice.
"""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage made inside for as long as it lives: `.now`, and the most there were, `.peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: Any = WeakIdKeyDictionary(ref_type=ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tensors_in((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known[storage] = True
                self.now += storage.nbytes()
                finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    model.zero_grad(set_to_none=False)
    torch.manual_seed(0)  # drop path and dropout draw the same in every way
    torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))


def _apart(one: nn.Module, other: nn.Module) -> dict[str, float]:
    """The largest differences of gradients and of statistics, relative to the largest number of each tensor."""
    gradients = [(parameters_of(m)) for m in (one, other)]
    pairs = [(p.grad, gradients[1][name].grad) for name, p in gradients[0].items()]
    moments = [[t for site in find_sites(m) for t in site.tensors or ()] for m in (one, other)]
    return {
        "gradients": max((_far(a, b) for a, b in pairs if a is not None and b is not None), default=0.0),
        "statistics": max((_far(a, b) for a, b in zip(*moments, strict=True)), default=0.0),
    }


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny))


def _median(values: Sequence[Mapping[str, float]], way: str, what: str) -> str:
    ratios = [each[f"{way}_{what}"] / each[f"normal_{what}"] for each in values]
    return f"{np.median(ratios):.2f}"
