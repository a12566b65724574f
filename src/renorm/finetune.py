"""Fine-tuning: one training loop, read top to bottom. It yields events; `finetune_` is the loop run to its end."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import monotonic
from typing import Any, Literal

import torch
from torch import nn

from renorm.average import Unaveraged, average_for
from renorm.calls import Caller, Forward, Output, several_passes
from renorm.errors import Diverged
from renorm.evaluate import Metric, Score, evaluate
from renorm.events import Epoch, Event, FineTuned, Finished, Stepped
from renorm.feed import Feed
from renorm.few import solve_
from renorm.joint import Alone, Joint
from renorm.lean import lean_
from renorm.policy import Policy
from renorm.provenance import fingerprint
from renorm.recalibrate import recalibrate_
from renorm.recipe import Loss, Optimiser, Recipe
from renorm.regularisers.base import Penalty, Regulariser, Step, build
from renorm.runs import Saved
from renorm.session import (
    Place,
    Plan,
    Still,
    accelerator_for,
    kept,
    layers_in,
    moving_sites,
    optimiser_for,
    penalties,
    planned,
    run_for,
)
from renorm.sites import unwrap, walk
from renorm.state import own_randomness, preserving

WARM = 0.1  # of all steps, over which the rate rises; then it falls to nothing along a cosine
ONCE = 100  # steps over which it rises where their number is not known; then it stays
SAVED = 60.0  # seconds of work that a kill may cost, where nothing else was asked for
STALE = 0.05  # share of the source in moving statistics from which on they are re-estimated before validation


def finetune_(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    policy: str | Policy = "auto",
    regularisers: str | Regulariser | Sequence[str | Regulariser] = (),
    epochs: int = 5,
    lr: float | Literal["auto"] = "auto",
    head: Literal["auto", "new", "keep"] = "auto",
    loss: Loss | None = None,
    metric: Metric = "accuracy",
    memory: Literal["normal", "lean"] = "normal",
    seed: int = 0,
    *,
    head_name: Literal["auto"] | str | Sequence[str] = "auto",
    classes: Sequence[str] | None = None,
    optimiser: Optimiser = "adamw",
    weight_decay: float = 0.01,
    depth_decay: float = 1.0,
    gradual: bool = False,
    clip: float | None = 1.0,
    average: Literal["ema", "swa"] | None = None,
    ema_decay: float = 0.999,
    target: Iterable[Any] | None = None,
    joint: Literal["transferable", "per_domain"] = "transferable",
    target_weight: float = 0.1,
    run: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    accelerator: Any = None,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> FineTuned:
    """Train `model` on the labelled batches of `train`, moving what `policy` lets move, and leave it in evaluation.

    policy        a name or `Policy`; "auto" chooses by the number of labels, batch size and shift (docs/finetune.md)
    regularisers  names of the catalogue, or instances with options of their own; their penalties are added to the loss
    lr            the highest rate, of the features' last stage; a new head has three times that. "auto" says why
    head          "keep", "new", or "auto": new unless the label names (`classes`, or what `train` says) are the model's
    loss          cross_entropy, bce, mse, l1, or (logits, labels) → scalar; None: by the type of the labels
    memory        "lean": blocks are computed again in the backward pass instead of kept, to the same result (`lean_`)
    optimiser     adamw, sgd (Nesterov, 0.9), or groups → optimiser
    depth_decay   the rate falls by this factor from one stage of features to the one before it
    gradual       train the head first, then one stage after another from the last on, all from half the epochs on
    clip          the largest norm of a gradient; None: as it is
    average       the weights at the end and at each validation are an average of those after each step, and statistics are
                  estimated anew for it: "ema" forgets by `ema_decay`, "swa" is the mean over the last quarter of the steps
    target        unlabelled batches of the domain that the model is for: each step trains on the labels of `train` and lowers
                  the entropy of the answers on `target`, by `target_weight`; the domains are told apart by the layer `joint`
                  at each batch norm. Without val, a target that has labels is scored on them, never trained
    run           a folder for checkpoints; where it holds one of this very run, training goes on from there to the same result
    save_every    steps from one checkpoint to the next; None: after each epoch and each minute
    accelerator   your own `accelerate.Accelerator`: mixed precision, accumulation; by default one as `accelerate launch` says

    A list of batches is mixed anew each epoch, a DataLoader read as it is. Statistics that moved are re-estimated exactly on
    `train` at the end; the policy "recalibrate-then-freeze" does so before. Of several processes each takes its share of the
    batches, and gradients are averaged. A failure or Ctrl-C at any point leaves the model bit-identical.
    Raises OneShot for an iterator and several epochs, BatchError for labels or batches that cannot be learnt from, Diverged
    where the loss is no number, with the step and the site; CheckpointError for a `run` of another model, data or options.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    recipe = Recipe(
        policy=policy,
        regularisers=build(regularisers),
        epochs=epochs,
        lr=lr,
        head=head,
        head_name=head_name,
        loss=loss,
        metric=metric,
        memory=memory,
        seed=seed,
        classes=None if classes is None else tuple(classes),
        optimiser=optimiser,
        weight_decay=weight_decay,
        depth_decay=depth_decay,
        gradual=gradual,
        clip=clip,
        average=average,
        ema_decay=ema_decay,
        target=target,
        joint=joint,
        target_weight=target_weight,
        run=run,
        save_every=save_every,
        accelerator=accelerator,
        caller=caller,
    )
    result = None
    for event in training(model, train, val, recipe):
        if isinstance(event, Finished):
            result = event.result
    assert result is not None  # the last event of a loop that did not raise
    return result


