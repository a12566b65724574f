"""Each fold by itself: does the folded layer give, on an example, what the norm gave, and nothing else change?

Every error is local: what went wrong at one place is put right before the next one reads it, so that sums of rounding over a
deep network are not mistaken for a wrong fold, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from renorm.absorb import Absorber
from renorm.affine import Affine
from renorm.said import say
from renorm.sites import find_sites, walk

__all__ = ["Fold", "Proof", "distance", "remainder", "share"]


@dataclass(frozen=True)
class Fold:
    """One site, what carries its map, and what remains where it stood."""

    site: str
    affine: Affine
    absorbers: tuple[Absorber, ...]

    @property
    def after(self) -> bool:
        """Whether the norm stands after what carries its map, so that its activation stays."""
        return self.absorbers[0].side == "after"

    @property
    def beside(self) -> bool:
        """Whether it stands beside it, so that what carries the map gives more than it did."""
        return self.absorbers[0].side == "beside"


Run = Callable[[nn.Module], object]


class Proof:
    """Runs `base`, then `candidate` with `planned` applied to it, and compares at every fold.

    `run` runs a model on the example. In the candidate everything before a fold is as it was in the base.
    """

    def __init__(
        self, base: nn.Module, candidate: nn.Module, planned: Sequence[Fold], *, run: Run, tolerance: float
    ) -> None:
        self.tolerance = tolerance
        self.errors: dict[str, float] = {}
        self.broken: set[str] = set()
        self._expected: dict[str, list[Tensor]] = {}
        self._more: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self._folds = {fold.site: fold for fold in planned}
        self._axes = {site.name: site.axis for site in find_sites(base)}
        with ExitStack() as stack:
            self._record(stack, dict(walk(base)))
            run(base)
        for fold in planned:
            if fold.beside and fold.site in self._more:
                point = fold.absorbers[0].module
                pairs = zip(self._expected[point], self._more[fold.site], strict=True)
                self._expected[point] = [output + more for output, more in pairs]
        with ExitStack() as stack:
            self._compare(stack, dict(walk(candidate)))
            try:
                run(candidate)
            except Exception:  # which fold it was, halving will find
                self._seen = {name: len(expected) for name, expected in self._expected.items()}

    def verdict(self, fold: Fold) -> str | None:
        """Why the fold does not hold; None where it does."""
        if fold.site in self.broken:
            return say("what it computes is not one scale and shift per channel, followed by its activation")
        error = self.errors.get(fold.site, 0.0)
        if error > self.tolerance:
            return say(
                "folding it moved its own output by {error}, more than {limit}",
                error=share(error),
                limit=share(self.tolerance),
            )
        points = [fold.site] if fold.after else [a.module for a in fold.absorbers]
        if any(self._seen.get(point, 0) != len(self._expected.get(point, ())) for point in points):
            return say("it could not be replaced: the model holds it somewhere beside its modules")
        return None

    def _record(self, stack: ExitStack, modules: Mapping[str, nn.Module]) -> None:
        for fold in self._folds.values():
            site = modules[fold.site]
            stack.callback(site.register_forward_pre_hook(self._note_input(fold)).remove)
            stack.callback(site.register_forward_hook(self._check_form(fold, remainder(site))).remove)
            for absorber in () if fold.after else fold.absorbers:
                stack.callback(modules[absorber.module].register_forward_hook(self._note(absorber.module)).remove)

    def _compare(self, stack: ExitStack, modules: Mapping[str, nn.Module]) -> None:
        for fold in self._folds.values():
            if fold.after:
                hook = self._judge_input(fold.site)
                stack.callback(modules[fold.site].register_forward_pre_hook(hook).remove)
            for absorber in () if fold.after else fold.absorbers:
                module = modules[absorber.module]
                stack.callback(module.register_forward_hook(self._judge_output(fold.site, absorber.module)).remove)

    def _note_input(self, fold: Fold) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            affine = Affine(*(v.to(args[0].dtype) for v in fold.affine))
            mapped = affine(args[0], axis=self._axes[fold.site])
            self._expected.setdefault(fold.site, []).append(mapped)
            if fold.beside:
                self._more.setdefault(fold.site, []).append(mapped - args[0])

        return before

    def _check_form(self, fold: Fold, left: nn.Module) -> Any:
        """Is the site its map, then what is left of it? On other values too: some layers only depart from it far out."""

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            affine = Affine(*(v.to(args[0].dtype) for v in fold.affine))
            for given, got in ((args[0], output), *((x, None) for x in _farther(args[0]))):
                mapped = affine(given, axis=self._axes[fold.site])
                got = module.forward(given.clone()) if got is None else got
                if distance([got], [left(mapped)]) > self.tolerance:
                    self.broken.add(fold.site)

        return after

    def _note(self, name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            self._expected.setdefault(name, []).append(output.clone())

        return after

    def _judge_input(self, site: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._judge(site, site, args[0]),)

        return before

    def _judge_output(self, site: str, point: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self._judge(site, point, output)

        return after

    def _judge(self, site: str, point: str, got: Tensor) -> Tensor:
        """Note how far `got` is off, and give what it should have been, so that no error is carried on."""
        expected = self._expected[point][self._seen.get(point, 0)]
        self._seen[point] = self._seen.get(point, 0) + 1
        self.errors[site] = max(self.errors.get(site, 0.0), distance([expected], [got]))
        return expected


def _farther(x: Tensor) -> list[Tensor]:
    """The same values moved and spread, and drawn together, as no example of the source would have them."""
    return [x * 20 + 30, x * 0.05 - 1]


def remainder(norm: nn.Module) -> nn.Module:
    """What is left of a norm layer once its scale and shift are gone: its own parts (drop, act), in order, or Identity."""
    parts = [child for child in norm.children() if type(child) is not nn.Identity]
    left = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
    return left.train(norm.training)


def distance(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest expected value of its tensor; infinite for other shapes."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    worst = 0.0
    for x, y in zip(expected, got, strict=True):
        if not x.numel():
            continue
        x, y = x.detach().double(), y.detach().double()
        same = (x == y) | (x.isnan() & y.isnan())
        far = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf)
        largest = x.abs()[torch.isfinite(x)].max() if bool(torch.isfinite(x).any()) else torch.tensor(0.0)
        worst = max(worst, float(far.max()) / max(float(largest), 1e-30))
    return worst


def share(value: float) -> str:
    return say("{value:.1e} of its largest value", value=value)
