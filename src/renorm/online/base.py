"""The interface of every method for a stream, and the catalogue that finds them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.calls import Caller
from renorm.errors import UsageError
from renorm.family import built, members
from renorm.moments import TINY, Moments
from renorm.profile import Profile
from renorm.shift import Shift
from renorm.sites import Site

State = dict[str, Tensor]
FEW = 16.0  # images whose moments are as much chance as shift
RECENT = 512.0  # images that the distance at the first sites remembers


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a stream runs on.

    sites      the batch norms that hold statistics; empty for a model of layer or group norm
    norms      every norm layer that has affine parameters
    source     a profile of the source, or None
    home       makes one pass over batches of the source, where those were given; None otherwise
    """

    model: nn.Module
    sites: tuple[Site, ...]
    norms: tuple[Site, ...]
    caller: Caller
    source: Profile | None = None
    home: Callable[[], Iterable[Any]] | None = None

    def logits(self, batch: Any) -> Tensor:
        """One row of class scores per sample, as the model in its present state gives them."""
        result = self.caller.run(self.model, batch)
        return rows_of(self.caller.logits(result, asked="adapt_"), result.samples)


class Running(ABC):
    """A method on its way through one stream: what it has learnt, and how the next batch is normalised.

    The stream calls `begin`, runs the model with `visit` at every one of `places`, once more where `again` asks for it, and
    calls `finish` with the logits. What was seen counts from `finish` on: a forward that fails has changed nothing but the
    statistics that layers were lent, which `settle` puts right.
    """

    trains: ClassVar[bool] = False  # whether the forward has to keep a graph

    def __init__(self, subject: Subject) -> None:
        self.subject: Subject = subject
        self.changes: int = 0  # of domain, as far as the method notices them
        self.held: dict[str, Moments] = {
            site.name: held for site in subject.sites if (held := site.statistics()) is not None
        }

    def begin(self, samples: int, batch: Any, *, learn: bool) -> None:
        """A batch comes; `learn` says whether `finish` will be told."""
        return

    @property
    def places(self) -> Sequence[Site]:
        """Where the next forward is to be visited; a hook costs a network of small layers more than it seems."""
        return self.subject.sites

    @abstractmethod
    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        """Before a batch norm normalises `x`: lend it statistics, or give back what it should normalise in place of `x`."""

    def again(self, logits: Tensor) -> bool:
        """Whether the batch that is to be learnt from shall go through the model once more, now that these are its logits.

        `visit` then comes again, as after `begin`, at the `places` that it then has. Shapes: logits (N, K).
        """
        return False

    def finish(self, logits: Tensor) -> None:
        """Learn from the batch. Shapes: logits (N, K), with a graph where the method `trains`."""
        return

    def answer(self, logits: Tensor) -> Tensor:
        """What the stream gives for these logits; the logits themselves, unless the method is about answers."""
        return logits

    def settle(self) -> None:
        """After every forward: let each layer hold what it would be lent next, by what was learnt so far."""
        for site in self.subject.sites:
            site.normalise_by_(self.held[site.name])

    @property
    def target_weight(self) -> float:
        """The target's mean share in what normalises, in [0, 1]; 0 for the source itself."""
        return 1.0

    @property
    def moved(self) -> float:
        """How far the target lies from the source at the first sites, as `Shift.moved`; NaN where the method does not say.

        Later sites tell other classes from other domains less well.
        """
        return math.nan

    @property
    def drift(self) -> Mapping[str, float]:
        """`moved` site by site, as far as the method knows it."""
        return {}

    def state(self) -> State:
        """Everything learnt, as named tensors; `load` of it in a new stream goes on from there."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Copies."""
        return


@dataclass(frozen=True, kw_only=True)
class Online(ABC):
    """A way to keep a model fitting a stream of unlabelled batches.

    A subclass is one file in this folder: a frozen dataclass whose fields are its options, checked in `__post_init__`, with
    a `name`, and `cites`, the BibTeX of its paper. It is then in `adapt_(method=name)`, `renorm adapt --method name`, the
    docs' table, the benchmark and the contract tests.

    needs_source   whether it needs `source=`
    any_norm       whether it also works on layer, group and rms norm
    """

    name: ClassVar[str]
    cites: ClassVar[str] = ""
    needs_source: ClassVar[bool] = False
    any_norm: ClassVar[bool] = False

    @abstractmethod
    def start(self, subject: Subject) -> Running:
        """Begin a stream on this subject; the model is not changed."""


