"""Absorb batch norm into its neighbours, prove every fold on an example, and undo what does not hold.

In evaluation a batch norm is one scale and one shift per channel, which the convolution or linear layer before it (or behind
it) can carry in its own weight. Whether it may is read off one watched forward (`graph`, `absorb`), never guessed from the
order in which modules were registered.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from renorm.affine import Affine
from renorm.calls import Caller, Forward, map_tensors, tensors_in, uncompiled
from renorm.checkpoints import Loaded, load_, read_weights
from renorm.errors import CheckpointError, UsageError
from renorm.graph import Graph, watch
from renorm.neighbours import absorbers
from renorm.prove import Fold, Proof, distance, remainder, share
from renorm.said import say
from renorm.sites import Site, batch_sites, find_sites, unwrap, walk
from renorm.state import evaluating, preserving

__all__ = ["Folded", "fold", "load_folded_", "scale_and_shift", "was_folded"]

TOLERANCES = {torch.float64: 1e-9}  # of the largest value
TOLERANCE = 1e-4  # float32: some ten times what reordered sums gave over 100 timm families, `renorm bench fold`
NARROW = {torch.bfloat16: 0.25, torch.float16: 0.03}  # of whole models: 32 steps of the type
ROUNDS = 8  # a norm behind a norm is absorbed in the next round


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A copy of the model without the batch norms in `folded`, and why each of the others stayed.

    `model` is of the model's own class; where a batch norm stood is an Identity, or the activation that it carried.
    `max_rel_error` is the largest difference between the two models' outputs on the example, as a share of the largest
    output; `errors` gives the same for each folded site by itself. `own_rounding` is how far the model is from itself in
    float64; it is measured only where `max_rel_error` is above the usual tolerance and the folds are exact in float64.
    """

    model: nn.Module
    folded: tuple[str, ...]
    kept: Mapping[str, str]
    max_rel_error: float
    errors: Mapping[str, float]
    own_rounding: float | None = None


