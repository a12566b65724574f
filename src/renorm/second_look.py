"""What shows only when some batches are run again: with batch norms as in training, in other company, without padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from renorm.calls import Caller, map_tensors, read, tensors_in
from renorm.errors import UsageError
from renorm.moments import Moments
from renorm.observe import measure, outputs_at, visiting
from renorm.shift import Shift
from renorm.sites import Site, unwrap, walk
from renorm.state import evaluating, preserving
from renorm.verify import difference

__all__ = [
    "Gap",
    "Padding",
    "Parting",
    "calls_in_a_forward",
    "depends_on_company",
    "folded_apart",
    "gap_between_modes",
    "trailing_padding",
]

PARTED = (
    1e-3  # of the largest value at a place: what one layer gives is rounded less than what a whole model does (BN503)
)
FEWEST = 16  # samples in a batch whose own moments may normalise it: below, the noise of the batch is the gap


class Gap(NamedTuple):
    """How evaluation and training mode disagree about the same samples.

    changed  the share of samples whose first answer differs
    noise    the share that differs for the noise of a batch alone: how many change when half of it normalises in place of all,
             which is off by as much from the whole as the whole is from many
    better   by how much the training-mode answers are more often right, as a share of samples; None without labels
    """

    changed: float
    noise: float
    better: float | None
    samples: int


class Padding(NamedTuple):
    """What padding does to a site: its share of the positions, and how far it moves the moments, in sd without it."""

    share: float
    moved: float


class Parting(NamedTuple):
    """Where a folded model parts from its original.

    error  the largest difference of an output, as a share of the largest output
    site   the first batch norm from which on nothing is as it was, by the outputs at its place; "" where none can be named
    """

    error: float
    site: str


def gap_between_modes(model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], caller: Caller) -> Gap | None:
    """The gap over the batches of FEWEST samples or more; dropout and all else stay in evaluation in both modes.

    None where there is no such batch, no batch norm, or the output is not logits (N, classes, *).
    """
    fit = [batch for batch in batches if read(batch).samples >= FEWEST]
    held = [site for site in sites if site.tensors is not None]
    if not fit or not held:
        return None
    calm, _ = _answers(model, fit, caller, [])
    restless, labels = _answers(model, fit, caller, held)
    if calm is None or restless is None or calm.shape != restless.shape:
        return None
    right = None
    if labels is not None and labels.shape == calm.shape and not labels.is_floating_point():
        right = float((torch.eq(restless, labels).double() - torch.eq(calm, labels).double()).mean())
    changed = float(torch.ne(calm, restless).double().mean())
    return Gap(changed, _noise(model, fit, caller, held, restless), right, len(calm))


def _noise(model: nn.Module, batches: Sequence[Any], caller: Caller, sites: Sequence[Site], whole: Tensor) -> float:
    """The share of answers that change when each half of a batch is normalised by itself; 0 where it cannot be halved."""
    halves: list[Any] = []
    places: list[int] = []
    at = 0
    for batch in batches:
        count = read(batch).samples
        for part in (slice(0, count // 2), slice(count // 2, count)):
            halves.append(_part(batch, part, count))
            places += range(at + part.start, at + part.stop)
        at += count
    try:
        parted, _ = _answers(model, halves, caller, sites)
    except Exception:  # what cannot be halved tells nothing of noise
        return 0.0
    if parted is None or parted.shape != whole.shape:
        return 0.0
    return float(torch.ne(parted, whole[places]).double().mean())


def _part(batch: Any, part: slice, count: int) -> Any:
    """Some of the samples of a batch of `count`."""
    return map_tensors(lambda t: t[part] if t.dim() and t.shape[0] == count else t, batch)


def depends_on_company(model: nn.Module, batch: Any, caller: Caller) -> float | None:
    """The largest change of a sample's output when half of the batch is left out, in sd of the outputs over the batch.

    None for a single sample, for outputs without one row a sample, and where half a batch cannot be run.
    """
    count = read(batch).samples
    if count < 2:
        return None
    half = count // 2
    with _looking(model):
        whole = caller.run(model, batch).logits
        try:
            part = caller.run(model, _part(batch, slice(0, half), count)).logits
        except Exception:  # what cannot be halved tells nothing of company
            return None
    if whole is None or part is None or whole.shape[:1] != (count,) or part.shape != whole[:half].shape:
        return None
    whole, part = whole.double(), part.double()
    spread = float(whole.std(0, correction=0).mean()) or 1.0
    return float((whole[:half] - part).abs().max()) / spread


def folded_apart(model: nn.Module, folded: nn.Module, batch: Any, sites: Sequence[Site], caller: Caller) -> Parting:
    """How far the outputs of `folded` lie from those of `model` on a batch, and from which site on.

    Where a batch norm was folded into the layer in front, what stands at its place gives what it gave; where into the layer
    behind, that layer's. So the site is blamed from which on all places differ. Raises UsageError for outputs of other shapes.
    """
    names = [site.name for site in sites if site.slot is None]
    there = {name for name, _ in walk(unwrap(folded))}
    with _looking(model), _looking(folded):
        ours, theirs = (tensors_in(caller.run(each, batch).output) for each in (model, folded))
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise UsageError(
                f"the folded model gives tensors of shape {[tuple(t.shape) for t in theirs]}, the model "
                f"{[tuple(t.shape) for t in ours]}: it was made of another one, or of other options."
            )
        error = max((_relative(x, y) for x, y in zip(ours, theirs, strict=True)), default=0.0)
        common = [name for name in names if name in there]
        before, after = (outputs_at(unwrap(each), common, batch, caller) for each in (model, folded))
    given = dict(after)
    parted = [n for n, x in before if n in given and x.shape == given[n].shape]
    parted = [*takewhile(lambda n: _relative(dict(before)[n], given[n]) > PARTED, reversed(parted))]
    return Parting(error, parted[-1] if parted else "")


def _relative(x: Tensor, y: Tensor) -> float:
    """The largest difference as a share of the largest finite value of `x`."""
    if not x.numel():
        return 0.0
    largest = x.detach().cpu().double().abs().nan_to_num(nan=0.0, posinf=0.0).max()
    return float(difference(x, y).max() / largest.clamp_min(1e-12))


def trailing_padding(
    model: nn.Module, batches: Sequence[Any], sites: Sequence[Site], caller: Caller
) -> dict[str, Padding]:
    """Per site that reads sequences (N, C, T): positions at the end of a sample that repeat its last one exactly.

    Only where their number differs between samples, as padding's does. Moments are compared with and without them.
    """
    found: dict[str, list[tuple[int, int, Moments, Moments]]] = {}

    def visit(site: Site, x: Tensor) -> None:
        if x.dim() != 3 or not x.numel():
            return
        x = x.detach().movedim(site.axis, 1)
        repeats = (x == x[:, :, -1:]).all(1).flip(1).cumprod(1).flip(1).bool()
        repeats &= repeats.sum(1, keepdim=True) > 1
        runs = repeats.sum(1)
        if int(runs.max()) == int(runs.min()) or bool(repeats.all()):
            return
        clean = x.transpose(1, 2)[~repeats]
        entry = (int(repeats.sum()), repeats.numel(), Moments.of(x), Moments.of(clean))
        found.setdefault(site.name, []).append(entry)

    sequences = [site for site in sites if site.tensors is not None]
    with _looking(model), visiting(unwrap(model), sequences, visit):
        for batch in batches[:1]:
            caller.run(model, batch)
    return {
        name: Padding(share=padded / total, moved=Shift.between(clean, whole, eps=1e-12).layer.wasserstein2)
        for name, ((padded, total, whole, clean), *_) in found.items()
    }


def calls_in_a_forward(model: nn.Module, batch: Any, sites: Sequence[Site], caller: Caller) -> dict[str, int]:
    """How often one forward calls each site; those that it does not reach are left out."""
    calls: Counter[str] = Counter()
    with _looking(model), visiting(unwrap(model), sites, lambda site, x: calls.update([site.name])):
        caller.run(model, batch)
    return dict(calls)


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    with preserving(unwrap(model)), evaluating(model):
        yield


def _answers(
    model: nn.Module, batches: Sequence[Any], caller: Caller, restless: Sequence[Site]
) -> tuple[Tensor | None, Tensor | None]:
    """The first answer for each sample, with the sites in `restless` normalising by the batch, and the labels."""

    def visit(site: Site, x: Tensor) -> None:
        if x.numel():
            site.normalise_by_(measure(x, axis=site.axis, exact=True).values)

    answers: list[Tensor] = []
    labels: list[Any] = []
    with _looking(model), visiting(unwrap(model), restless, visit):
        for batch in batches:
            result = caller.run(model, batch)
            if result.logits is None or result.logits.dim() < 2 or result.logits.shape[1] < 2:
                return None, None
            answers.append(result.logits.argmax(1).cpu())
            labels.append(result.labels)
    known = all(isinstance(part, Tensor) for part in labels)
    return torch.cat(answers), torch.cat([part.cpu() for part in labels]) if known else None
