"""Which convolutions and linear layers can carry a batch norm's scale and shift, read off the graph of one forward.

Channels are followed by labels: a map of the batch norm's channel numbers is laid into the memory as it was read, and read
out as it was written. So views, permutations, concatenations, sums and copies between the two are exact or refused, and no
layer's class has to be known: a weight is whatever parameter a convolution or matrix product was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from renorm.absorb import Absorber, Side
from renorm.affine import Affine
from renorm.graph import Graph, Layout, Operation, Place, Visit
from renorm.labels import COPIES, MEANS, carried, channels_of, keeps_constants, numbered, shrunk, spread
from renorm.said import say
from renorm.sites import Site

__all__ = ["absorbers"]

CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
PRODUCTS = ("linear", "addmm", "mm")
SUMS = ("add", "add_")


class _Linear(NamedTuple):
    """An operation that is linear in its input, and where its weight and bias are held."""

    operation: Operation
    weight: Place
    owner: tuple[str, str]
    bias: tuple[str, str] | None
    bias_place: Place | None
    groups: int
    out_dim: int
    axis: int  # of the channels, in what it reads and writes
    source: Place
    transposed: bool
    pads: bool


class _Use(NamedTuple):
    """One operation that is to take the map: the norm's channel for each of its own (−1: none), with or without the shift."""

    linear: _Linear
    channels: Tensor
    shifted: bool


def absorbers(
    graph: Graph, site: Site, affine: Affine, modules: Mapping[str, nn.Module], *, side: Side
) -> list[Absorber] | str:
    """Who can take over `affine` at `site`, looking on one side of it; a sentence on why nobody can, where so.

    What is absorbed must be read by this norm alone (`after`), or the norm be read by those alone that absorb it
    (`before`), or be summed with what a layer makes of the same input (`beside`); a weight that other calls use too, or that
    other modules hold, cannot take it.
    """
    visits = graph.visits_of(site.name)
    find = {"after": _writers, "before": _readers, "beside": _sisters}[side]
    uses: list[_Use] = []
    for visit in visits:
        found = find(graph, site, visit, modules)
        if isinstance(found, str):
            return found
        uses += found
    shifts = bool((affine.shift != 0).any())
    by_weight: dict[int, list[_Use]] = {}
    for use in uses:
        by_weight.setdefault(use.linear.weight.value, []).append(use)
    made = []
    for same in by_weight.values():
        one = _absorber(graph, same, affine, side, shifts, modules)
        if isinstance(one, str):
            return one
        made.append(one)
    return made


def _absorber(
    graph: Graph, uses: list[_Use], affine: Affine, side: Side, shifts: bool, modules: Mapping[str, nn.Module]
) -> Absorber | str:
    """The one change of a weight that serves all `uses` of it; a reason where there is none."""
    linear, channels, shifted = uses[0]
    name = linear.owner[0] or "the model itself"
    numbers = [use.linear.operation.number for use in uses]
    if len(set(numbers)) < len(numbers) or any(
        use.shifted != shifted or not torch.equal(use.channels, channels) for use in uses
    ):
        return say("the calls of {name} would need different scales", name=name)
    if others := [o for o in graph.readers(linear.weight) if o.number not in numbers]:
        count = len(uses) + len(others)
        return say("the weight of {name} is used {count} times, also by {by}", name=name, count=count, by=others[0])
    if len(graph.owners[linear.weight.value]) > 1:
        held = [owner for owner in graph.owners[linear.weight.value] if owner != linear.owner]
        return say("the weight of {name} is tied to {other}", name=name, other=".".join(held[0]).lstrip("."))
    bias = linear.bias
    if shifts and shifted:
        if linear.bias_place is not None:
            if bias is None or len(graph.owners[linear.bias_place.value]) > 1:
                return say("what {name} adds as its bias is no parameter of its own", name=name)
            if any(o.number not in numbers for o in graph.readers(linear.bias_place)):
                return say("the bias of {name} is read elsewhere too", name=name)
        elif ("bias", None) not in modules[linear.owner[0]]._parameters.items():
            return say("{name} has no place for a bias", name=name)
        else:
            bias = (linear.owner[0], "bias")
        if side == "before" and linear.pads:
            return say("{name} behind it pads with zeros, where its shift would be missing", name=name)
        if side == "before" and linear.transposed:
            return say("{name} behind it is transposed, where its shift would be missing at the borders", name=name)
    there = channels >= 0
    index = channels.clamp_min(0).long().to(affine.scale.device)
    there = there.to(index.device)
    scale = torch.where(there, affine.scale[index], 1.0)
    shift = torch.where(there, affine.shift[index], 0.0) if shifted else torch.zeros_like(scale)
    return Absorber(side, *linear.owner, bias, linear.groups, linear.out_dim, scale, shift)


