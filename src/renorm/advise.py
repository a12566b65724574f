"""Which batch norm, and which settings, for this model on these data: every piece of advice follows from a measured number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from renorm.accuracy import mean_moved
from renorm.calls import Caller, Forward, Output, read
from renorm.curve import Curve, curve
from renorm.errors import UsageError
from renorm.faces import Faces
from renorm.facts import Facts
from renorm.observe import visiting
from renorm.said import Said, listed, say
from renorm.sites import batch_sites, unwrap
from renorm.state import evaluating, preserving
from renorm.timing import Timings, timed

__all__ = ["Advice", "Item", "advise"]

NOISY = 0.2  # source sd: standard error of a batch's mean above which normalising by the batch is mostly chance (BN311's limit)
STABLE = 0.05  # source sd: of held statistics; `recalibrate_(tolerance=0.05)` read 142 of 4,000 images and lost nothing
FEWEST = 16  # values a channel in a batch below which its spread is off by 18 % and more (BN304's limit)
MOVED = 0.25  # share of answers that normalising by the batch may change (BN301's limit)
NARROW = 0.01  # share of answers that bfloat16 may change
NEAR_EPS = 10.0  # variances below so many eps are shaped by eps
TYPES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


@dataclass(frozen=True)
class Item:
    """One setting: `topic`, the `choice`, the number that speaks for it in `unit`, and the reason in words."""

    topic: Said
    choice: Said
    value: float
    unit: Said
    why: Said


@dataclass(frozen=True, repr=False)
class Advice(Faces):
    """What fits this model on these data and this machine.

    items     one for each setting, in the order in which they are decided
    curve     how certain an estimate is by how many images
    timings   seconds of each way to run the model here; None for a budget of 0
    samples   how many samples were read
    """

    items: tuple[Item, ...]
    curve: Curve | None
    timings: Timings | None
    samples: int

    def __str__(self) -> str:
        return "\n".join(
            f"{item.topic}: {item.choice} ({item.value:.3g} {item.unit}). {item.why}" for item in self.items
        )

    __repr__ = __str__


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    batch_size: int | None = None,
    devices: int = 1,
    budget: float = 10.0,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Advice:
    """Measure `model` on `batches` in one pass and a few second looks, and say which settings follow; it stays as it was.

    batch_size  how many samples a step has on each device (what memory allows); None: as in `batches`
    devices     how many devices train together
    budget      seconds for timing ways to run it; 0: no timing. From 60 on torch.compile is tried too

    Raises NoBatchNorm for a model without batch norm statistics, BatchError for batches that cannot be used, UsageError for
    settings that make no sense.
    """
    if (batch_size is not None and batch_size < 1) or devices < 1 or budget < 0:
        raise UsageError(
            f"batch_size and devices are 1 or more and budget is seconds, 0 or more; got {batch_size}, {devices} and {budget}."
        )
    sites = batch_sites(model, asked="advise")
    facts = Facts(model, batches, None, Caller(forward=forward, output=output, device=device, autocast=autocast))
    seen = facts.observed
    first = facts.few[0]
    size = batch_size or read(first).samples
    spread = {name: held.var + next(s.eps for s in sites if s.name == name) for name, held in facts.held.items()}
    drawn = curve(seen, facts.parts, spread)
    timings = None
    if budget:
        timings = timed(model, first, facts.caller, samples=read(first).samples, budget=budget)
    items = [_kind(model, first, facts)]
    if drawn is not None:
        items += [_batch(facts, drawn, size, devices), _momentum(facts, drawn, size), _images(drawn)]
        items.append(_instead(facts, drawn, size, devices))
    items += [_eps(facts), *_precision(model, first, facts)]
    if timings is not None:
        items.append(_fastest(timings))
    return Advice(tuple(items), drawn, timings, seen.samples)


def _kind(model: nn.Module, first: Any, facts: Facts) -> Item:
    """The class for the rank that reaches the sites, and whether padding wants a mask."""
    ranks: dict[str, int] = {}
    with (
        preserving(unwrap(model)),
        evaluating(model),
        visiting(unwrap(model), facts.batch, lambda s, x: ranks.update({s.name: x.dim()})),
    ):
        facts.caller.run(model, first)
    found = sorted(set(ranks.values()))
    share = max((padding.share for padding in facts.padding.values()), default=0.0)
    if share:
        return Item(
            say("kind of batch norm"),
            say("renorm.layers.BatchNorm, called with mask="),
            share,
            say("of the positions are padding"),
            say("Padding at the end of sequences enters the moments; a mask leaves it out."),
        )
    names = listed(dict.fromkeys(TYPES.get(rank, "renorm.layers.BatchNorm") for rank in found))
    return Item(
        say("kind of batch norm"),
        say("{names}, or renorm.layers.BatchNorm for any rank", names=names),
        float(found[0] if found else 0),
        say("axes at the norm layers"),
        say("One mean and variance for each channel (the second axis), over samples and all positions."),
    )


def _narrowest(facts: Facts) -> tuple[str, float]:
    """The site with the fewest values a sample and channel, and how many."""
    per = {name: found.values.count / max(1, found.images.count) for name, found in facts.observed.items()}
    name = min(per, key=lambda each: per[each])
    return name, per[name]


def _batch(facts: Facts, drawn: Curve, size: int, devices: int) -> Item:
    name, positions = _narrowest(facts)
    least = max(drawn.needed(NOISY), math.ceil(FEWEST / positions))
    wanted = 1 << max(1, (least - 1).bit_length())
    error = drawn.error(size)
    if size >= least:
        why = say(
            "The mean of a batch of {size} is off by {error:.2f} sd at {site}, and {limit:g} is allowed. Accumulating "
            "gradients changes nothing for batch norm; synchronising (SyncBatchNorm) is not needed.",
            size=size,
            error=error,
            site=drawn.site,
            limit=NOISY,
        )
        return Item(
            say("batch size"), say("{size} is enough", size=size), error, say("sd, error of a batch's mean"), why
        )
    if size * devices >= least:
        why = say(
            "One device's {size} samples are off by {error:.2f} sd at {site}; {devices} devices together by {less:.2f}.",
            size=size,
            error=error,
            site=drawn.site,
            devices=devices,
            less=drawn.error(size * devices),
        )
        return Item(say("batch size"), say("SyncBatchNorm"), error, say("sd, error of a batch's mean"), why)
    why = say(
        "The mean of a batch of {size} is off by {error:.2f} sd at {site} ({values:.0f} values a channel at {narrow}), and "
        "{limit:g} is allowed. Accumulating gradients does not help: each small batch normalises by itself.",
        size=size,
        error=error,
        site=drawn.site,
        values=positions * size,
        narrow=name,
        limit=NOISY,
    )
    return Item(
        say("batch size"),
        say("{wanted} or more on a device", wanted=wanted),
        error,
        say("sd, error of a batch's mean"),
        why,
    )


def _momentum(facts: Facts, drawn: Curve, size: int) -> Item:
    """The largest momentum at which an average over `b (2 − m) / m` images is as certain as STABLE asks, 0.1 at the most."""
    needed = drawn.needed(STABLE)
    best = min(0.1, 2 * size / (needed + size))
    neat = float(f"{best:.1g}")
    steps = math.ceil(math.log(0.05) / math.log(1 - neat))
    return Item(
        say("momentum"),
        say("{momentum:g} (torch's: the weight of the new batch)", momentum=neat),
        size * (2 - neat) / neat,
        say("images that the running statistics remember"),
        say(
            "{needed:,} are needed for {error:g} sd; from scratch {steps:,} steps until 5 % of the initial values are left. "
            "For statistics that are final, estimate them exactly afterwards (renorm recalibrate).",
            needed=needed,
            error=STABLE,
            steps=steps,
        ),
    )


def _images(drawn: Curve) -> Item:
    needed = drawn.needed(STABLE)
    if drawn.clustered > 2:
        why = say(
            "Halves of these batches differ {times:.1f} times as much as independent images would: they are ordered or come in "
            "clusters, and as many more times that squared are needed. Shuffle.",
            times=drawn.clustered,
        )
    else:
        why = say(
            "One image's mean is off by {single:.2f} sd at {site}, n images by that over √n; {images:,} were read, which "
            "leaves {error:.3f}.",
            single=drawn.single,
            site=drawn.site,
            images=drawn.images,
            error=drawn.error(drawn.images),
        )
    return Item(
        say("images for stable statistics"),
        say("{needed:,} for {error:g} sd, {more:,} for half of it", needed=needed, error=STABLE, more=4 * needed),
        float(needed),
        say("images"),
        why,
    )


def _instead(facts: Facts, drawn: Curve, size: int, devices: int) -> Item:
    """Whether to leave batch norm, by what normalising by a batch of this size does to the answers."""
    topic, unit = say("stay with batch norm?"), say("of the answers change when normalised by the batch")
    gap = facts.gap
    changed = math.nan if gap is None else gap.changed
    if drawn.error(size * devices) > NOISY:
        why = say(
            "Batches this small are mostly chance. A pretrained model keeps its statistics (freeze_, or layers.Frozen, which "
            "costs nothing); one trained from scratch takes layers.Group; a single row at a time, layers.Layer."
        )
        return Item(topic, say("Frozen (fine-tuning) or Group (from scratch)"), changed, unit, why)
    if changed > MOVED:
        why = say(
            "Held statistics and those of a batch disagree: fine-tune with statistics recalibrated first, then frozen "
            "(policy frozen), so that training and use agree. The moments moved by {moved:.3f}.",
            moved=mean_moved(shift.moved for shift in facts.shifts.values()),
        )
        return Item(topic, say("yes, recalibrated and then frozen"), changed, unit, why)
    return Item(
        topic,
        say("yes"),
        changed,
        unit,
        say("Up to a quarter is what healthy models show in batches of their own data."),
    )


def _eps(facts: Facts) -> Item:
    eps = {site.name: site.eps for site in facts.batch}
    total = sum(held.var.numel() for held in facts.held.values())
    near = sum(int((held.var < NEAR_EPS * eps[name]).sum()) for name, held in facts.held.items())
    values = sorted(set(eps.values()))
    share = near / max(1, total)
    if near:
        why = say(
            "{near:,} of {total:,} variances lie below ten eps: another eps would change what those channels give. Keep the "
            "one the model was trained with.",
            near=near,
            total=total,
        )
    else:
        why = say(
            "All {total:,} variances are far above it; a framework's other default would change next to nothing.",
            total=total,
        )
    kept = listed(f"{value:g}" for value in values)
    return Item(say("eps"), say("keep {eps}", eps=kept), share, say("of the channels are shaped by eps"), why)


def _precision(model: nn.Module, first: Any, facts: Facts) -> Iterator[Item]:
    caller = facts.caller
    with preserving(unwrap(model)), evaluating(model):
        exact = caller.run(model, first).logits
        try:
            narrow = Caller(**{**vars(caller), "autocast": torch.bfloat16}).run(model, first).logits
        except RuntimeError:  # operations that have no bfloat16 here
            return
    if exact is None or narrow is None or exact.dim() < 2 or exact.shape != narrow.shape:
        return
    changed = _changed(exact, narrow)
    fits = changed <= NARROW
    yield Item(
        say("precision"),
        say("bfloat16 under autocast, statistics in float32") if fits else say("float32"),
        changed,
        say("of the answers change in bfloat16"),
        say("Running statistics stay in float32 in any case: in bfloat16 an average stops moving before it is right."),
    )


def _changed(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(1) != other.argmax(1)).double().mean())


def _fastest(timings: Timings) -> Item:
    rate = timings.samples / timings.seconds[timings.fastest]
    return Item(
        say("fastest way to run it here"),
        say("{name}", name=timings.fastest),
        timings.gain,
        say("times as fast as it is"),
        say(
            "{rate:,.0f} samples a second in batches of {samples}, the median of {rounds} rounds in turns.",
            rate=rate,
            samples=timings.samples,
            rounds=timings.rounds,
        ),
    )
