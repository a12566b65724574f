"""Hold norm layers still, so that neither `train()` nor an optimiser moves them, and let them go again exactly.

What is held is written in the module itself, as two plain attributes: an instance's own `train`, which keeps the module in
evaluation, and the list of what holds it. So copies and pickles of a frozen model are frozen, and can be let go, on their
own; the class, the keys of `state_dict` and the hooks stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from torch import Tensor, nn

from renorm.errors import NoBatchNorm, OpenChange, UsageError
from renorm.sites import Site, find_sites, is_keras, is_lazy, select, unwrap, walk
from renorm.state import closed, opened, refuse_if_later


def freeze_(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = True,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> Freeze:
    """Until restored, no `train()`, forward or optimiser moves the norm layers of `model` whose names match.

    statistics  running statistics stay, and normalise in training too (the layer stays in evaluation)
    affine      weight and bias ask for no gradient and have none, so that momentum and weight decay pass them by as well

    Two switches: for batch norm the first alone lets the affine train on fixed statistics, the second alone is what
    `requires_grad_(False)` does. Layers without statistics (layer, group, rms norm) have only the second.
    Copies, pickles, compiled, exported and wrapped models stay frozen; `convert_sync_batchnorm` makes new layers, which are
    not. Inside DistributedDataParallel freeze the affine before wrapping: it waits for gradients that it was promised.

    Raises NoBatchNorm for a model without norm layers (with `affine=False`: without running statistics), UsageError where
    the patterns leave none, both switches are off, a lazy layer holds no statistics yet, or a module holds several places
    of which only some match.
    """
    if not (statistics or affine):
        raise UsageError("freeze_ was asked to freeze neither statistics nor affine; give at least one of them.")
    every = find_sites(model)
    able = [site for site in every if affine or site.tensors is not None or is_lazy(site)]
    if not able:
        wants = "norm layers" if affine else "norm layers with running statistics"
        kinds = ", ".join(sorted({site.kind for site in every}))
        raise NoBatchNorm(
            f"freeze_ needs {wants}; {type(unwrap(model)).__name__} has none"
            + (f" (only {kinds} norm, which has an affine alone: affine=True)." if every else ".")
        )
    chosen = select(able, include=include, exclude=exclude)
    if not chosen:
        raise UsageError(
            f"freeze_ was asked to freeze {include!r} without {exclude!r}, and of {len(able)} norm layers, "
            f"{able[0].name!r} first, none is left by that."
        )
    lazy = [site.name for site in chosen if statistics and is_lazy(site)]
    if lazy:
        raise UsageError(
            f"freeze_ was asked to hold the statistics of {lazy[0] or 'the model itself'!r}, a lazy layer that has seen no "
            "input and holds none yet; run the model on one batch yourself, then freeze it."
        )
    _refuse_half_modules(able, chosen)
    return hold_(
        "freeze_", model, chosen if statistics else [], {id(p) for s in chosen if affine for p in s.affine.values()}
    )


def unfreeze_(model: nn.Module) -> None:
    """Let go of everything in `model` that freezes and policies hold, the latest first; without any, nothing happens.

    Each module is then in the mode last asked for, and `requires_grad` as before. Works on copies of a frozen model too.
    Raises OpenChange, naming it, where a later change of another kind at the same layers still stands.
    """
    held = [(name, module) for name, module in walk(unwrap(model)) if _KEY in module.__dict__]
    for name, module in held:
        refuse_if_later(module, _holds(module).stack, name=name)
    for _, module in held:
        for hold in reversed(list(_holds(module).stack)):
            _release(module, hold)


@contextmanager
def frozen(
    model: nn.Module,
    statistics: bool = True,
    affine: bool = True,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> Iterator[Freeze]:
    """`freeze_` for the length of a `with` block; whatever happens inside, the model is let go at its end."""
    handle = freeze_(model, statistics=statistics, affine=affine, include=include, exclude=exclude)
    try:
        yield handle
    finally:
        handle.restore_()


@dataclass(frozen=True, eq=False)
class Freeze:
    """What one call holds still: the `statistics` of these sites, and these `parameters`, by name."""

    label: str
    statistics: tuple[str, ...]
    parameters: tuple[str, ...]
    held: tuple[tuple[str, nn.Module, Hold], ...] = field(repr=False)

    @property
    def is_open(self) -> bool:
        """Whether any of it is still held."""
        return any(_holds(module).has(hold) for _, module, hold in self.held)

    def restore_(self) -> None:
        """Let go: each module in the mode last asked for, `requires_grad` and gradients as they were; once is enough.

        Raises OpenChange, naming the later change and a place, where one at the same modules still stands.
        """
        still = [(name, module, hold) for name, module, hold in self.held if _holds(module).has(hold)]
        for name, module, hold in still:
            last = _holds(module).stack[-1]
            if last is not hold:
                raise OpenChange(
                    f"undoing {self.label} was asked for, but {last.label} came after it at "
                    f"{name or 'the model itself'!r} and still stands; restore that one first, or let go of all "
                    "with unfreeze_(model)."
                )
            refuse_if_later(module, [hold], name=name)
        for _, module, hold in still:
            _release(module, hold)


@dataclass(eq=False)
class Hold:
    """What one change holds at one module, and how it found it."""

    label: str
    statistics: bool
    flags: dict[str, bool]
    grads: dict[str, Tensor] = field(default_factory=dict)
    keras: bool | None = None  # what `_trainable` was

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"grads": {}}  # copies and pickles of parameters carry no gradients either


@dataclass(eq=False)
class Holds:
    """Everything that holds one module: the last of the `stack` must go first.

    asked   the mode that `train()` or `eval()` last asked for
    train   what stood in `module.__dict__["train"]` before
    """

    asked: bool
    train: Callable[[bool], Any] | None
    stack: list[Hold] = field(default_factory=list)

    def has(self, hold: Hold) -> bool:
        return any(one is hold for one in self.stack)


def hold_(label: str, model: nn.Module, still: Sequence[Site], stopped: set[int]) -> Freeze:
    """Hold the statistics of the sites `still` and the parameters whose `id` is in `stopped`; all of it, or nothing."""
    statistics = {site.module: site.name for site in still if site.tensors is not None}
    held: list[tuple[str, nn.Module, Hold]] = []
    parameters: list[str] = []
    waiting = set(stopped)  # a parameter under two names is held where it is met first
    try:
        for name, module in walk(unwrap(model)):
            switches = {key: s for key, s in _switches(module).items() if id(s.value) in waiting}
            waiting -= {id(s.value) for s in switches.values()}
            if module not in statistics and not switches:
                continue
            hold = Hold(label, module in statistics, {key: s.trainable for key, s in switches.items()})
            held.append((name, module, hold))
            _take(module, hold, switches)
            parameters += [f"{name}.{key}" if name else key for key in switches]
    except BaseException:
        for _, module, hold in reversed(held):
            if _holds(module).has(hold):
                _release(module, hold)
        raise
    names = tuple(site.name for site in still if site.module in statistics)
    return Freeze(label, names, tuple(parameters), tuple(held))


def holds_statistics(module: nn.Module) -> bool:
    """Whether a freeze or a policy holds the statistics of `module`."""
    return any(hold.statistics for hold in _holds(module).stack)


def held_by(model: nn.Module, label: str) -> str | None:
    """The name of the first module at which a change of that label stands; None where none does."""
    for name, module in walk(unwrap(model)):
        if any(hold.label == label for hold in _holds(module).stack):
            return name or "the model itself"
    return None


_KEY = "_renorm_holds"


def _holds(module: nn.Module) -> Holds:
    return cast(Holds, module.__dict__.get(_KEY) or Holds(module.training, None))


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train(mode)` of a held module: its children hear of it, it remembers it, and it stays in evaluation."""
    holds = _holds(module)
    train = holds.train or functools.partial(type(module).train, module)
    train(mode)
    holds.asked = module.training
    module.training = False
    return module