@cache
def catalogue() -> dict[str, type[Online]]:
    """Every method in this folder, by its name."""
    return members("renorm.online", Online)


def build(name: str, options: Mapping[str, Any]) -> Online:
    """The method called `name` with `options` for its fields.

    Raises UnknownName for a name that is not in the catalogue or an option that the method does not have.
    """
    return built("online method", name, options, catalogue())


def check_share(method: Online, *names: str) -> None:
    """Raise UsageError where one of these options is not a number in [0, 1]."""
    for name in names:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UsageError(f"{name} of {method.name} is a share in [0, 1]; got {value!r}.")


def check_positive(method: Online, *names: str) -> None:
    """Raise UsageError where one of these options is not a finite number above 0."""
    for name in names:
        value = getattr(method, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UsageError(f"{name} of {method.name} is a number above 0; got {value!r}.")


def rows_of(logits: Tensor, samples: int) -> Tensor:
    """`logits` as one row of class scores per sample, (N, K); a single column is the log odds of a second class.

    Scores at positions, (N, K, *), are averaged over them. Raises UsageError where no axis counts the samples.
    """
    rows = logits[:, None] if logits.dim() == 1 else logits
    rows = rows.flatten(2).mean(2) if rows.dim() > 2 else rows
    if rows.dim() != 2 or rows.shape[0] != samples:
        raise UsageError(
            f"adapt_ needs logits (N, K) for the {samples} samples of a batch, and got {tuple(logits.shape)}; "
            "say with output= how to get them."
        )
    return rows if rows.shape[1] > 1 else torch.cat([torch.zeros_like(rows), rows], dim=1)


def shaped(answer: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """An answer (N, K) in the shape that the model gave: log odds, or scores at positions moved as their mean was."""
    if logits.shape == answer.shape:
        return answer
    if rows.shape[1] == 2 and logits.numel() == len(rows):
        return (answer[:, 1] - answer[:, 0]).reshape(logits.shape)
    return logits + (answer - rows).reshape(*rows.shape, *[1] * (logits.dim() - 2))


def glance(x: Tensor, *, axis: int = 1, rows: int | None = None) -> Moments | None:
    """Moments of `x` by torch's own kernel, in one pass; with `rows`, of about so many rows of every map.

    Neighbouring rows of a map say much the same: eight of them cost a quarter of a batch norm at 32 × 32, and less on
    larger maps. None where there is one value per channel, or a moment is not finite. Shapes: x (N, C, *) → (C,) float64.
    """
    x = x.detach()
    x = x[:, None] if x.dim() == 1 else x.movedim(axis, 1)
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if rows is not None and x.dim() > 2 and x.shape[2] >= 2 * rows:
        x = x[:, :, :: x.shape[2] // rows]
    count = x.numel() // max(1, x.shape[1])
    if count < 2:
        return None
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mean, var = torch.zeros(x.shape[1]).to(x), torch.ones(x.shape[1]).to(x)
    F.batch_norm(x, mean, var, None, None, True, 1.0)
    mean, var = (
        (mean, var) if mean.device.type == "cpu" else torch.stack((mean, var)).cpu()
    )  # waits for the device once
    if not bool(torch.isfinite(mean.sum() + var.sum())):
        return None
    return Moments(count, mean.double(), var.double() * ((count - 1) / count))  # torch keeps the unbiased one


def as_if(site: Site, x: Tensor, mean: Tensor, var: Tensor, held: Moments) -> Tensor:
    """What `site`, normalising by what it holds, must be given so that it normalises `x` by `mean` and `var`.

    Gradients flow through `x`, `mean` and `var`. Shapes: mean and var (C,), or (N, C) for every sample its own.
    """
    moved = x.movedim(site.axis, 1)
    shape = [mean.shape[0] if mean.dim() == 2 else 1, -1, *[1] * (moved.dim() - 2)]
    scale = ((held.var.to(var) + site.eps) / (var + site.eps)).sqrt()
    shifted = held.mean.to(mean) - mean * scale
    return (moved * scale.view(shape).to(x.dtype) + shifted.view(shape).to(x.dtype)).movedim(1, site.axis)


class Early:
    """How far the stream's recent images lie from the source at the first sites, where other classes hardly show.

    The first three sites, or a quarter of them where that is fewer, over the last 512 images or so. Vectors say nothing: their
    class shows at the first site as at any.
    """

    def __init__(self, sites: Sequence[Site], held: Mapping[str, Moments]) -> None:
        self._held = {site.name: held[site.name] for site in first_sites(sites) if site.name in held}
        self._eps = {site.name: site.eps for site in sites}
        self._seen: dict[str, Moments] = {}  # their `count` is of images
        self._now: dict[str, Moments] = {}

    def see(self, site: Site, x: Tensor) -> None:
        """Take note of what comes to `site`, if it is one of the first; it counts from `commit` on."""
        if site.name not in self._held or not has_places(site, x) or (now := glance(x, axis=site.axis, rows=8)) is None:
            return
        before = self._seen.get(site.name)
        images, total = (before.count, before.count + x.shape[0]) if before else (0.0, float(x.shape[0]))
        mixed = (before or now).blend(now, source_weight=images / total)
        self._now[site.name] = Moments(min(total, RECENT), mixed.mean, mixed.var)

    def commit(self) -> None:
        """Book the batch that came last."""
        self._seen |= self._now
        self._now = {}

    @property
    def moved(self) -> float:
        """Mean over these sites of `Shift.moved`, less for few images; NaN before any."""
        far = [
            Shift.between(self._held[name], seen, eps=self._eps[name]).moved * few(seen.count)
            for name, seen in self._seen.items()
        ]
        return sum(far) / len(far) if far else math.nan

    def state(self) -> State:
        """What was booked, as named tensors: count, means and variances in a row."""
        return {
            f"early.{name}": torch.cat([torch.tensor([seen.count], dtype=torch.float64), seen.mean, seen.var])
            for name, seen in self._seen.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        known = {name: state[f"early.{name}"] for name in self._held if f"early.{name}" in state}
        self._seen = {name: Moments(float(row[0]), *row[1:].chunk(2)) for name, row in known.items()}
        self._now = {}


def has_places(site: Site, x: Tensor) -> bool:
    """Whether a sample of `x` has many values per channel, of which no single one is its class's. Shapes: x (N, C, *)."""
    return x.dim() > 1 and x.numel() > x.shape[0] * x.shape[site.axis]


def few(images: float) -> float:
    """By how much a distance that so many images show is to be believed, in [0, 1): a half at 16."""
    return images / (images + FEW)


def first_sites(sites: Sequence[Site]) -> Sequence[Site]:
    """The first three, or a quarter of them where that is fewer, and one at the least."""
    return sites[: max(1, min(3, len(sites) // 4))]


def packed(parts: Mapping[str, Moments]) -> State:
    """Moments of several sites as three tensors, in the mapping's order."""
    if not parts:
        return {}
    return {
        "count": torch.tensor([m.count for m in parts.values()], dtype=torch.float64),
        "mean": torch.cat([m.mean for m in parts.values()]),
        "var": torch.cat([m.var for m in parts.values()]),
        "channels": torch.tensor([len(m.mean) for m in parts.values()]),
    }


def unpacked(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Moments]:
    """What `packed` was given, for these names in its order."""
    if "count" not in state:
        return {}
    sizes = state["channels"].tolist()
    columns = (torch.split(state[key].clone(), sizes) for key in ("mean", "var"))
    return {
        name: Moments(float(count), mean, var)
        for name, count, mean, var in zip(names, state["count"].tolist(), *columns, strict=True)
    }


def source_units(moments: Moments, held: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance with the held statistics taken for 0 and 1. Shapes: (C,), (C,)."""
    var = held.var.clamp_min(TINY)
    return (moments.mean - held.mean) / var.sqrt(), moments.var / var


def refuse_slots(subject: Subject, method: Online) -> None:
    """Raise UsageError where a module holds several sets of statistics: it takes no input in place of its own."""
    slotted = sorted({site.name.partition("@")[0] for site in subject.sites if site.slot is not None})
    if slotted:
        raise UsageError(
            f"the online method {method.name!r} changes what batch norms are given, which {slotted[0]!r} does not take: it "
            "holds several sets of statistics. Use a method that lends statistics, such as shrink, ema or prior."
        )


def profile_of(subject: Subject, method: Online) -> Profile:
    """The subject's profile. Raises UsageError where the method needs one and there is none."""
    if subject.source is None:
        raise UsageError(
            f"the online method {method.name!r} needs to know the source; pass source=, made by "
            "renorm.profile(model, source_batches), or batches of the source."
        )
    return subject.source
