"""All that stands around the training loop: what was decided, what is held still, where it is, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from renorm.average import Unaveraged
from renorm.calls import tensors_in
from renorm.choices import Choice, Facts, choose_head, choose_policy, choose_rate, measure
from renorm.errors import UsageError, require
from renorm.evaluate import Score
from renorm.events import Epoch, FineTuned, Started
from renorm.feed import Feed, Labels
from renorm.few import Solved
from renorm.freeze import Freeze, hold_
from renorm.groups import parameter_groups
from renorm.heads import NewHead, last_layer, new_head_, outputs_of
from renorm.moments import Moments
from renorm.policy import apply_policy_, preset
from renorm.provenance import fingerprint
from renorm.recipe import Recipe, labels_of
from renorm.regularisers.base import Penalty, Start
from renorm.runs import Run, Saved, Unsaved
from renorm.said import say
from renorm.shift import Shift
from renorm.sites import Site, device_of, find_sites, parameters_of, unwrap, walk
from renorm.split import Split, split
from renorm.state import Undo
from renorm.surgery import convert_

HEAD_RATE = 3.0  # a new head learns so many times faster than what is pretrained


@dataclass
class Kept:
    """The model as it came: `undo` for its state, `source` for its values by name, `statistics` of its batch norm sites.

    `head` is None until a new one stands.
    """

    model: nn.Module
    undo: Undo
    source: Mapping[str, Tensor]
    statistics: Mapping[str, Moments]
    device: torch.device
    head: NewHead | None = None

    def restore(self) -> None:
        """Everything as it was."""
        self.undo.restore_()
        if self.head is not None:
            self.head.restore_()
        self.model.to(self.device)

    def drift(self) -> dict[str, float]:
        """How far the statistics that each batch norm site holds now lie from those it came with, in source sd."""
        return {
            site.name: Shift.between(self.statistics[site.name], held, eps=site.eps).layer.wasserstein2
            for site in find_sites(self.model)
            if site.name in self.statistics and (held := site.statistics()) is not None
        }


@contextmanager
def kept(model: nn.Module) -> Iterator[Kept]:
    """Inside, anything may happen to `model`; a failure gives it back bit for bit, gradients of before included."""
    inner = unwrap(model)
    undo = Undo("finetune_", dict(walk(inner)), parameters=True)
    held = {site.name: site.statistics() for site in find_sites(inner) if site.kind == "batch"}
    statistics = {name: moments for name, moments in held.items() if moments is not None}
    state = Kept(inner, undo, values_of(inner), statistics, device_of(inner))
    gradients = [(p, p.grad) for p in inner.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield state
    except BaseException:
        state.restore()
        raise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and every running statistic, by name."""
    found = {name: p.detach().clone() for name, p in parameters_of(model).items()}
    for site in find_sites(model):
        for key, tensor in zip(("running_mean", "running_var"), site.tensors or (), strict=False):
            found[f"{site.name}.{key}" if site.name else key] = tensor.detach().clone()
    return found


@dataclass(frozen=True)
class Plan:
    """What was decided before the first step."""

    policy: Choice
    lr: Choice
    head: Choice
    facts: Facts
    labels: Labels
    parts: Split
    epochs: int
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Batches in all epochs; 0 where that is not known."""
        return self.labels.batches * self.epochs

    def with_solved(self, solved: Solved) -> Plan:
        """With what was solved before the first step."""
        notes = []
        if solved.share is not None:
            notes.append(say("the statistics hold {share:.0%} of the target's moments", share=solved.share))
        if solved.strength is not None:
            notes.append(say("the head is a logistic regression, C = {strength:g}", strength=solved.strength))
        if solved.loss is not None:
            notes.append(say("by a loss of {loss:.3g} nats, the least of those tried", loss=solved.loss))
        return replace(self, notes=(*self.notes, *notes))

    def started(self, place: Place) -> Started:
        """The event that tells of it."""
        told = {name: getattr(self, name) for name in ("policy", "lr", "head", "facts", "steps", "notes")}
        return Started(**told, done=place.step, history=place.history)

    def result(self, place: Place, score: Score | None, kept: Kept, average: Unaveraged) -> FineTuned:
        """The event's last value."""
        return FineTuned(
            history=place.history,
            value=None if score is None else score.value,
            score=score,
            moved=_moved(kept),
            drift=kept.drift(),
            lr=self.lr.value,
            policy=self.policy.value,
            head=self.head.value,
            why={name: getattr(self, name).why for name in ("policy", "lr", "head")},
            facts=self.facts,
            steps=place.step,
            notes=(*self.notes, *average.notes()),
            undo=kept.undo,
            new_head=kept.head,
        )


