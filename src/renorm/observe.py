"""One pass over batches: what does each norm layer see? Beside `graph` and `prove`, only this file sets hooks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from renorm.calls import Caller, Forward, Output, nonempty, uncompiled
from renorm.errors import BatchError, UsageError
from renorm.moments import Moments, Observed
from renorm.observation import Observation, Under
from renorm.ranks import exchange, world
from renorm.sites import Site, Slotted, find_sites, select, unwrap, walk
from renorm.state import evaluating, preserving, put_


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    under: Under,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Observation:
    """Measure the inputs of every batch norm in one pass, and leave the model as it was, bit for bit.

    `under="running"` measures what the deployed model sees: everything in evaluation. The result does not depend on how the
    samples were split into batches (1e-6 relative). `under="batch"` lets every batch norm normalise by the batch it is given,
    as training does, and everything else stay in evaluation; the result is what statistics re-estimated by training mode
    would hold (AdaBN, Li et al. 2016), except that batches count by their size and between-batch variance is kept.
    With torch.distributed initialised, every rank passes its own batches and receives the moments of all.

    Raises BatchError for no batches, numbers that are not finite, or a site that saw a single value per channel;
    UsageError for another `under`.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    passing = observing(model, batches, under=under, include=include, exclude=exclude, caller=caller)
    return finish(passing, sites_to_observe(model, include=include, exclude=exclude), under=under)


def observing(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    under: Under,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    caller: Caller,
    failed: Callable[[int, Exception], None] | None = None,
) -> Generator[Observation]:
    """`observe` on this rank, yielding what was measured so far after every batch; close it to stop measuring.

    A batch that the model cannot run is told to `failed`, with its number and the exception, and left out; without it, raised.
    Between two batches the model is still being watched, in evaluation and without gradients: read nothing else meanwhile.
    """
    if under not in ("batch", "running"):
        raise UsageError(f'under says which statistics normalise while measuring: "batch" or "running"; got {under!r}.')
    model = unwrap(model)
    sites = sites_to_observe(model, include=include, exclude=exclude)
    seen: dict[str, Observed] = {}
    passed: list[tuple[str, Observed]] = []  # in this batch

    def visit(site: Site, x: Tensor) -> None:
        if not x.numel():
            return  # a detector's head without proposals, an expert without tokens
        now = measure(x, axis=site.axis, exact=under == "running")
        passed.append((site.name, now))
        if under == "batch":
            site.normalise_by_(now.values)

    held = [tensor for site in sites for tensor in site.tensors or ()] if under == "batch" else []
    kept = [tensor.detach().clone() for tensor in held]
    samples = functional = 0
    with preserving(model), evaluating(model), visiting(model, sites, visit):
        for index, batch in nonempty(batches, asked="observe", required=world() == 1):
            passed.clear()
            try:
                with _FunctionalCalls(sites) if index == 0 else ExitStack() as watch:
                    samples += caller.run(model, batch, index=index).samples
            except Exception as error:
                if failed is None:
                    raise
                failed(index, error)  # what it sent into the layers in front of the one that failed does not count
                continue
            for name, now in _brought(passed):
                seen[name] = seen[name].merge(now) if name in seen else now
            put_(held, kept)  # a quantisation-aware conv reads its batch norm's statistics before they are lent
            functional = watch.count if isinstance(watch, _FunctionalCalls) else functional
            ordered = {site.name: seen[site.name] for site in sites if site.name in seen}
            unvisited = [site.name for site in sites if site.name not in seen]
            yield Observation(
                ordered,
                under=under,
                samples=samples,
                batches=index + 1,
                unvisited=unvisited,
                functional=functional,
            )


def finish(
    passing: Generator[Observation],
    sites: Sequence[Site],
    *,
    enough: Callable[[Observation], bool] = lambda seen: False,
    under: Under = "batch",
) -> Observation:
    """Read `passing` to its end, or until `enough`, and pool what all ranks saw; when one rank fails, all raise.

    `under` is how `passing` measures: a rank without batches has no other way to know.
    Raises BatchError where no rank read a sample, or a site saw one value per channel in all.
    """
    seen = Observation({}, under=under, samples=0, batches=0, unvisited=[site.name for site in sites])
    failure: BaseException | None = None
    with closing(passing):
        try:
            for seen in passing:
                if enough(seen):
                    break
        except BaseException as error:
            failure = error
    if world() > 1:
        _raise_together(failure)
        seen = _pooled(seen, sites)
    elif failure is not None:
        raise failure
    if not seen.samples:
        raise BatchError(
            "observe was given batches on several ranks, but there was none in any of them; check the loaders."
        )
    _refuse_single_values(seen)
    return seen


