"""Suite `breadth`: one small member of every family in timm, random weights: sites, observe and undo, none wrong."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.bench import breadth_table
from renorm.bench.base import Cell, Row, Suite
from renorm.bench.families import FAMILIES
from renorm.errors import ModelError, NoBatchNorm, require
from renorm.moments import Observed
from renorm.observe import observe
from renorm.recalibrate import recalibrate_
from renorm.sites import find_sites

__all__ = ["Breadth"]

LARGEST = {"quick": 32.0, "full": 140.0}  # million parameters of a member that is still run
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)  # smaller maps end as one value per channel
BATCHES = (3, 2)
# What other libraries call the kinds of norm layers that `find_sites` knows; the twin goes by the names of the classes.
NAMED = re.compile(r"(?i)^(frozen)?(batch|layer|group|instance|rms|simple)_?norm")


class Breadth(Suite):
    """Is every norm layer found, measured as a float64 hook measures it, and given back bit for bit, in every family?"""

    name: ClassVar[str] = "breadth"
    revision: ClassVar[int] = 1

    def cells(self) -> Iterator[Cell]:
        for family, (member, millions) in FAMILIES.items():
            if millions <= LARGEST[self.size]:
                yield Cell.of(family=family, member=member)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        gc.collect()
        model = _untrained(cell["member"])
        side = _smallest(model)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(n, 3, side, side, generator=generator) * 2 + 0.5 for n in BATCHES]
        values = {"side": side, "millions": sum(p.numel() for p in model.parameters()) / 1e6}
        return values | _sites(model) | _observed(model, batches) | _undone(model, batches)

    def table(self, rows: Sequence[Row]) -> str:
        return breadth_table.table(rows, left_out=len(FAMILIES) - sum(1 for _ in self.cells()))


def _untrained(name: str) -> nn.Module:
    """The model with seeded random weights, its statistics and affine off their initial values, in evaluation mode."""
    timm = require("timm", extra="images", purpose="building timm's models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name)
        with torch.no_grad():
            for module in _holders(model).values():
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                for affine, middle in ((module.weight, 1.0), (module.bias, 0.0)):
                    if isinstance(affine, Tensor):
                        affine.uniform_(middle - 0.3, middle + 0.3)
    return model.eval()


def _smallest(model: nn.Module) -> int:
    """The smallest side of square images that the model takes."""
    said: Any = model.pretrained_cfg
    own = int(said["input_size"][-1])
    least = int((said.get("min_input_size") or (3, 0, 0))[-1])
    tried = [own] if said.get("fixed_input_size") else [side for side in (*SIDES, own) if side >= least]
    for side in tried:
        try:
            with torch.no_grad():
                model(torch.zeros(2, 3, side, side))
        except Exception:  # each model has its own way to refuse a size
            continue
        return side
    raise ModelError(f"{type(model).__name__} takes none of the sizes {tried}.")


def _holders(model: nn.Module) -> dict[str, Any]:
    """By the buffers alone: every module that holds a running mean."""
    return {name: module for name, module in model.named_modules() if "running_mean" in module._buffers}


def _sites(model: nn.Module) -> dict[str, float]:
    """What `find_sites` finds against two other ways to look: buffers for batch norms, class names for the others."""
    found = {site.name: site for site in find_sites(model)}
    held = {name: module.running_mean.numel() for name, module in _holders(model).items()}
    named = {name for name, module in model.named_modules() if NAMED.match(type(module).__name__)}
    wrapped = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
    batch = {name: site.channels for name, site in found.items() if site.kind == "batch"}
    around = {name.rpartition(".")[0] for name in found}
    others = {
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and name not in found and list(module.parameters(recurse=False))
    }
    expected = held.keys() | (named - wrapped)
    return {
        "batch": len(batch),
        "other": len(found) - len(batch),
        "of no kind": len(others - around),
        "missed": len(expected - found.keys()),
        "invented": len(found.keys() - expected) + sum(held.get(name) != count for name, count in batch.items()),
    }


def _observed(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """The largest differences from the twin: of the moments, and of what normalised under "batch"."""
    running = _Twin(model)
    with running.watching(), torch.no_grad():  # a run of its own, without any of renorm's hooks
        for batch in batches:
            model(batch)
    seen = observe(model, batches, under="running")
    unvisited = len(seen.unvisited)
    wrong = float(set(seen) != set(running.inputs)) + float(set(seen.unvisited) != _holders(model).keys() - seen.keys())
    values = {"running": running.apart(seen), "unvisited": unvisited}
    batch_twin = _Twin(model, normalised=True)
    with batch_twin.watching():
        seen = observe(model, batches, under="batch")
    wrong += float(set(seen) != set(batch_twin.inputs))
    return values | {"by batch": batch_twin.apart(seen), "output": batch_twin.output, "unseen": wrong}


class _Twin:
    """Plain hooks at every module with a running mean: its inputs in float64, and how its output should have come out."""

    def __init__(self, model: nn.Module, *, normalised: bool = False) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.output = 0.0
        self._modules, self._normalised = _holders(model), normalised

    def watching(self) -> ExitStack:
        stack = ExitStack()
        for name, module in self._modules.items():
            stack.callback(module.register_forward_pre_hook(self._keep(name)).remove)
            if self._normalised:
                stack.callback(module.register_forward_hook(self._judge(name)).remove)
        return stack

    def apart(self, seen: Mapping[str, Observed]) -> float:
        """The largest difference of a mean, or of a standard deviation, in standard deviations of the values."""
        worst = 0.0
        for name, parts in self.inputs.items():
            flat = torch.cat([x.movedim(1, 0).flatten(1) for x in parts], dim=1)
            means = torch.cat([x.flatten(2).mean(2) if x.dim() > 2 else x for x in parts])
            for moments, values in ((seen[name].values, flat), (seen[name].images, means.T)):
                var, mean = torch.var_mean(values, dim=1, correction=0)
                sd = (flat.var(dim=1, correction=0) + 1e-6).sqrt()
                worst = max(worst, float(((moments.mean - mean).abs() / sd).max()))
                worst = max(worst, float(((moments.sd - var.sqrt()).abs() / sd).max()))
        return worst

    def _keep(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(args[0].detach().double())

        return before

    def _judge(self, name: str) -> Callable[..., None]:
        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = self.inputs[name][-1]
            weight, bias = (None if t is None else t.double() for t in (module.weight, module.bias))
            wanted = F.batch_norm(x, None, None, weight, bias, training=True, eps=module.eps)
            if hasattr(module, "act"):
                wanted = module.act(module.drop(wanted))
            gap = (output.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)
            self.output = max(self.output, float(gap))

        return after


def _undone(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """How many tensors and modes differ after an undo, and after a loader that fails midway; how many were changed."""
    before = _photograph(model)
    try:
        adaptation = recalibrate_(model, batches, prior=0)
    except NoBatchNorm:
        return {"refused": 1.0, "changed": 0.0, "not undone": _differences(before, model), "not kept": 0.0}
    changed = sum(
        not torch.equal(before[f"{name}.running_mean"], module.running_mean) for name, module in _holders(model).items()
    )
    adaptation.restore_()
    undone = _differences(before, model)
    try:
        recalibrate_(model, _broken(batches), prior=0)
    except OSError:
        return {"refused": 0.0, "changed": changed, "not undone": undone, "not kept": _differences(before, model)}
    raise AssertionError("a loader failed, and recalibrate_ did not say so")


def _broken(batches: list[Tensor]) -> Iterator[Tensor]:
    yield batches[0]
    raise OSError("the disk is gone")


def _photograph(model: nn.Module) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {f"{name} hooks": len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()}
    return tensors | hooks | {f"{name} mode": module.training for name, module in model.named_modules()}


def _differences(before: Mapping[str, Any], model: nn.Module) -> float:
    after = _photograph(model)
    same = [
        torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        for name, value in before.items()
        if name in after
    ]
    return float(len(same) - sum(same) + len(before.keys() ^ after.keys()))
