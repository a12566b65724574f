"""Give the layers of a compressed or merged network the moments that they had in the networks it was made from.

Rounding, pruning and averaging move what every layer gives; on the same images its source says what it gave before. So the
goal is known for any images, whatever their classes, and what sampling does to both sides cancels. This is REPAIR (Jordan
et al. 2023) for merged networks, and bias correction (Nagel et al. 2019) for one source and the mean alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from renorm.absorb import Absorber
from renorm.affine import Affine
from renorm.calls import Caller, Forward, nonempty
from renorm.errors import BatchError, UsageError
from renorm.fold import fold
from renorm.graph import Graph, giving, watch
from renorm.moments import TINY, Moments
from renorm.observe import measure, visiting
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site, find_sites, select, unwrap, walk
from renorm.state import Undo, evaluating, preserving

__all__ = ["Match", "Repaired", "repair_"]

Match = Literal["moments", "mean"]


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What `repair_` moved, and what it left.

    recalibrated  the batch norms that hold other statistics now
    rescaled      {layer: the scale and shift its outputs were given}, the scale 1 where only its bias could move
    kept          {place: why nothing was changed there}
    shifts        {place: how far its moments lay from the sources', with everything before it repaired}
    samples       how many samples were read
    """

    recalibrated: tuple[str, ...]
    rescaled: Mapping[str, Affine]
    kept: Mapping[str, str]
    shifts: Mapping[str, Shift]
    samples: int
    undo: Undo

    def restore_(self) -> None:
        """Give the model its weights, biases and statistics back, bit for bit; a second call does nothing.

        Raises OpenChange where a later change at the same layers still stands.
        """
        self.undo.restore_()


def repair_(
    model: nn.Module,
    sources: nn.Module | Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    match: Match = "moments",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    channels_last: bool = False,
) -> Repaired:
    """Let every layer of `model` have, per channel, the mean and spread that its `sources` have there on the same batches.

    sources   the network that `model` was rounded or pruned from, or those it was merged from; a source whose batch norms
              were folded away in `model` is folded first, in a copy
    batches   unlabelled batches, read once; they need not be mixed as the training data were
    weights   the share of each source, 1 in all; None: equal shares. Means and standard deviations are mixed so
    match     "moments": mean and standard deviation; "mean": the mean alone, by which no weight moves (a batch norm's
              statistics always follow both)

    Batch norms hold new statistics. A convolution or linear layer that no batch norm reads is rescaled: a batch norm behind
    it, with the sources' moments as its affine, folded into its weight and bias. Where the weight is no plain parameter
    (quantised, parametrised) its bias alone is moved. Layers are measured with all those before them repaired. A failure
    at any point leaves the model bit-identical.

    Raises UsageError for no source, shares that do not fit, the model among its sources, or nothing that could be repaired;
    BatchError for batches that cannot be used or moments that are not finite.
    """
    originals = _sources(model, sources)
    shares = _shares(weights, len(originals))
    if match not in get_args(Match):
        raise UsageError(f"match is {' or '.join(map(repr, get_args(Match)))}; got {match!r}.")
    model = unwrap(model)
    caller = Caller(forward=forward, device=device, channels_last=channels_last)
    numbered = nonempty(batches, asked="repair_")
    _, first = next(numbered)
    originals = [_alike(source, model, first, forward=forward, device=device) for source in originals]
    places, kept = _places(model, originals, first, caller, include=include, exclude=exclude)
    if not places:
        raise UsageError(
            f"repair_ was asked to mend {type(model).__name__}, and found no layer that it shares with its sources and that "
            f"could be changed{f' ({next(iter(kept.values()))})' if kept else ''}."
        )
    work = _Repair(model, originals, shares, places, match=match)
    with work.watching():
        samples = work.see(first, caller)
        for _, batch in numbered:
            samples += work.see(batch, caller)
    undo = Undo("repair_", {place.site.name: place.site.module for place in places}, parameters=True)
    try:
        repaired = work.write_()
    except BaseException:
        undo.restore_()
        raise
    kept |= {place.site.name: say("no batch reached it") for place in places if place.site.name not in repaired}
    return Repaired(
        recalibrated=tuple(name for name, affine in repaired.items() if affine is None),
        rescaled={name: affine for name, affine in repaired.items() if affine is not None},
        kept=kept,
        shifts={name: Shift.between(work.goal(name), work.seen[name]) for name in repaired},
        samples=samples,
        undo=undo,
    )


@dataclass(frozen=True)
class _Place:
    """Where moments are compared: what a batch norm reads, or what a layer gives; `weight` names what takes its scale."""

    site: Site
    gives: bool
    weight: str | None = None
    held: Sequence[Moments] = ()  # each source's statistics, of a batch norm