def planned(model: nn.Module, feed: Feed, recipe: Recipe, kept: Kept) -> Plan:
    """Look at the data, decide, and put a new head in place where that was decided."""
    parts = split(model, recipe.head_name)
    labels = feed.look()
    names = labels_of(feed.train, recipe.classes)
    last = last_layer(model, parts)
    linear = last is not None and isinstance(dict(walk(unwrap(model)))[last], nn.Linear)
    facts = measure(model, labels, outputs_of(model, parts), names, caller=recipe.caller, linear=linear)
    head = choose_head(recipe.head, facts, labels, names=names, own=_own_names(model))
    policy = choose_policy(recipe.policy, facts, steps=recipe.asks_for_steps)
    if recipe.target is not None and recipe.policy == "auto":
        policy = Choice(preset("all"), say("source and target train together"))
    rate = choose_rate(recipe.lr, facts, policy.value)
    notes = (
        () if labels.complete else (say("the batches can be read only once: statistics are not re-estimated on them"),)
    )
    if head.value == "new":
        feed.begin(0)
        kept.head = new_head_(model, parts, facts.classes or 0, names=names)
    epochs = 0 if policy.value.solves else recipe.epochs
    return Plan(policy, rate, head, facts, labels, parts, epochs, notes)


def _own_names(model: nn.Module) -> tuple[str, ...] | None:
    config = getattr(unwrap(model), "pretrained_cfg", None)
    names = config.get("label_names") if isinstance(config, dict) else None
    return tuple(names) if names else None


@dataclass
class Still:
    """What stands still: the policy, and under gradual unfreezing the stages that wait; both anew in each epoch."""

    model: nn.Module
    plan: Plan
    recipe: Recipe
    handles: list[Freeze] = field(default_factory=list)

    def hold(self, epoch: int) -> None:
        """Hold what stands still in this epoch, whatever was let go meanwhile."""
        self.let_go()
        head = self.plan.parts.head or "auto"
        self.handles.append(apply_policy_(self.model, self.plan.policy.value, head=head))
        if self.recipe.gradual and (waiting := self._waiting(epoch)):
            sites = [site for site in find_sites(self.model) if self._stage(site.name) < waiting]
            stopped = {id(p) for name, p in parameters_of(self.model).items() if self._stage(name) < waiting}
            self.handles.append(hold_("gradual unfreezing", self.model, sites, stopped))

    def let_go(self) -> None:
        """Nothing is held any more."""
        while self.handles:
            self.handles.pop().restore_()

    def _waiting(self, epoch: int) -> int:
        stages = len(self.plan.parts.stages)
        if "head" not in self.plan.policy.value.trains:
            raise UsageError(
                f"gradual unfreezing begins with the head, which policy {self.plan.policy.value.name!r} does not train; "
                "leave one of the two."
            )
        return stages - math.ceil(stages * min(1.0, 2 * epoch / self.recipe.epochs))

    def _stage(self, name: str) -> int:
        return self.plan.parts.stage_of(name.partition("@")[0])

    def moving(self) -> list[str]:
        """The sites whose statistics training moves, all stages let go."""
        held = set(self.handles[0].statistics)
        return [s.name for s in find_sites(self.model) if s.kind == "batch" and s.tracks and s.name not in held]

    def held(self) -> list[str]:
        """The batch norm sites whose statistics the policy holds."""
        sites = {s.name for s in find_sites(self.model) if s.kind == "batch" and s.tensors is not None}
        return [name for name in self.handles[0].statistics if name in sites]


@dataclass(frozen=True)
class Place:
    """Where training stands: `epoch`, and in it `batch`; `step` counts steps of the optimiser, `taken` batches in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    taken: int = 0
    lost: float = 0.0
    history: tuple[Epoch, ...] = ()

    @property
    def mean(self) -> float:
        """The mean loss over the batches of this epoch."""
        return self.lost / max(1, self.batch)

    def after(self, loss: float, *, stepped: bool) -> Place:
        """One batch later."""
        return replace(
            self, batch=self.batch + 1, taken=self.taken + 1, step=self.step + stepped, lost=self.lost + loss
        )

    def next_epoch(self, done: Epoch) -> Place:
        """At the beginning of the next epoch."""
        return replace(self, epoch=self.epoch + 1, batch=0, lost=0.0, history=(*self.history, done))

    def saved(self, model: nn.Module, optimiser: Any, average: Unaveraged, position: str) -> Saved:
        """All that it takes to go on from here; `position` is that of the loader at the epoch's beginning."""
        tensors = {f"model.{name}": t for name, t in unwrap(model).state_dict().items() if isinstance(t, Tensor)}
        tensors |= average.saved()
        plain: dict[str, dict[str, Any]] = {}
        state = optimiser.state_dict()["state"]
        for index, entries in state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{index}.{key}"] = value
                else:
                    plain.setdefault(str(index), {})[key] = value
        own = {name: getattr(self, name) for name in ("epoch", "batch", "step", "taken", "lost")}
        history = [_told(epoch) for epoch in self.history]
        return Saved(tensors, {**own, "history": history, "position": position, "optimiser": plain})

    @staticmethod
    def resumed(saved: Saved | None, model: nn.Module, optimiser: Any, average: Unaveraged, feed: Feed) -> Place:
        """Put model, optimiser, average and loader where `saved` was, and say where that is: the beginning, without."""
        if saved is None:
            return Place()
        weights = {n.removeprefix("model."): t for n, t in saved.tensors.items() if n.startswith("model.")}
        unwrap(model).load_state_dict(weights)
        entries: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in saved.state["optimiser"].items()}
        for name, tensor in saved.tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})
        average.go_to(saved.tensors)
        feed.go_to(saved.state["position"])
        told = {name: saved.state[name] for name in ("epoch", "batch", "step", "taken", "lost")}
        return Place(**told, history=tuple(_epoch(each) for each in saved.state["history"]))