def _take(module: nn.Module, hold: Hold, switches: dict[str, Switch]) -> None:
    holds = module.__dict__.setdefault(_KEY, Holds(module.training, None))
    if hold.statistics and not any(other.statistics for other in holds.stack):
        holds.asked, holds.train = module.training, module.__dict__.get("train")
        # through __dict__: torch and Keras both look closely at what is set on a module
        module.__dict__["train"] = functools.partial(_stay, module)
        module.training = False
    if hold.statistics and is_keras(module):
        hold.keras = module.__dict__["_trainable"]
        module.__dict__["_trainable"] = False
    holds.stack.append(hold)
    opened(module, hold)
    for key, switch in switches.items():
        if switch.value.grad is not None:
            hold.grads[key] = switch.value.grad
            switch.value.grad = None
        switch.trainable = False


def _release(module: nn.Module, hold: Hold) -> None:
    holds = _holds(module)
    holds.stack = [other for other in holds.stack if other is not hold]
    closed(module, hold)
    if hold.keras is not None:
        module.__dict__["_trainable"] = hold.keras
    for key, switch in _switches(module).items():
        if key in hold.flags:
            switch.trainable = hold.flags[key]
            if switch.value.grad is None:
                switch.value.grad = hold.grads.get(key)
    if hold.statistics and not any(other.statistics for other in holds.stack):
        del module.__dict__["train"]
        if holds.train is not None:
            module.__dict__["train"] = holds.train
        module.training = holds.asked
    if not holds.stack:
        del module.__dict__[_KEY]


class Switch(Protocol):
    """One parameter and whether it trains: a Keras variable, or `_Parameter` for torch's."""

    trainable: bool

    @property
    def value(self) -> nn.Parameter: ...


@dataclass
class _Parameter:
    value: nn.Parameter

    @property
    def trainable(self) -> bool:
        return self.value.requires_grad

    @trainable.setter
    def trainable(self, on: bool) -> None:
        self.value.requires_grad = on  # not requires_grad_(), which lazy parameters refuse


def _switches(module: nn.Module) -> dict[str, Switch]:
    """A module's own parameters; Keras' by their variables, which must agree with the tensors they hold."""
    if is_keras(module):
        return {variable.name: variable for variable in cast(Any, module)._trainable_variables}
    own = {key: p for key, p in module._parameters.items() if p is not None and p.dtype.is_floating_point}
    return {key: _Parameter(p) for key, p in own.items()}


def _refuse_half_modules(able: Sequence[Site], chosen: Sequence[Site]) -> None:
    names = {site.name for site in chosen}
    for site in able:
        if site.name not in names and any(other.module is site.module for other in chosen):
            among = next(other.name for other in chosen if other.module is site.module)
            raise UsageError(
                f"freeze_ was asked to freeze {among!r} but not {site.name!r}, which is the same module; "
                f"it moves or stays as a whole: match {among.partition('@')[0] + '@*'!r}."
            )