def _writers(graph: Graph, site: Site, visit: Visit, modules: Mapping[str, nn.Module]) -> list[_Use] | str:
    """The operations that wrote what the site reads in this visit."""
    if visit.entry is None:
        return say("it was called without a tensor")
    inside = {o.number for o in graph.operations if o.visit is not None and graph.visits[o.visit].site == site.name}
    labels = numbered(site.channels, visit.entry.layout, site.axis)
    return _trace(graph, visit.entry, labels, inside, True, modules)


def _trace(
    graph: Graph, place: Place, labels: Tensor, allowed: set[int], shifted: bool, modules: Mapping[str, nn.Module]
) -> list[_Use] | str:
    """Walk from what is read at `place` back to the convolutions and products that wrote it."""
    value, operation = graph.values[place.value], graph.writer(place)
    if operation is None or value.written is None:
        return say("it reads the model's input, or a tensor that no operation of the forward wrote")
    passes = operation.name in CONVOLUTIONS + PRODUCTS + COPIES + MEANS + SUMS + ("cat",)
    if not passes:
        return say("what it reads comes from {operation}", operation=operation)
    if others := [o for o in graph.readers(place) if o.number not in allowed]:
        return say("what it reads, from {operation}, is also read by {other}", operation=operation, other=others[0])
    if place.value in graph.returned:
        return say("what it reads, from {operation}, is also part of the model's output", operation=operation)
    laid = carried(place, value.written, labels, value.elements)
    if laid is None:
        return say("it reads what {by} wrote through a view that repeats or reinterprets it", by=operation)
    if operation.name in CONVOLUTIONS + PRODUCTS:
        linear = _linear(graph, operation, modules)
        if isinstance(linear, str):
            return linear
        channels = channels_of(laid, linear.axis)
        if channels is None:
            return say("its channels are not those of {operation}", operation=operation)
        return [_Use(linear, channels, shifted)]
    return _through(graph, operation, laid, shifted, modules)


def _through(
    graph: Graph, operation: Operation, labels: Tensor, shifted: bool, modules: Mapping[str, nn.Module]
) -> list[_Use] | str:
    """Go on behind an operation that a scale and shift can pass: a copy, a concatenation, a sum."""
    args, here = operation.args, {operation.number}
    if operation.name in COPIES and isinstance(args.get("self"), Place):
        if args["self"].dtype == operation.writes[0].dtype:
            return _trace(graph, args["self"], labels, here, shifted, modules)
    elif operation.name in MEANS and keeps_constants(operation):
        behind_mean = spread(labels, operation)
        if behind_mean is not None:
            return _trace(graph, args["self"], behind_mean, here, shifted, modules)
    elif operation.name == "cat":
        found: list[_Use] = []
        start, axis = 0, args.get("dim", 0)
        for part in args["tensors"]:
            length = part.layout.size[axis]
            behind = _trace(graph, part, labels.narrow(axis, start, length), here, shifted, modules)
            if isinstance(behind, str):
                return behind
            found, start = [*found, *behind], start + length
        return found
    elif operation.name in SUMS and args.get("alpha", 1) == 1:
        sides = [p for p in (args["self"], args["other"]) if isinstance(p, Place) and p.layout.size == labels.shape]
        if len(sides) == 1 and args["other"] == 0:
            return _trace(graph, sides[0], labels, here, shifted, modules)
        if len(sides) == 2:
            left = _trace(graph, sides[0], labels, here, shifted, modules)
            right = _trace(graph, sides[1], labels, here, False, modules)
            return left if isinstance(left, str) else right if isinstance(right, str) else [*left, *right]
    return say("what it reads comes from {operation}", operation=operation)


def _readers(graph: Graph, site: Site, visit: Visit, modules: Mapping[str, nn.Module]) -> list[_Use] | str:
    """The operations that read what the site gives in this visit: convolutions and products, all of them."""
    if visit.exit is None:
        return say("it gives no tensor")
    labels = numbered(site.channels, visit.exit.layout, site.axis)
    return _follow(graph, visit.exit, labels, modules)


def _follow(graph: Graph, place: Place, labels: Tensor, modules: Mapping[str, nn.Module]) -> list[_Use] | str:
    """Walk from what stands at `place` on to the convolutions and products that read it."""
    if place.value in graph.returned:
        return say("what it gives is part of the model's output")
    readers = graph.readers(place)
    if not readers:
        return say("nobody reads what it gives")
    uses: list[_Use] = []
    for operation in readers:
        source = operation.args.get("self")
        passes = operation.name in COPIES or (operation.name in MEANS and keeps_constants(operation))
        if passes and isinstance(source, Place) and source.dtype == operation.writes[0].dtype:
            laid = carried(place, source, labels, graph.values[place.value].elements)
            passed = None if laid is None else shrunk(laid, operation)
            if passed is None:
                return say("what it gives is mixed by {operation}", operation=operation)
            behind = _follow(graph, operation.writes[0], passed, modules)
            if isinstance(behind, str):
                return behind
            uses += behind
            continue
        if operation.name not in CONVOLUTIONS + PRODUCTS:
            return say("what it gives is read by {operation}", operation=operation)
        linear = _linear(graph, operation, modules)
        if isinstance(linear, str):
            return linear
        if linear.source.value != place.value or operation.where != linear.owner[0]:
            return say(
                "what it gives is used by {operation} otherwise than as the input of a layer", operation=operation
            )
        laid = carried(place, linear.source, labels, graph.values[place.value].elements)
        channels = None if laid is None else channels_of(laid, linear.axis)
        if channels is None or bool((channels < 0).any()):
            return say("its channels are not those that {operation} reads", operation=operation)
        uses.append(_Use(linear, channels, True))
    return uses