def fold(
    model: nn.Module,
    example: Any,
    *,
    tolerance: float | None = None,
    forward: Forward | None = None,
    output: Any = None,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> Folded:
    """A copy of `model` that computes the same in evaluation, with every batch norm absorbed that a neighbour can carry.

    `example` is one batch, as a loader gives it; only what ran on it is folded. Each fold is proved on it by itself, with
    everything before it as in the model, and all of them together: a fold that moves an output by more than `tolerance` (a
    share of the largest value) is undone and reported. Without one that is 1e-4 (1e-9 in float64), or, for folds that are
    exact in float64, what the model's own rounding does to its output. Half precision is proved in float32.
    The model is untouched; wrappers (DDP, torch.compile) are not copied.

    Raises:
        NoBatchNorm: the model has no batch norm with statistics.
        UsageError: the model cannot be copied, its output holds no tensor, or a tolerance that is not positive.
    """
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance is a share of the largest output, above 0; got {tolerance!r}.")
    original = unwrap(model)
    batch_sites(original, asked="fold")
    caller = Caller(forward=forward, output=output, device=device, channels_last=channels_last)
    with preserving(original):  # copying some models draws random numbers
        return _folded(_Working(original, example, caller, tolerance))


def _folded(working: _Working) -> Folded:
    kept: dict[str, str] = {}
    for _ in range(ROUNDS):
        planned, kept = working.plan()
        if not planned or not working.adopt(planned):
            break
    error = working.settle()
    order = [site.name for site in find_sites(working.original)]
    folded = sorted(working.folds, key=order.index)
    kept |= working.refused
    return Folded(
        model=working.deliver(),
        folded=tuple(folded),
        kept={name: kept[name] for name in sorted(kept.keys() - working.folds.keys(), key=order.index)},
        max_rel_error=error,
        errors={name: working.errors[name] for name in folded},
        own_rounding=working.own_rounding() if error > working.delivered.limit else None,
    )


def was_folded(path: str | os.PathLike[str]) -> bool:
    """Whether the weights at `path` are those of a folded model, by what the file says of its origin."""
    return "folded" in (read_weights(path).provenance or {})


def load_folded_(model: nn.Module, path: str | os.PathLike[str]) -> Loaded:
    """Give `model` the form of the folded one whose weights are at `path`, and load them: all of it, or nothing.

    Where a norm was folded an Identity or its activation takes its place, and a layer that got a bias gets one.

    Raises:
        CheckpointError: as `checkpoints.load_`, the file does not say what was folded, or the model lacks a norm it names.
    """
    weights = read_weights(path)
    names = (weights.provenance or {}).get("folded")
    if names is None:
        raise CheckpointError(f"{path} does not say which norms were folded. Load it with its model as it is.")
    made = copy.deepcopy(model)
    for each in (made, model):  # the copy first: where it does not fit, the model is as it was
        modules = dict(walk(unwrap(each)))
        norms = {site.name for site in find_sites(each) if site.kind == "batch"}
        if lacking := [name for name in names if name not in norms]:
            raise CheckpointError(f"{path} is of a model with a norm at {lacking[0]!r}, where this one has none.")
        for name in names:
            _replace(unwrap(each), modules[name], remainder(modules[name]))
        for name in weights.state:
            home = modules.get(name.rpartition(".")[0])
            if home is not None and name.endswith("bias") and ("bias", None) in home._parameters.items():
                home.bias = nn.Parameter(weights.state[name].to(next(home.parameters())))
        loaded = load_(each, path)
    return loaded


def scale_and_shift(site: Site) -> Affine | None:
    """The map of a batch norm in evaluation, in float64, from the tensors it holds; None where it holds no statistics."""
    if site.tensors is None or site.slot is not None:
        return None
    weight, bias = (_vector(site, *names) for names in (("weight", "gamma", "_gamma"), ("bias", "beta", "_beta")))
    mean, var = (t.detach().double() for t in site.tensors)
    return Affine.of(mean, var, weight, bias, site.eps)


def _vector(site: Site, *names: str) -> Tensor | None:
    for name in names:
        held = getattr(site.module, name, None)
        held = getattr(held, "value", held)  # Keras
        if isinstance(held, Tensor) and held.shape == (site.channels,):
            return held.detach().double()
    return None


@dataclass
class _As:
    """The model and the example in one number type, what it gives there, and how far from that it may end."""

    model: nn.Module
    example: Any
    limit: float = 0.0
    expected: list[Tensor] = field(default_factory=list)


class _Working:
    """The folds found so far, and what they are proved against."""

    def __init__(self, original: nn.Module, example: Any, caller: Caller, tolerance: float | None) -> None:
        self.original, self.example, self.caller = original, example, caller
        self.names = {site.name for site in find_sites(original) if site.kind == "batch"}
        self.folds: dict[str, Fold] = {}
        self.refused: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._doubled: list[_As | None] = []
        dtypes = {t.dtype for t in original.state_dict().values() if isinstance(t, Tensor)}
        narrow = dtypes & NARROW.keys()
        self.tolerance = tolerance or TOLERANCES.get(_widest(dtypes), TOLERANCE)
        self.strict = tolerance is not None or torch.float64 in dtypes
        wide = _As(self._copied(original).float(), map_tensors(_float, example)) if narrow else _As(original, example)
        self.proved, self.delivered = wide, _As(original, example)
        self.delivered.expected = self._run(original, example)
        wide.expected = self._run(wide.model, wide.example) if narrow else self.delivered.expected
        self.proved.limit = self.tolerance
        self.delivered.limit = max([self.tolerance, *(NARROW[d] for d in narrow)])
        if not self.delivered.expected:
            raise UsageError(
                f"fold compares what {type(original).__name__} gives before and after, and its output holds no tensor; "
                "say with forward= how to call it so that it gives some."
            )

    def plan(self) -> tuple[list[Fold], dict[str, str]]:
        """What could be folded next on top of what is, and why the rest could not."""
        base = self._with(self.folds.values(), self.proved.model)
        modules = dict(walk(base))
        sites = [site for site in find_sites(base) if site.name in self.names]
        graph = watch(base, self.proved.example, sites=sites, caller=self.caller)
        planned: list[Fold] = []
        kept: dict[str, str] = {}
        taken: set[tuple[str, str]] = set()
        for site in sites:
            found = self.refused.get(site.name) or _plan(graph, site, modules)
            if isinstance(found, str):
                kept[site.name] = found
            elif taken.isdisjoint(weights := {(a.module, a.weight) for a in found.absorbers}):
                planned.append(found)
                taken |= weights
            else:
                kept[site.name] = say("another batch norm was folded into the same weight first")
        return planned, kept

    def adopt(self, planned: Sequence[Fold]) -> bool:
        """Prove each of `planned` by itself, then all together; keep those that hold. False where none did."""
        base = self._with(self.folds.values(), self.proved.model)
        candidate = self._with(planned, base)
        proof = Proof(
            base, candidate, planned, run=lambda model: self._run(model, self.proved.example), tolerance=self.tolerance
        )
        good = []
        for fold in planned:
            why = proof.verdict(fold)
            if why is None:
                good.append(fold)
            else:
                self.refused[fold.site] = why
        self.folds |= {fold.site: fold for fold in good}
        self.errors |= {fold.site: proof.errors.get(fold.site, 0.0) for fold in good}
        self._weed(good, self.proved)
        return any(fold.site in self.folds for fold in good)

    def settle(self) -> float:
        """The largest relative error of the delivered model; folds that make it too large in its own type are undone."""
        self._weed(list(self.folds.values()), self.delivered)
        return self._error(self.folds.values(), self.delivered)

    def deliver(self) -> nn.Module:
        """The folded copy, in the model's own type."""
        return self._with(self.folds.values(), self.original)

    def _weed(self, newest: Sequence[Fold], how: _As) -> None:
        """Undo, one by one, the folds with which the whole model is off, found by halving; after five of them, all."""
        for attempt in range(6):
            everything = list(self.folds.values())
            if not newest or self._holds(everything, how):
                return
            error = self._error(everything, how)
            low, high = (
                len(everything) - len(newest),
                len(everything),
            )  # the first `low` are sound, the first `high` not
            while attempt < 5 and high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._holds(everything[:middle], how) else (low, middle)
            wrong = [everything[high - 1]] if attempt < 5 else list(newest)
            weights = {(a.module, a.weight) for fold in wrong for a in fold.absorbers}
            for fold in newest:
                if any((a.module, a.weight) in weights for a in fold.absorbers):
                    del self.folds[fold.site]
                    self.refused[fold.site] = (
                        say("the model's forward fails without it")
                        if error == float("inf")
                        else say(
                            "with it folded the model's output moved by {error}, more than {limit}",
                            error=share(error),
                            limit=share(how.limit),
                        )
                    )
            newest = [fold for fold in newest if fold.site in self.folds]

    def _holds(self, folds: Sequence[Fold], how: _As) -> bool:
        """Whether the outputs agree within the limit, or within what the model's own rounding does to them.

        Untrained and very deep networks can enlarge the last digit a thousandfold. There the folds must be exact in float64,
        and the model in its own type no farther off than it is from itself in float64 (eight times that, a sum's scatter).
        """
        error = self._error(folds, how)
        if error <= how.limit:
            return True
        if self.strict or error == float("inf"):
            return False
        exact, rounding = self._exact(), self.own_rounding(how)
        return (
            exact is not None
            and rounding is not None
            and error <= 8 * rounding
            and self._error(folds, exact) <= exact.limit
        )

    def own_rounding(self, how: _As | None = None) -> float | None:
        """How far the model is from itself in float64; None where it does not run in it."""
        exact = self._exact()
        return None if exact is None else distance(exact.expected, (how or self.delivered).expected)

    def _exact(self) -> _As | None:
        """The model in float64; None where it does not run in it."""
        if not self._doubled:
            try:
                made = _As(
                    self._copied(self.original).double(), map_tensors(_double, self.example), TOLERANCES[torch.float64]
                )
                made.expected = self._run(made.model, made.example)
                self._doubled.append(made)
            except Exception:  # a cast to float32 in its code meets float64 weights
                self._doubled.append(None)
        return self._doubled[0]

    def _error(self, folds: Iterable[Fold], how: _As) -> float:
        candidate = self._with(folds, how.model)
        try:
            return distance(how.expected, self._run(candidate, how.example))
        except Exception:  # the model asks something of a batch norm that an Identity cannot answer
            return float("inf")

    def _run(self, model: nn.Module, example: Any) -> list[Tensor]:
        with preserving(model), evaluating(model), uncompiled(model):
            return [t.detach().clone() for t in tensors_in(self.caller.run(model, example).output)]

    def _with(self, folds: Iterable[Fold], base: nn.Module) -> nn.Module:
        """A copy of `base` with `folds` applied, in order."""
        made = self._copied(base)
        modules = dict(walk(made))
        for fold in folds:
            for absorber in fold.absorbers:
                absorber.absorb_(modules)
            _replace(made, modules[fold.site], remainder(modules[fold.site]) if fold.after else nn.Identity())
        return made

    def _copied(self, model: nn.Module) -> nn.Module:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Keras 3.15 under numpy 2: its arrays and `copy`
                made = copy.deepcopy(model)
        except Exception as error:
            raise UsageError(
                f"fold works on a copy, and {type(self.original).__name__} cannot be copied ({error}); "
                "keep only parameters, buffers and plain values in its attributes."
            ) from error
        modes = {name: module.training for name, module in walk(model)}
        for name, module in walk(made):
            module.training = modes[name]  # a copy of a Keras layer forgets it
        return made


def _plan(graph: Graph, site: Site, modules: Mapping[str, nn.Module]) -> Fold | str:
    """How `site` could be folded; a reason where it cannot."""
    if site.slot is not None:
        return say("it holds several sets of statistics, and which one applies is known only when it runs")
    if site.module.training:
        return say("it is in training mode, where it normalises by each batch: call model.eval() first")
    affine = scale_and_shift(site)
    if affine is None:
        return say("it holds no statistics, and normalises by each batch")
    visits = graph.visits_of(site.name)
    if not visits:
        return say("the example did not reach it")
    if not all(visit.plain for visit in visits):
        return say("it is called with more than one tensor, or gives more than one")
    if site.module._forward_hooks or site.module._forward_pre_hooks:
        return say("it carries hooks, which would go with it")
    if not bool(torch.isfinite(affine.scale).all() and torch.isfinite(affine.shift).all()):
        return say("its scale or shift is not finite")
    after = absorbers(graph, site, affine, modules, side="after")
    if not isinstance(after, str):
        return Fold(site.name, affine, tuple(after))
    if type(remainder(site.module)) is not nn.Identity:
        return after
    before = absorbers(graph, site, affine, modules, side="before")
    if not isinstance(before, str):
        return Fold(site.name, affine, tuple(before))
    beside = absorbers(graph, site, affine, modules, side="beside")
    return (
        say("{after}; {before}", after=after, before=before)
        if isinstance(beside, str)
        else Fold(site.name, affine, tuple(beside))
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in NARROW else tensor


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
