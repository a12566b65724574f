"""What fine-tuning does where it is told "auto": head, policy and rate, each chosen from measured facts, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from renorm.calls import Caller, read
from renorm.errors import BatchError, UsageError
from renorm.feed import Labels
from renorm.observe import observe
from renorm.policy import Policy, preset
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import find_sites, parameters_of
from renorm.state import evaluating, preserving

# SMALL and FAR are rules of thumb; FEW and the rates were set on the suite `transfer` of `renorm bench`: with 10 to 58
# samples a head on fixed features won or drew, with 100 and more (5 per class) it lost to training everything.
FEW = 64  # samples in all
SMALL = 16  # samples in a batch; below it a batch's own statistics are too noisy to normalise by
FAR = 0.5  # source standard deviations, mean over sites; clean data of the source itself lie at about 0.2
RATE = 3e-3  # of AdamW, at batches of 64, for nets with batch norm
LARGE = 1_000_000  # parameters; above it a third of that, as is usual, since only small nets were measured
ADAPTER = 3  # norm layers alone bear a higher rate
NORMLESS = 1e-4  # without batch norm a rate is not made good by the next normalisation: what transformers are tuned by

ASKED = say("asked for")
NETS = (say("batch norm nets up to a million weights"), say("batch norm nets above a million weights"))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was measured before training.

    samples   of the training data; None where they can be read only once
    batch     samples in the largest batch
    classes   how many classes the labels name; None where labels are no class indices
    present   how many of them have samples
    outputs   how many outputs the model has; None where its last layer does not tell
    right     share of samples of the first batches that the model, as it came, gets right; None without class labels
    weights   how many parameters it has
    linear    whether one linear layer gives all outputs, so that a head can be solved
    shift     distance of the target's moments from the statistics held, in source sd, mean over sites; None without sites
    """

    samples: int | None
    batch: int
    classes: int | None
    present: int | None
    outputs: int | None
    right: float | None
    weights: int
    shift: float | None
    linear: bool = False


@dataclass(frozen=True)
class Choice:
    """One thing decided, and why."""

    value: Any
    why: str


def measure(
    model: nn.Module,
    labels: Labels,
    outputs: int | None,
    names: Sequence[str] | None,
    *,
    caller: Caller,
    linear: bool = False,
) -> Facts:
    """The facts; the model stays as it was.

    Raises BatchError for labels that cannot be learnt from: a single class, or negative ones.
    """
    counts = labels.counts
    top = None if counts is None else max(counts) + 1
    if counts is not None:
        if min(counts) < 0:
            raise BatchError(
                f"the labels hold {min(counts)}; they are class indices from 0 on. Leave those samples out."
            )
        if len(counts) == 1:
            raise BatchError(
                f"the label of all training samples ({labels.samples}) is {next(iter(counts))}: there is nothing to tell "
                "apart. Give samples of at least two classes."
            )
    return Facts(
        samples=labels.samples if labels.complete else None,
        batch=labels.batch,
        classes=len(names) if names else top,
        present=None if counts is None else len(counts),
        outputs=outputs,
        right=_right(model, labels.first, caller) if counts is not None else None,
        weights=sum(p.numel() for p in parameters_of(model).values()),
        shift=_shift(model, labels.first, caller),
        linear=linear,
    )


def choose_head(
    asked: str, facts: Facts, labels: Labels, *, names: Sequence[str] | None, own: Sequence[str] | None
) -> Choice:
    """ "new" or "keep". "auto": new unless the label names are the model's; without names, unless its answers fit the labels.

    Raises UsageError for another word, BatchError where labels are outside the classes or a class is empty.
    """
    if asked not in ("auto", "new", "keep"):
        raise UsageError(f'head is "auto", "new" or "keep"; got {asked!r}.')
    choice = Choice(asked, ASKED) if asked != "auto" else _head(facts, names, own)
    counts = labels.counts
    if counts is None:
        if choice.value == "new" and facts.classes is None:
            raise UsageError(
                "a new head was asked for, and how many classes there are cannot be read from the labels; name them with "
                "classes=."
            )
        return choice
    limit = facts.classes if choice.value == "new" else facts.outputs
    if limit is not None and max(counts) >= limit:
        raise BatchError(
            f"the labels run to {max(counts)}, but there are {limit} classes (0 to {limit - 1}); correct the labels, "
            'or let the model have a new head: head="new".'
        )
    empty = [label for label in range(limit or 0) if not counts[label]]
    if choice.value == "new" and empty:
        called = f" ({names[empty[0]]!r})" if names else ""
        raise BatchError(
            f"{len(empty)} of {limit} classes have no training sample, {empty[0]}{called} first; "
            "leave them out and number the labels without gaps."
        )
    return choice