def _sisters(graph: Graph, site: Site, visit: Visit, modules: Mapping[str, nn.Module]) -> list[_Use] | str:
    """A convolution that reads what the site reads, and whose output is summed with the site's."""
    if visit.entry is None or visit.exit is None or visit.exit.value in graph.returned:
        return say("it is not summed with a convolution of what it reads")
    place, uses = visit.exit, list[_Use]()
    readers = graph.readers(place)
    while len(readers) == 1 and readers[0].name == "add" and readers[0].args["other"] == 0:
        place = readers[0].writes[0]  # sums that start from 0
        readers = graph.readers(place)
    if len(readers) == 1 and readers[0].name in SUMS and readers[0].args.get("alpha", 1) == 1:
        first, second = readers[0].args["self"], readers[0].args["other"]
        # what is added to in place must not be the site's output, which will be its input
        other = first if second == place else second if readers[0].name == "add" else None
        if isinstance(other, Place) and other.layout.size == place.layout.size:
            labels = numbered(site.channels, other.layout, site.axis)
            found = _trace(graph, other, labels, {readers[0].number}, True, modules)
            uses = [] if isinstance(found, str) else found
    for use in uses:
        whole = torch.equal(use.channels, torch.arange(site.channels, dtype=torch.int32))
        if whole and use.linear.source == visit.entry and _is_centred(use.linear):
            return [use._replace(shifted=True)]
    return say("it is not summed with a convolution of what it reads")


def _is_centred(linear: _Linear) -> bool:
    """Whether the middle of the kernel reads the very position that is written, each channel in its own group."""
    args, kernel = linear.operation.args, linear.weight.layout.size[2:]
    if linear.operation.name not in CONVOLUTIONS or linear.transposed or not isinstance(args["padding"], list):
        return False
    steps = zip(kernel, args["stride"], args["padding"], args["dilation"], strict=True)
    outputs, inputs = linear.weight.layout.size[:2]
    square = outputs == inputs * linear.groups
    # the proof looks at the output of the layer's own call
    return (
        square
        and linear.operation.where == linear.owner[0]
        and all(k % 2 and s == 1 and p == d * (k - 1) // 2 for k, s, p, d in steps)
    )


def _linear(graph: Graph, operation: Operation, modules: Mapping[str, nn.Module]) -> _Linear | str:
    """The operation's weight and bias; a reason where the weight is no parameter as it stands."""
    args = operation.args
    weight, source = args.get("weight"), args.get("input")
    bias = args.get("bias")
    if operation.name in ("addmm", "mm"):
        source, weight = args.get("mat1", args.get("self")), args["mat2"]
        bias = args["self"] if operation.name == "addmm" else None
        if args.get("alpha", 1) != 1 or args.get("beta", 1) != 1:
            return say("{operation} scales its terms", operation=operation)
    if not isinstance(weight, Place) or not isinstance(source, Place):
        return say("{operation} has no weight", operation=operation)
    owner = _owner(graph, weight)
    if owner is None:
        return say("the weight of {operation} is computed in the forward, and is no parameter", operation=operation)
    held = Layout.of(getattr(modules[owner[0]], owner[1]))
    flipped = Layout(held.size[::-1], held.stride[::-1], held.offset)
    if weight.layout != held and (operation.name not in ("addmm", "mm") or weight.layout != flipped):
        return say("{operation} uses part of a weight, or another view of it", operation=operation)
    convolves = operation.name in CONVOLUTIONS
    transposed = bool(args.get("transposed", False))
    padding = args.get("padding", 0)
    # matrices: (out, in) where the product was given their transpose; (in, out) where it was given them as they are
    inputs_first = transposed if convolves else operation.name != "linear" and weight.layout == held != flipped
    return _Linear(
        operation=operation,
        weight=weight,
        owner=owner,
        bias=_owner(graph, bias) if isinstance(bias, Place) else None,
        bias_place=bias if isinstance(bias, Place) else None,
        groups=int(args.get("groups", 1)) if convolves else 1,
        out_dim=2 if inputs_first else 1,
        axis=1 if convolves else -1,
        source=source,
        transposed=transposed,
        pads=convolves and (padding == "same" or any(padding if isinstance(padding, list | tuple) else [padding])),
    )


def _owner(graph: Graph, place: Place) -> tuple[str, str] | None:
    """The first module that holds the tensor at `place`."""
    return graph.owners.get(place.value, [None])[0]