def training(model: nn.Module, train: Iterable[Any], val: Iterable[Any] | None, recipe: Recipe) -> Iterator[Event]:
    """The events of a training run: `Started`, a `Stepped` for each step, an `Epoch` after each, `Finished`.

    Whoever stops asking before `Finished`, or fails meanwhile, has the model as it was.
    """
    if val is not None:
        several_passes(val, asked="val=")
    accelerator = accelerator_for(model, recipe)
    feed = Feed(train, recipe.epochs, recipe.seed, accelerator.process_index, accelerator.num_processes)
    with kept(model) as source, own_randomness(), ExitStack() as opened:
        origin = fingerprint(model) if recipe.run is not None else ""
        plan = planned(model, feed, recipe, source)
        run = run_for(plan, recipe, origin, writes=accelerator.is_main_process)
        opened.callback(run.close)
        still = Still(model, plan, recipe)
        opened.callback(still.let_go)
        still.hold(epoch=recipe.epochs)
        moved = still.moving()
        saved = run.load()
        beside = _beside(model, feed, recipe, still, saved, opened)
        val = beside.scored(val)
        optimiser = accelerator.prepare_optimizer(optimiser_for(model, plan, recipe, source))
        terms = penalties(model, plan, recipe, feed, source, opened)
        peaks = [group["lr"] for group in optimiser.param_groups]
        average = average_for(recipe, optimiser, batches=plan.steps, once=feed.once)
        place = Place.resumed(saved, model, optimiser, average, feed)
        if place == Place() and plan.policy.value.statistics == "target":
            plan = _fitted(model, feed, recipe, plan, still)
        yield plan.started(place)

        last = monotonic()
        for epoch in range(place.epoch, plan.epochs):
            still.hold(epoch=epoch)
            model.train()
            began, position = monotonic(), feed.position()
            for batch in feed.epoch(epoch, skip=place.batch):
                rate = _set_rates(optimiser, peaks, place.taken, plan.steps, held=average.held_from())
                value = _learnt(model, batch, place, beside, terms, (accelerator, optimiser), recipe)
                stepped = bool(accelerator.sync_gradients)
                place = place.after(value, stepped=stepped)
                if stepped:
                    average.take(place.taken)
                    accelerator.log({"loss": value, "lr": rate}, step=place.step)
                    yield Stepped(step=place.step, epoch=epoch, loss=value, lr=rate)
                    if _due(recipe, place, monotonic() - last):
                        run.save(place.saved(model, optimiser, average, position))
                        last = monotonic()
            beside.rest()
            score = _validated(model, val, None if beside.feed else feed, recipe, still, place, average)
            seconds = monotonic() - began
            place = place.next_epoch(
                Epoch(epoch=epoch, loss=place.mean, score=score, lr=rate, seconds=seconds, drift=source.drift())
            )
            run.save(place.saved(model, optimiser, average, feed.position()))
            yield place.history[-1]

        average.settle_()
        opened.close()
        _re_estimate(model, beside.feed or feed, recipe, moved, exactly=True)
        model.eval()
        score = None if val is None else _scored(model, val, recipe)
        finished = Finished(result=plan.result(place, score, source, average))
    yield finished


def _beside(
    model: nn.Module, feed: Feed, recipe: Recipe, still: Still, saved: Saved | None, opened: ExitStack
) -> Alone:
    """Put the layers in place that a regulariser or a target asks for, and say what runs a batch."""
    moved, beside = still.moving(), Alone(recipe)
    layers_in(model, recipe, still, opened)
    if recipe.memory == "lean":
        opened.callback(lean_(model).restore_)
    if recipe.target is not None:
        still.let_go()
        beside = Joint(model, feed, recipe, moved, saved.state["taken"] if saved else 0, opened)
        opened.callback(still.let_go)
    still.hold(epoch=recipe.epochs)
    return beside


def _learnt(
    model: nn.Module,
    batch: Any,
    place: Place,
    beside: Alone,
    terms: Sequence[Penalty],
    moving: tuple[Any, Any],
    recipe: Recipe,
) -> float:
    """One batch forward and back, and a step where its gradients are complete; its loss. Raises Diverged."""
    accelerator, optimiser = moving
    with accelerator.accumulate(model):
        with accelerator.autocast():
            result = beside.caller.run(model, batch, index=place.batch)
            loss = recipe.loss_of(result) + beside.penalty()
            loss = sum((term(Step(batch, result)) for term in terms), loss)
        accelerator.backward(loss)
        value = float(loss.item())
        if not math.isfinite(value):
            raise Diverged(_diverged(model, batch, value, place, recipe))
        _finish_gradients(accelerator, optimiser, recipe)
        optimiser.step()
        optimiser.zero_grad()
    return value


