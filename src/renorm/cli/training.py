"""What `finetune` and `pretrain` share: data that reshuffle, progress drawn from events, weights written at the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from renorm.cli.base import argument, option
from renorm.cli.subject import DATA, OnModel, notes, recorded

if TYPE_CHECKING:
    from renorm.cli.screen import Screen
    from renorm.datasets.base import Batches, Dataset
    from renorm.events import FineTuned
    from renorm.models import Model
    from renorm.recipe import Recipe
    from renorm.report.base import Report


@dataclass(frozen=True, kw_only=True)
class Trains(OnModel):
    """A command that trains a model on labelled data and writes its weights."""

    data: str = argument(f"{DATA}; with labels")
    output: str = option(
        "", "the weights to write: .safetensors, .pt or .pth", short="-o", metavar="OUT", required=True
    )
    val: str = option("", "labelled data to score after each epoch", metavar="DATA")
    epochs: int = option(5, "how often all data are seen")
    lr: float | Literal["auto"] = option("auto", "the highest learning rate")
    optimiser: Literal["adamw", "sgd"] = option("adamw", "sgd is with momentum 0.9, Nesterov")
    weight_decay: float = option(0.01, "of weights; norm layers and biases have none")
    average: Literal["ema", "swa"] | None = option(
        None, "write the mean of the weights over the steps, statistics to fit"
    )
    memory: Literal["normal", "lean"] = option(
        "normal", "lean: blocks run twice instead of being kept, to the same result"
    )
    metric: str = option("accuracy", "what val is scored by; renorm evaluate --help lists them", metavar="NAME")
    run_folder: str = option("", "keep checkpoints here, and go on from the one it holds", metavar="DIR")
    save_every: int | None = option(None, "steps between checkpoints (default: each epoch and each minute)")

    @abstractmethod
    def recipe(self) -> Recipe:
        """The options of the loop."""

    def beside(self, model: Model, recipe: Recipe) -> Recipe:
        """The recipe with whatever other data it trains on."""
        return recipe

    def prepared(self) -> tuple[Model, Dataset]:
        """The model and its training data."""
        model = self.opened()
        return model, self.dataset(self.data, model)

    def run(self, screen: Screen) -> Report:
        from renorm.checkpoints import writable
        from renorm.cli.screen import is_first
        from renorm.files import claimed

        target = writable(self.output, force=self.force)
        with claimed(target) if is_first() else nullcontext():
            return self._run(target, screen)

    def _run(self, target: Path, screen: Screen) -> Report:
        from renorm.errors import DataError
        from renorm.provenance import fingerprint, provenance
        from renorm.report import finetuned as page
        from renorm.report.base import Report

        recipe = self.recipe()
        model, dataset = self.prepared()
        if dataset.labels is None:
            raise DataError(f"{self.data} has no labels to train on. Give class subfolders, or an array of labels.")
        val = self.dataset(self.val, model) if self.val else None
        origin = fingerprint(model.module)
        names = tuple(dataset.classes or ()) or None
        recipe = replace(self.beside(model, recipe), classes=names if recipe.head != "keep" else None)
        result, losses = _drawn(model, Reshuffled(dataset.batches, names), val and val.batches, recipe, screen)
        loaded = model.checkpoint.sha256 if model.checkpoint else None
        remembered = recorded(model, dataset)
        made = provenance(
            command=self.written(),
            model=origin,
            data=dataset.fingerprint,
            checkpoint=loaded,
            policy=result.policy.name,
            lr=result.lr,
            head=result.head,
            classes=list(names or ()),
            steps=result.steps,
            **remembered,
        )
        self._write(model, target, made)
        return Report(
            command=self.name,
            model=self.model,
            data=self.data,
            verdict=page.verdict(result, output=self.output),
            blocks=page.blocks(result, losses=losses, names=names),
            result=page.result(result, names=names) | {"output": self.output},
            notes=(*result.notes, *_constant(remembered), *notes(model, dataset, val)),
            origin=self.origin_of(model, dataset, fingerprinted=origin),
        )

    def _write(self, model: Model, target: Path, made: Mapping[str, Any]) -> None:
        from renorm.checkpoints import write
        from renorm.cli.screen import is_first
        from renorm.errors import FileExists, UsageError

        if not is_first():
            return
        try:
            write(model.module, target, provenance=made, force=self.force)
        except (UsageError, FileExists) as error:
            again = "With --run-folder DIR the training would have been kept."
            if self.run_folder:
                again = f"The training is kept in {self.run_folder}: the same command goes on from there."
            raise type(error)(f"{error} {again}") from error


@dataclass(frozen=True)
class Reshuffled:
    """The batches of a data set, in a new order each epoch; images are still decoded as they are asked for."""

    batches: Batches
    classes: tuple[str, ...] | None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def shuffled(self, seed: int) -> Iterable[Any]:
        """One pass over all samples in the order of `seed`."""
        import numpy as np
        import torch

        batches = self.batches
        order = np.random.default_rng(seed).permutation(len(batches.order))
        labels = None if batches.labels is None else batches.labels[torch.from_numpy(order)]
        return replace(batches, order=batches.order[order], labels=labels)


def _drawn(
    model: Model, train: Reshuffled, val: Any, recipe: Recipe, screen: Screen
) -> tuple[FineTuned, list[tuple[int, float]]]:
    """Run the loop to its end, with its events drawn as they come; the result, and (step, loss) of each step."""
    from renorm.events import Epoch, Finished, Started, Stepped
    from renorm.finetune import training

    events = training(model.module, train, val, recipe)
    started = next(events)
    assert isinstance(started, Started)
    losses: list[tuple[int, float]] = []
    with screen.progress(f"training ({started.policy.value.name})", total=started.steps, done=started.done) as drawn:
        for event in events:
            if isinstance(event, Stepped):
                losses.append((event.step, event.loss))
                drawn(1, f"epoch {event.epoch + 1}, loss {event.loss:.3f}")
            elif isinstance(event, Epoch) and event.score is not None:
                drawn(0, f"epoch {event.epoch + 1}, {event.score.metric} {event.score.value:.3f}")
    assert isinstance(event, Finished)  # the last one of a loop that does not fail
    return event.result, losses


def _constant(remembered: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on the columns of a table that are the same in all rows."""
    from renorm.said import say, some

    found = remembered.get("columns")
    lie = zip(found["names"], found["mean"], found["var"], strict=True) if found else ()
    names = [
        name for name, mean, var in lie if var <= (1e-12 * mean) ** 2
    ]  # sums of many batches leave rounding behind
    told = say("columns with one value in all rows, which tells the model nothing: {some}", some=some(names))
    return (told,) if names else ()