def sites_to_observe(
    model: nn.Module, *, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> list[Site]:
    """The batch norm sites that `include` and `exclude` leave, with statistics or without."""
    return select([s for s in find_sites(model) if s.kind == "batch"], include=include, exclude=exclude)


@contextmanager
def visiting(model: nn.Module, sites: Iterable[Site], visit: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, `visit(site, x)` is called with the input of every normalisation at `sites`, just before it happens.

    In evaluation the layer then normalises by the statistics it holds, so that a visit that lets it hold others
    (`Site.normalise_by_`) decides what normalises. A tensor that the visit returns is normalised in place of `x`, except
    at slots and where a mask says what is present, which take none. Compiled parts run eagerly inside, scripted ones are not
    seen into; no hook stays behind.
    """
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        slotted: dict[nn.Module, dict[str, Site]] = {}
        for site in sites:
            if site.slot is not None:
                slotted.setdefault(site.module, {})[site.slot] = site
            elif not isinstance(site.module, torch.jit.ScriptModule):  # which takes no hook: nothing is seen there
                stack.callback(site.module.register_forward_pre_hook(_hook(site, visit), with_kwargs=True).remove)
        for module, places in slotted.items():
            assert isinstance(module, Slotted)
            stack.callback(setattr, module, "on_slot", module.on_slot)
            module.on_slot = _on_slot(places, visit)
        yield


def outputs_at(model: nn.Module, names: Iterable[str], batch: Any, caller: Caller) -> list[tuple[str, Tensor]]:
    """The outputs of the modules with these names on one batch, in the order they came (the first of one called twice)."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, output.detach())

        return after

    modules = dict(walk(model))
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        for name in names:
            stack.callback(modules[name].register_forward_hook(note(name)).remove)
        caller.run(model, batch)
    return list(found.items())


def measure(x: Tensor, *, axis: int = 1, exact: bool = False) -> Observed:
    """Both moments of `x` from two sums per image and channel, in one or two passes over the values.

    Within 1e-6 of the float64 moments (relative, in standard deviations) with `exact`, whatever the mean; without it within
    about 1e-5 for float32 values, at the cost of a fraction of a batch norm. Shapes: x (N, C, *).
    """
    x = x.detach().dequantize() if x.is_quantized else x.detach()
    x = x[:, None] if x.dim() == 1 else x.movedim(axis, 1)
    positions = x[0, 0].numel() if x.numel() else 0
    if not positions:
        return Observed.of(x)  # refuses an empty tensor
    space = tuple(range(2, x.dim()))
    if not space or x.dtype == torch.float64:
        return _observed(*_float64_sums(x, space), positions)
    if x.device.type == "cpu" or x.device.type == "mps":
        sums, squares = _float32_sums(x, space, exact=exact)
        observed = _observed(sums, squares, positions)
        # the difference of squares keeps 7 digits minus those of mean²/var: where that is too few, measure around the mean
        limit = 1.0 if exact else 100.0
        if bool((observed.values.mean.square() > limit * observed.values.var).any()):
            center = observed.values.mean.to(torch.float32)
            around = x.float() - center.view(1, -1, *[1] * len(space)).to(x.device)
            observed = _shifted(_observed(*_float32_sums(around, space, exact=True), positions), center)
        return observed
    return _observed(*_float64_sums(x, space), positions) if exact else _one_pass(x, space)


def present(x: Tensor, mask: Any, *, axis: int = 1) -> Tensor:
    """The positions of `x` that count, one after another, channels along `axis`; `x` itself for another kind of mask.

    Padding then moves no moments, as in training; each position counts as an image of its own.
    Shapes: x (N, C, *), mask (N, *) or its first dimensions → (positions, C), with ones between if `axis` is above 1.
    """
    positions = x.movedim(axis, -1)
    if (
        not isinstance(mask, Tensor)
        or mask.is_complex()
        or mask.shape != positions.shape[: mask.dim()]
        or not mask.dim()
    ):
        return x
    chosen = positions[mask != 0].reshape(-1, x.shape[axis])
    return chosen.reshape(len(chosen), *[1] * (axis - 1), x.shape[axis])


def _raise_together(failure: BaseException | None) -> None:
    """Raise on every rank when one failed: the others would wait for it in the next exchange until it times out."""
    ranks = exchange(torch.tensor([float(failure is not None)]))
    if failure is not None:
        raise failure
    others = [str(rank) for rank, flag in enumerate(ranks) if float(flag)]
    if others:
        raise BatchError(f"observe stopped because rank {', '.join(others)} failed; its own message says why.")


def _pooled(seen: Observation, sites: Sequence[Site]) -> Observation:
    """The observation of all ranks together, equal on every rank to the last bit."""
    channels = {site.name: site.channels for site in sites}
    flat = [torch.tensor([seen.samples, seen.batches, seen.functional], dtype=torch.float64)]
    for name, size in channels.items():
        for m in seen.get(name, (None, None)):
            flat += (
                [torch.tensor([m.count], dtype=torch.float64), m.mean.cpu(), m.var.cpu()]
                if m
                else [torch.zeros(1 + 2 * size)]
            )
    ranks = exchange(torch.cat([part.to(torch.float64) for part in flat]))

    merged: dict[str, Observed] = {}
    for rank in (r.cpu() for r in ranks):
        at = 3
        for name, size in channels.items():
            parts = []
            for _ in range(2):
                parts.append(
                    Moments(float(rank[at]), rank[at + 1 : at + 1 + size], rank[at + 1 + size : at + 1 + 2 * size])
                )
                at += 1 + 2 * size
            if parts[0].count:
                now = Observed(*parts)
                merged[name] = merged[name].merge(now) if name in merged else now
    totals = torch.stack([r[:2].cpu() for r in ranks]).sum(0)
    return Observation(
        {name: merged[name] for name in channels if name in merged},
        under=seen.under,
        samples=int(totals[0]),
        batches=int(totals[1]),
        unvisited=[name for name in channels if name not in merged],
        functional=seen.functional,
    )


def _hook(site: Site, visit: Callable[[Site, Tensor], Tensor | None]) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "" if args else next(iter(kwargs))
        value = args[0] if args else kwargs[name]
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        if mask is not None:  # what is present is no longer in the input's shape, so nothing can take its place
            visit(site, present(value, mask, axis=site.axis))
            return None
        instead = visit(site, value)
        if instead is None:
            return None
        return ((instead, *args[1:]), kwargs) if args else (args, {**kwargs, name: instead})

    return before


def _on_slot(places: dict[str, Site], visit: Callable[[Site, Tensor], Tensor | None]) -> Callable[[str, Tensor], None]:
    def before(slot: str, x: Tensor) -> None:
        if slot in places:
            visit(places[slot], x)

    return before


def _float32_sums(x: Tensor, space: tuple[int, ...], *, exact: bool) -> tuple[Tensor, Tensor]:
    sums = x.sum(space, dtype=torch.float32)
    if exact or not x.is_contiguous():
        squares = x.float().square().sum(space)  # summed pairwise, unlike a norm
    else:
        squares = torch.linalg.vector_norm(x, dim=space, dtype=torch.float32).square()
    return sums, squares


def _float64_sums(x: Tensor, space: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float64)
    if not space:
        return wide, wide.square()
    return wide.sum(space), wide.square().sum(space)


def _observed(sums: Tensor, squares: Tensor, positions: int) -> Observed:
    """Moments from each image's sum and sum of squares. Shapes: both (N, C)."""
    if sums.device.type == "mps":
        sums, squares = sums.cpu(), squares.cpu()
    means = sums.to(torch.float64) / positions
    return _of_images(means, (squares.to(torch.float64) / positions - means.square()).clamp_min(0), positions)


def _one_pass(x: Tensor, space: tuple[int, ...]) -> Observed:
    """Welford's pass over every image around the first one's mean, in float32: nothing wide is made, nothing waited for."""
    center = x[:1].float().mean((0, *space))
    var, mean = torch.var_mean(x - center.view(1, -1, *[1] * len(space)), space, correction=0)
    return _of_images(mean.double() + center.double(), var.double(), x[0, 0].numel())


def _brought(passed: Sequence[tuple[str, Observed]]) -> Iterator[tuple[str, Observed]]:
    """The same on the processor, where small sums are cheap, by one transfer from the device that all of them lie on."""
    vectors: Sequence[Tensor] = [vector for _, seen in passed for m in seen for vector in (m.mean, m.var)]
    if len({vector.device for vector in vectors}) > 1:
        vectors = [vector.cpu() for vector in vectors]
    elif vectors and vectors[0].device.type != "cpu":
        vectors = torch.split(torch.cat(list(vectors)).cpu(), [len(vector) for vector in vectors])
    left = iter(vectors)
    for name, seen in passed:
        yield name, Observed(*(Moments(m.count, next(left), next(left)) for m in seen))


def _of_images(means: Tensor, variances: Tensor, positions: int) -> Observed:
    """Moments from each image's. Shapes: both (N, C), float64."""
    spread, mean = torch.var_mean(means, dim=0, correction=0)
    # variance of all = mean variance within images + variance between their means: nothing large cancels between images
    whole = Moments(len(means) * positions, mean, variances.mean(0) + spread)
    return Observed(whole, Moments(len(means), mean, spread))


def _shifted(observed: Observed, center: Tensor) -> Observed:
    by = center.to(observed.values.mean)
    return Observed(*(replace(m, mean=m.mean + by) for m in observed))


def _refuse_single_values(seen: Mapping[str, Observed]) -> None:
    alone = [repr(name) if name else "the model itself" for name, observed in seen.items() if observed.values.count < 2]
    if alone:
        raise BatchError(
            f"the batches gave {', '.join(alone[:3])}{' and others' if len(alone) > 3 else ''} one value per channel in all "
            "(one image, maps of 1 × 1), and one value has no variance; pass more images."
        )


class _FunctionalCalls(TorchFunctionMode):
    """Counts batch norms that are called as functions, with statistics that belong to no site."""

    def __init__(self, sites: Iterable[Site]) -> None:
        super().__init__()
        self.count = 0
        # by storage, since a module of several slots passes views; a module without statistics passes None for them
        self._known = {_storage(site.tensors[0] if site.tensors else None) for site in sites}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm or func is torch.batch_norm:
            at = 1 if func is F.batch_norm else 3  # where each has its running mean
            mean = args[at] if len(args) > at else (kwargs or {}).get("running_mean")
            self.count += _storage(mean) not in self._known
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()