def _set_rates(optimiser: Any, peaks: Sequence[float], taken: int, steps: int, *, held: int | None) -> float:
    """Give every group its rate after so many batches, as after `held` from there on; return the largest of the features'."""
    taken = taken if held is None else min(taken, held)
    warm = max(1, round(WARM * steps)) if steps else ONCE
    share = min(1.0, (taken + 1) / warm)
    if steps and taken >= warm:
        share = 0.5 * (1 + math.cos(math.pi * (taken - warm) / max(1, steps - warm)))
    for group, peak in zip(optimiser.param_groups, peaks, strict=True):
        group["lr"] = peak * share
    return max(peaks) * share


def _finish_gradients(accelerator: Any, optimiser: Any, recipe: Recipe) -> None:
    """Before a step: gradients averaged over processes, and cut to their largest norm."""
    if not accelerator.sync_gradients:
        return
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if accelerator.num_processes > 1 and parameters:
        # one message for all; a wrapper that averages while backward runs would have to be told what is frozen
        mean = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), reduction="mean")
        for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
    if recipe.clip is not None:
        accelerator.clip_grad_norm_(parameters, recipe.clip)


def _due(recipe: Recipe, place: Place, seconds: float) -> bool:
    if recipe.run is None:
        return False
    return seconds >= SAVED if recipe.save_every is None else place.step % recipe.save_every == 0


def _re_estimate(model: nn.Module, feed: Feed, recipe: Recipe, names: Sequence[str], *, exactly: bool) -> None:
    """Give these sites the statistics of the training data, for good: `exactly`, or with the source as a prior."""
    if names and not feed.once:
        prior: int | Literal["auto"] = 0 if exactly else "auto"
        batches = feed.epoch(recipe.epochs)  # in an order of its own: classes one after another would do harm
        recalibrate_(model, batches, prior=prior, include=names, **vars(recipe.caller)).undo.close()


def _fitted(model: nn.Module, feed: Feed, recipe: Recipe, plan: Plan, still: Still) -> Plan:
    """Before the first step: the target's statistics, and for a policy that solves its head all there is to do."""
    if not plan.policy.value.solves:
        _re_estimate(model, feed, recipe, still.held(), exactly=False)
        return plan
    whole = replace(feed, rank=0, world=1)  # every process solves the same
    new = plan.head.value == "new"
    solved = solve_(model, whole.epoch(0), plan.parts, new=new, seed=recipe.seed, caller=recipe.caller)
    return plan.with_solved(solved)


def _validated(
    model: nn.Module,
    val: Iterable[Any] | None,
    feed: Feed | None,
    recipe: Recipe,
    still: Still,
    place: Place,
    average: Unaveraged,
) -> Score | None:
    """The score on val: of the averaged weights where there are any, under statistics re-estimated on `feed`.

    Without an average statistics are re-estimated only where too few batches have moved those that stand.
    """
    if val is None:
        return None
    moving = still.moving() if feed is not None else []
    slow = [s for s in moving_sites(model, moving) if s.momentum and (1 - s.momentum) ** place.taken > STALE]
    with average.standing() as averaged:
        if feed is None or feed.once or not (slow or (averaged and moving)):
            return _scored(model, val, recipe)
        own = vars(recipe.caller)
        adaptation = recalibrate_(model, feed.epoch(recipe.epochs), prior=0, include=moving, **own)
        try:
            return _scored(model, val, recipe)
        finally:
            adaptation.restore_()


def _scored(model: nn.Module, val: Iterable[Any], recipe: Recipe) -> Score:
    return evaluate(model, val, recipe.metric, **vars(recipe.caller))


def _diverged(model: nn.Module, batch: Any, loss: float, place: Place, recipe: Recipe) -> str:
    where = _first_not_finite(model, batch, recipe)
    site = f"{where!r} is the first place whose output is not finite" if where else "every layer's output is finite"
    kept = f" The last good checkpoint stands in {recipe.run}." if recipe.run is not None and place.step else ""
    return (
        f"the loss became {loss} at step {place.step + 1}, in epoch {place.epoch + 1}: {site}. Try a lower lr=, or look at the "
        f"data and labels of batch {place.batch}.{kept}"
    )


def _first_not_finite(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """The first layer, in the order of the forward, that makes a number that is not finite."""
    bad: list[str] = []
    names = {module: name for name, module in walk(unwrap(model))}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
            bad.append(names[module])

    handles = [module.register_forward_hook(look) for module in names if not list(module.children())]
    try:
        with preserving(model), torch.no_grad():
            recipe.caller.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None