def _told(epoch: Epoch) -> dict[str, Any]:
    score = epoch.score and replace(epoch.score, confusion=None)  # of many classes larger than the weights
    return asdict(replace(epoch, score=score))


def _epoch(told: dict[str, Any]) -> Epoch:
    score = told["score"]
    return Epoch(**{**told, "score": score and Score(**{**score, "interval": tuple(score["interval"])})})


def accelerator_for(model: nn.Module, recipe: Recipe) -> Any:
    """The user's own accelerator, or one as `accelerate launch` and `torchrun` say; the model goes where it is to run."""
    accelerate = require("accelerate", extra="train", purpose="fine-tuning")
    if recipe.accelerator is not None:
        found = recipe.accelerator
    else:
        running = accelerate.state.PartialState._shared_state  # one per process, and no second of another kind
        device = torch.device(recipe.caller.device) if recipe.caller.device is not None else device_of(model)
        found = accelerate.Accelerator(cpu=not running and device.type == "cpu")
    if found.num_processes > 1:
        unwrap(model).to(found.device)
    elif recipe.caller.device is not None:
        unwrap(model).to(recipe.caller.device)
    return found


def optimiser_for(model: nn.Module, plan: Plan, recipe: Recipe, kept: Kept) -> torch.optim.Optimizer:
    """The optimiser over what trains when all stages do."""
    decays = not any(each.replaces_decay for each in recipe.regularisers)
    groups = parameter_groups(
        model,
        plan.lr.value,
        head_lr=plan.lr.value * (HEAD_RATE if kept.head else 1.0),
        weight_decay=recipe.weight_decay if decays else 0.0,
        depth_decay=recipe.depth_decay,
        head=plan.parts.head or "auto",
    )
    return recipe.made(groups, plan.lr.value)


def penalties(model: nn.Module, plan: Plan, recipe: Recipe, feed: Feed, kept: Kept, opened: ExitStack) -> list[Penalty]:
    """The regularisers' penalties, for as long as `opened` is."""
    start = Start(
        model=model,
        parts=plan.parts,
        state=kept.source,
        old_head=kept.head.old if kept.head else (),
        batches=None if feed.once else lambda: feed.epoch(0),
        caller=recipe.caller,
    )
    return [opened.enter_context(each.over(start)) for each in recipe.regularisers]


def layers_in(model: nn.Module, recipe: Recipe, still: Still, opened: ExitStack) -> None:
    """Put the layer that a regulariser trains through where statistics move, for as long as `opened` is."""
    asked = [each for each in recipe.regularisers if each.layer]
    if len(asked) > 1:
        raise UsageError(
            f"{asked[0].name} and {asked[1].name} both train through a layer of their own, and one can stand at a place; "
            "leave one of them out."
        )
    for each in asked:
        moving = still.moving()
        if not moving:
            raise UsageError(
                f"{each.name} changes how batch norms normalise whose statistics move, and under this policy none do; leave it "
                'out, or give policy="all".'
            )
        still.let_go()
        conversion = convert_(model, to=each.layer, include=moving, **each.layer_options())
        opened.callback(conversion.settle_)
        opened.callback(still.let_go)


def run_for(plan: Plan, recipe: Recipe, origin: str, *, writes: bool) -> Run | Unsaved:
    """The folder on disk of this very model, data and recipe; something that keeps nothing where none was asked for."""
    if recipe.run is None:
        return Unsaved()
    labels = plan.labels
    data = {
        "samples": labels.samples,
        "batches": labels.batches,
        "labels": sorted((labels.counts or {}).items()),
        "first": fingerprint({str(i): t for i, t in enumerate(tensors_in(list(labels.first)))}),
    }
    return Run(recipe.run, {"model": origin, "data": data, **recipe.identity()}, writes=writes)


def _moved(kept: Kept) -> dict[str, float]:
    found = {}
    for name, now in values_of(kept.model).items():
        before = kept.source.get(name)
        if before is None or before.shape != now.shape or torch.equal(before.to(now.device), now):
            continue
        if now.is_floating_point():
            was, is_now = before.to(now.device).double(), now.double()
            # of the larger of the two: means and biases of a network that never trained are 0
            found[name] = float((is_now - was).norm() / torch.maximum(was.norm(), is_now.norm()).clamp_min(1e-12))
    return found


def moving_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    """The sites of these names."""
    return [site for site in find_sites(model) if site.name in set(names)]
