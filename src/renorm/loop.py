"""What a training loop does to its norm layers: counted while it runs, and nothing of it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from renorm.errors import UsageError
from renorm.freeze import holds_statistics
from renorm.moments import Moments
from renorm.sites import Site, find_sites, is_keras, is_lazy, unwrap, wrappers
from renorm.tally import Counts, Kept, Tally, by_place

__all__ = ["Loop", "Watching", "optimizers_in"]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What was counted so far: `steps` of the optimisers, `forwards` of the model in training, `counts` by site.

    waiting   the most forwards in training before one backward; 0 where no backward was seen
    still     sites that stood still on purpose when the watch began: held, or in evaluation in a model in training
    loose     sites of `still` at which another layer, which is not held, stands now
    poisoned  {site: its statistics with the last finite value of each channel}, where they are not finite though all
              weights are
    """

    steps: int
    forwards: int
    counts: Mapping[str, Counts]
    waiting: int = 0
    still: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()
    poisoned: Mapping[str, Moments] = field(default_factory=dict)


class Watching:
    """Counts from `open` to `close`: hooks on norm layers and steps, and the counters of layers in compiled parts.

    A hook in a compiled part would be passed over, or change what is compiled; there `num_batches_tracked` is looked at
    before and after each call instead. Copies and pickles of the model carry a hook that does nothing.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        self._model = model
        self._root = unwrap(model)
        self._optimizers = list(optimizers)
        self._chain = wrappers(model)
        self._steps = self._forwards = self._forward = self._waiting = self._most = 0
        self._validating = False
        self._stack = ExitStack()
        self._tallies = [Tally(site, self._owner(site)) for site in _movable(self._root)]
        self._still = frozenset(t.site.name for t in self._tallies if _meant_still(t.site, self._root))
        self._kept = [Kept(group) for group in by_place(self._tallies)]

    def open(self) -> None:
        """Set every hook, or none."""
        try:
            self._set_hooks()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take every hook away; what was counted stays. A second call does nothing."""
        self._stack.close()

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Inside, every update is one that validation makes."""
        before, self._validating = self._validating, True
        try:
            yield
        finally:
            self._validating = before

    def seen(self) -> Loop:
        """What was counted so far."""
        now = {site.name: site for site in find_sites(self._root)}
        replaced = {t.site.name for t in self._tallies if _module(now.get(t.site.name)) is not t.site.module}
        loose = {n for n in replaced & self._still if n in now and not holds_statistics(now[n].module)}
        return Loop(
            steps=self._steps,
            forwards=self._forwards,
            counts={t.site.name: t.counts() for t in self._tallies},
            waiting=self._most,
            still=self._still,
            loose=frozenset(loose),
            poisoned={name: good for kept in self._kept for name, good in kept.poisoned()},
        )

    def _owner(self, site: Site) -> int:
        """Which optimiser's steps end a step of this site: that which holds its affine, else the first."""
        own = {id(p) for p in site.affine.values()}
        for index, optimizer in enumerate(self._optimizers):
            if own & {id(p) for group in optimizer.param_groups for p in group["params"]}:
                return index
        return 0

    def _set_hooks(self) -> None:
        inside: set[nn.Module] = set()
        for module in dict.fromkeys((*self._chain, *self._root.modules())):
            if (inner := _compiled(module)) is not None:
                sites = [t for t in self._tallies if t.site.module in set(inner.modules()) - inside]
                inside |= set(inner.modules())
                self._poll(module, sites, root=self._root in inside)
        if self._root not in inside:
            self._hook(self._root, lambda module, args: self._enter())
            leave = _Hook(self._root, lambda *_: self._leave())
            self._stack.callback(self._root.register_forward_hook(leave, always_call=True).remove)
        for tally in self._tallies:
            tally.polled = tally.site.module in inside
            if not tally.polled:
                self._hook(tally.site.module, self._counter(tally))
        for index, optimizer in enumerate(self._optimizers):
            after = optimizer.register_step_post_hook(lambda *_, index=index: self._stepped(index))
            self._stack.callback(after.remove)
        marker = next((p for p in self._markers() if p.requires_grad and p.is_leaf), None)
        if marker is not None:
            hook: Any = marker.register_post_accumulate_grad_hook  # untyped
            self._stack.callback(hook(self._went_back).remove)

    def _hook(self, module: nn.Module, what: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        self._stack.callback(module.register_forward_pre_hook(_Hook(module, what)).remove)

    def _markers(self) -> Iterator[nn.Parameter]:
        """Parameters whose gradient tells of a backward: those of norm layers first."""
        yield from (p for tally in self._tallies for p in tally.site.affine.values())
        yield from self._root.parameters()

    def _poll(self, module: nn.Module, tallies: list[Tally], *, root: bool) -> None:
        """Before and after each call of a compiled part, look at its counters."""

        def before() -> None:
            if root:
                self._enter()
            for tally in tallies:
                tally.look()  # what moved since, a broadcast or a loaded checkpoint, is no update

        def after() -> None:
            for tally in tallies:
                for _ in range(tally.look()):
                    self._count(tally, samples=0)
            if root:
                self._leave()

        if (own := getattr(module, "_compiled_call_impl", None)) is not None:
            module._compiled_call_impl = _Around(own, before, after)
            self._stack.callback(setattr, module, "_compiled_call_impl", own)
        else:
            self._hook(module, lambda *_: before())
            self._stack.callback(module.register_forward_hook(_Hook(module, lambda *_: after())).remove)

    def _counter(self, tally: Tally) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training:
                x = args[0] if args else None
                self._count(tally, samples=x.shape[0] if isinstance(x, Tensor) and x.dim() else 0)

        return before

    def _count(self, tally: Tally, *, samples: int) -> None:
        if not tally.moves():
            return
        if _in_backward():
            tally.again += 1
            return
        if self._validating:
            tally.validating += 1
        elif torch.is_grad_enabled():
            tally.live += 1
        else:
            tally.silent += 1
        tally.called(self._forward)
        tally.samples = min(tally.samples or samples, samples or tally.samples)

    def _enter(self) -> None:
        """The model is called: a new forward begins."""
        self._forward = abs(self._forward) + 1
        if self._root.training and not _in_backward():
            self._forwards += 1
            if torch.is_grad_enabled():
                self._waiting += 1

    def _leave(self) -> None:
        """The forward ended: what is called before the next one is called from elsewhere."""
        self._forward = -abs(self._forward)

    def _went_back(self, parameter: Tensor) -> None:
        self._most, self._waiting = max(self._most, self._waiting), 0

    def _stepped(self, index: int) -> None:
        """An optimiser took a step: what moved since its last one belongs to this one."""
        self._steps += 1
        for tally in self._tallies:
            if tally.owner == index:
                if tally.polled:
                    tally.again += tally.look()  # in no call of the model, so in the backward
                tally.close_step()
        for kept in self._kept:
            kept.keep()


class _Hook:
    """A hook of one module; in a copy or a pickle of that module it does nothing."""

    def __init__(self, module: nn.Module | None, what: Callable[..., None]) -> None:
        self._module = module
        self._what = what

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if module is self._module:
            self._what(module, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, _nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, _nothing)


def _nothing(*args: Any) -> None:
    pass


class _Around:
    """A compiled call, with something before and after it."""

    def __init__(self, call: Callable[..., Any], before: Callable[[], None], after: Callable[[], None]) -> None:
        self._call = call
        self._before = before
        self._after = after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._before()
        result = self._call(*args, **kwargs)
        self._after()
        return result


def optimizers_in(given: object) -> list[Optimizer]:
    """The torch optimisers in what a user gave: one, several, None, or those inside of accelerate's and Lightning's.

    Raises UsageError for anything else.
    """
    if given is None:
        return []
    several = list(given) if isinstance(given, list | tuple) else [given]
    found = []
    for one in several:
        while (inner := getattr(one, "optimizer", None)) is not None:
            one = inner
        if not isinstance(one, Optimizer):
            raise UsageError(f"optimizer is a torch optimiser, or a list of them; got {type(one).__name__}.")
        found.append(one)
    return found


def _movable(root: nn.Module) -> list[Site]:
    """The batch norms whose statistics a torch forward can move, each module once."""
    sites = [s for s in find_sites(root) if s.kind == "batch" and not is_lazy(s) and not is_keras(s.module)]
    able = [s for s in sites if s.tensors is not None and hasattr(s.module, "momentum")]
    return list({id(site.module): site for site in reversed(able)}.values())[::-1]


def _meant_still(site: Site, root: nn.Module) -> bool:
    """Whether the layer stands still on purpose: held, or alone in evaluation, or with an affine that does not train."""
    affine = site.affine.values()
    stopped = bool(affine) and not any(p.requires_grad for p in affine)
    trains = any(p.requires_grad for p in root.parameters())
    return holds_statistics(site.module) or (not site.module.training and (root.training or (stopped and trains)))


def _compiled(module: nn.Module) -> nn.Module | None:
    """What runs compiled where `module` is called; None where nothing does."""
    if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        return inner
    return module if getattr(module, "_compiled_call_impl", None) is not None else None


def _module(site: Site | None) -> nn.Module | None:
    return None if site is None else site.module


# what torch.utils.checkpoint asks too: the number of the backward that runs in this thread, -1 for none
_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def _in_backward() -> bool:
    return _task() != -1