def _head(facts: Facts, names: Sequence[str] | None, own: Sequence[str] | None) -> Choice:
    if facts.classes is None:
        return Choice("keep", say("the labels are no class indices"))
    if names and own:
        if tuple(names) == tuple(own):
            return Choice("keep", say("the label names are the model's"))
        return Choice("new", say("the label names are not the model's"))
    if facts.outputs is None or facts.classes > facts.outputs:
        return Choice("new", say("{classes} classes do not fit {outputs} outputs", **vars(facts)))
    if facts.right is None:
        same = facts.classes == facts.outputs
        return Choice("keep" if same else "new", say("{classes} classes, {outputs} outputs", **vars(facts)))
    # labels without names: the model knows them if it is right far more often than chance, and uses most of its outputs
    known = facts.right > 2 / facts.classes and 2 * facts.classes >= facts.outputs
    why = say("as it came the model gets {right:.0%} of {classes} classes right", **vars(facts))
    return Choice("keep" if known else "new", why)


def choose_policy(asked: str | Policy, facts: Facts, *, steps: bool = False) -> Choice:
    """A policy. "auto" goes by how many labels there are, then batch size, then shift; the docs have the table.

    With `steps` "auto" is one that takes steps of training.

    Raises UnknownName for another name, BatchError where batches of one would have to normalise themselves.
    """
    choice = Choice(preset(asked), ASKED) if asked != "auto" else _policy(facts, steps=steps)
    if choice.value.statistics == "moving" and facts.batch == 1 and facts.shift is not None:
        raise BatchError(
            f"the policy {choice.value.name!r} normalises by the batch, and batches hold one sample each; give larger "
            'batches, or policy="frozen-statistics".'
        )
    return choice


def _policy(facts: Facts, *, steps: bool) -> Choice:
    if not steps and facts.samples is not None and facts.samples < FEW and facts.present:
        why = say("{samples} labels in all", samples=facts.samples)
        return Choice(preset("few-labels" if facts.linear and facts.right is not None else "head-only"), why)
    if facts.shift is None:
        return Choice(preset("all"), say("no layer holds statistics"))
    seen = say("batches of {batch}, statistics {shift:.2f} source sd away", batch=facts.batch, shift=facts.shift)
    if facts.batch < SMALL:
        return Choice(preset("recalibrate-then-freeze" if facts.shift > FAR else "frozen-statistics"), seen)
    return Choice(preset("all"), seen)


def choose_rate(asked: float | str, facts: Facts, policy: Policy) -> Choice:
    """The learning rate. "auto" goes by what the net is made of, its size, the batches and what trains; see `Choice.why`.

    Raises UsageError for what is no rate.
    """
    if asked != "auto":
        if isinstance(asked, bool | str) or not 0 < asked < float("inf"):
            raise UsageError(f'lr is "auto" or a number above 0; got {asked!r}.')
        return Choice(float(asked), ASKED)
    normless, large = facts.shift is None, facts.weights > LARGE
    base = NORMLESS if normless else RATE / 3 if large else RATE
    kind = say("nets without batch norm") if normless else NETS[large]
    alone = "rest" not in policy.trains
    # above 256 the root rule is not what was measured, and large rates cost more than they bring
    rate = base * (min(facts.batch, 256) / 64) ** 0.5 * (ADAPTER if alone else 1)
    why = say(
        "{base:g} for {kind} at batches of 64, by the root of {batch} / 64", base=base, kind=kind, batch=facts.batch
    )
    if alone:
        why = say("{why}, times {times} as no other weights train", why=why, times=ADAPTER)
    return Choice(float(f"{rate:.3g}"), why)


def _right(model: nn.Module, batches: Sequence[Any], caller: Caller) -> float | None:
    right = total = 0
    with preserving(model), evaluating(model):
        for index, batch in enumerate(batches):
            result = caller.run(model, batch, index=index)
            if not isinstance(result.labels, Tensor) or result.logits is None or result.logits.dim() != 2:
                return None
            right += int((result.logits.argmax(1).cpu() == result.labels.cpu()).sum())
            total += result.samples
    return right / total


def _shift(model: nn.Module, batches: Sequence[Any], caller: Caller) -> float | None:
    sites = [site for site in find_sites(model) if site.kind == "batch" and site.tensors is not None]
    samples = sum(read(batch).samples for batch in batches)
    if not sites or samples < 2:
        return None if not sites else 0.0
    seen = observe(model, batches, under="running", include=[s.name for s in sites], **vars(caller))
    found = []
    for site in sites:
        held = site.statistics()
        if held is not None and site.name in seen and bool(torch.isfinite(held.var).all()):
            found.append(Shift.between(held, seen[site.name].values, eps=site.eps).layer.wasserstein2)
    return sum(found) / len(found) if found else 0.0