@dataclass
class _Repair:
    """What the model and its sources have shown so far, and the maps between them."""

    model: nn.Module
    sources: list[nn.Module]
    shares: list[float]
    places: list[_Place]
    match: Match
    seen: dict[str, Moments] = field(default_factory=dict)
    told: list[dict[str, Moments]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every forward of a source is measured, and every one of the model measured and set right."""
        self.told = [{} for _ in self.sources]
        with ExitStack() as stack:
            for source, told in zip(self.sources, self.told, strict=True):
                self._watch(stack, source, told, mends=False)
            self._watch(stack, self.model, self.seen, mends=True)
            yield

    def _watch(self, stack: ExitStack, model: nn.Module, seen: dict[str, Moments], *, mends: bool) -> None:
        """Where a source, which is never changed, is the same module under two wrappers, it is measured twice."""
        for context in (preserving(model), evaluating(model)):
            stack.enter_context(context)
        modules = dict(walk(model))
        sites = {site.name: site for site in find_sites(model)}
        reads = [sites[place.site.name] for place in self.places if not place.gives]
        layers = {place.site.name: modules[place.site.name] for place in self.places if place.gives}
        by_name = {place.site.name: place for place in self.places}

        def note(name: str, x: Tensor) -> bool:
            if not x.numel():
                return False
            now = measure(x, axis=by_name[name].site.axis, exact=True).values.to("cpu")
            seen[name] = seen[name].merge(now) if name in seen else now
            return True

        def visit(site: Site, x: Tensor) -> None:
            if note(site.name, x) and mends and self._is_told(site.name):
                site.normalise_by_(self.statistics(by_name[site.name]))

        def gave(name: str, y: Tensor) -> Tensor | None:
            if not (note(name, y) and mends and self._is_told(name)):
                return None
            affine = self.affine(by_name[name])
            return Affine(*(v.to(y) for v in affine))(y, axis=by_name[name].site.axis)

        stack.enter_context(visiting(model, reads, visit))
        stack.enter_context(giving(model, layers, gave))

    def see(self, batch: Any, caller: Caller) -> int:
        """Run the sources, then the model, on one batch; how many samples it had."""
        for source in self.sources:
            caller.run(source, batch)
        return caller.run(self.model, batch).samples

    def _is_told(self, name: str) -> bool:
        return all(name in told for told in self.told)

    def goal(self, name: str) -> Moments:
        """The sources' moments at a place, mixed by their shares: means and standard deviations, not variances."""
        return _mixed([told[name] for told in self.told], self.shares)

    def _spread(self, name: str) -> Tensor:
        """The model's standard deviation as a multiple of the sources'; 1 where either has none."""
        seen, goal = self.seen[name], self.goal(name)
        alive = (seen.var > TINY) & (goal.var > TINY)
        return torch.where(alive, (seen.var / goal.var.clamp_min(TINY)).sqrt(), 1.0)

    def statistics(self, place: _Place) -> Moments:
        """What a batch norm must hold to give, on what it reads, what the sources' gave."""
        seen, goal, spread = self.seen[place.site.name], self.goal(place.site.name), self._spread(place.site.name)
        held = _mixed(place.held, self.shares)
        mean = seen.mean + spread * (held.mean - goal.mean)
        return Moments(math.inf, mean, held.var * spread.square())

    def affine(self, place: _Place) -> Affine:
        """The scale and shift by which a layer's outputs get the sources' moments."""
        seen, goal = self.seen[place.site.name], self.goal(place.site.name)
        moves = self.match == "moments" and place.weight is not None
        scale = 1 / self._spread(place.site.name) if moves else torch.ones_like(seen.mean)
        return Affine(scale, goal.mean - seen.mean * scale)

    def write_(self) -> dict[str, Affine | None]:
        """Change the model; the scale and shift of every layer that was reached, None for a batch norm."""
        modules = dict(walk(self.model))
        made: dict[str, Affine | None] = {}
        for place in self.places:
            name = place.site.name
            if name not in self.seen or not self._is_told(name):
                continue
            held, affine = (None, self.affine(place)) if place.gives else (self.statistics(place), None)
            moved = (held.mean, held.var) if held is not None else tuple(affine or ())
            if not all(bool(torch.isfinite(values).all()) for values in moved):
                raise BatchError(
                    f"the moments measured at {name!r} are not finite: activations overflow on these batches. "
                    "Check the inputs' scale, or run in float32."
                )
            if held is not None:
                place.site.write_(held)
            elif affine is not None:
                _rescale_(modules, place, affine)
            made[name] = affine
        return made


def _rescale_(modules: Mapping[str, nn.Module], place: _Place, affine: Affine) -> None:
    layer, name = modules[place.site.name], place.site.name
    if place.weight is not None and bool((affine.scale != 1).any()):
        transposed = bool(getattr(layer, "transposed", False))
        groups = int(getattr(layer, "groups", 1)) if transposed else 1
        out_dim = 2 if transposed else 1
        after = Absorber("after", name, place.weight, (name, "bias"), groups, out_dim, *affine)
        after.absorb_(modules)
        return
    held, like = layer._parameters["bias"], next(t for t in layer.parameters() if t.is_floating_point())
    shift = affine.shift if held is None else affine.shift.to(held.device) + held.detach().double()
    if held is None:
        layer.bias = nn.Parameter(shift.to(like.device, like.dtype), requires_grad=like.requires_grad)
    else:
        held.data.copy_(shift)


def _mixed(moments: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """The mean of means and of standard deviations, by shares, on the CPU."""
    pairs = [(share, m.to("cpu")) for share, m in zip(shares, moments, strict=True)]
    mean = sum((share * m.mean for share, m in pairs), torch.zeros(()))
    spread = sum((share * m.var.clamp_min(0).sqrt() for share, m in pairs), torch.zeros(()))
    return Moments(moments[0].count, mean, spread.square())


def _sources(model: nn.Module, given: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    sources = [unwrap(source) for source in ([given] if isinstance(given, nn.Module) else given)]
    if not sources:
        raise UsageError("repair_ was given no source; pass the network that the model was made from, or several.")
    if any(source is unwrap(model) for source in sources):
        raise UsageError(
            "repair_ was given the model itself among its sources: nothing could differ. Keep a copy of the network "
            "(copy.deepcopy) before it is quantised, pruned or merged."
        )
    return sources


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    shares = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    sound = all(math.isfinite(share) and share >= 0 for share in shares) and abs(sum(shares) - 1) < 1e-6
    if len(shares) != count or not sound:
        raise UsageError(
            f"weights are the share of each source, none below 0 and 1 in all; got {weights!r} for {count} sources."
        )
    return shares


def _alike(source: nn.Module, model: nn.Module, example: Any, **how: Any) -> nn.Module:
    """`source`, folded where it has batch norms that `model` lacks."""
    more = _norms(source).keys() - _norms(model).keys()
    if more:
        source = fold(source, example, **how).model
        more = _norms(source).keys() - _norms(model).keys()
    if more or (missing := _norms(model).keys() - _norms(source).keys()):
        name, where = (sorted(more)[0], "a source") if more else (sorted(missing)[0], "the model")
        raise UsageError(
            f"repair_ compares layer by layer, and only {where} has a batch norm at {name!r}, which folding does not mend. "
            "Give the source in the form that the model was made from."
        )
    return source


def _norms(model: nn.Module) -> dict[str, Site]:
    return {s.name: s for s in find_sites(model) if s.kind == "batch" and s.tensors is not None}


def _places(
    model: nn.Module,
    sources: Sequence[nn.Module],
    example: Any,
    caller: Caller,
    *,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
) -> tuple[list[_Place], dict[str, str]]:
    """Every batch norm, and every layer that not only a batch norm reads; why others of them are left."""
    norms, layers = _norms(model), _layers(model)
    everywhere = [*norms.values(), *layers.values()]
    graph = watch(model, example, sites=everywhere, caller=caller)
    theirs = [{**_layers(source), **_norms(source)} for source in sources]
    tied = _tied(model)
    places, kept = list[_Place](), dict[str, str]()
    for site in select(everywhere, include=include, exclude=exclude):
        twins = [sites.get(site.name) for sites in theirs]
        if any(twin is None or twin.channels != site.channels for twin in twins):
            kept[site.name] = say("a source has no such layer, or one of another width")
        elif site.name in norms:
            held = [m for twin in twins if twin is not None and (m := twin.statistics()) is not None]
            places.append(_Place(site, gives=False, held=held))
        elif not _is_normalised(graph, site, norms):
            if "bias" not in site.module._parameters:
                kept[site.name] = say("{name} has no place for a bias", name=site.name)
            elif tied & {id(p) for p in site.module.parameters()}:
                kept[site.name] = say("its weight or bias is shared with another layer")
            else:
                places.append(_Place(site, gives=True, weight=_plain_weight(site.module)))
    return places, kept


def _layers(model: nn.Module) -> dict[str, Site]:
    """What each convolution and linear layer gives, as the place where a batch norm behind it would stand."""
    found = {}
    for name, module in walk(model):
        if isinstance(module, _ConvNd):
            found[name] = Site(name, module, "batch", module.out_channels)
        elif isinstance(module, nn.Linear):
            found[name] = Site(name, module, "batch", module.out_features, axis=-1)
    return found


def _is_normalised(graph: Graph, layer: Site, norms: Mapping[str, Site]) -> bool:
    """Whether batch norms, and nothing else, read what a layer gives: they take any scale and shift back."""
    visits = graph.visits_of(layer.name)
    readers = [reader for visit in visits if visit.exit for reader in graph.readers(visit.exit)]
    inside = [None if reader.visit is None else graph.visits[reader.visit].site for reader in readers]
    return bool(readers) and all(site in norms for site in inside)


def _plain_weight(layer: nn.Module) -> str | None:
    """The parameter that takes a scale: the weight, or that under a pruning mask; None where it is computed or packed."""
    name = "weight_orig" if "weight_mask" in layer._buffers else "weight"
    held = layer._parameters.get(name)
    return name if type(held) is nn.Parameter and held.is_floating_point() else None


def _tied(model: nn.Module) -> set[int]:
    """The parameters that several modules hold."""
    counts = Counter(id(p) for _, module in walk(model) for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in counts.items() if count > 1}
