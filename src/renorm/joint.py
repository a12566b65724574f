"""A labelled source and an unlabelled target trained together: each normalised as what it is, one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from renorm.calls import Caller, read, several_passes
from renorm.errors import BatchError, UnknownName, UsageError
from renorm.feed import Feed
from renorm.layers.per_domain import Domains, Sets
from renorm.recipe import Recipe
from renorm.sites import unwrap
from renorm.surgery import convert_

LAYERS = ("per_domain", "transferable")
TARGET, SOURCE = "target", "source"
ENTROPY = 0.1  # the target’s weight beside the source’s loss: that of AutoDIAL (Carlucci et al. 2017)


class Alone:
    """No target: every batch goes through the model as it is."""

    def __init__(self, recipe: Recipe) -> None:
        self.caller: Caller = recipe.caller
        self.feed: Feed | None = None

    def penalty(self) -> Tensor | float:
        """What the last forward adds to the loss."""
        return 0.0

    def rest(self) -> None:
        """Evaluation follows."""

    def scored(self, val: Iterable[Any] | None) -> Iterable[Any] | None:
        """What the model is scored on."""
        return val


class Joint(Alone):
    """Every step's forward holds a batch of the source and one of the target, told apart at each batch norm.

    Inside, layers of `recipe.joint` stand where statistics move; at the end of `opened` batch norms stand there again, with
    what the target had. The target's labels, if it has any, are never trained on.
    Raises UsageError for options that do not go together, UnknownName for another layer, OneShot for a target that can be
    read only once.
    """

    def __init__(
        self, model: nn.Module, feed: Feed, recipe: Recipe, moving: Sequence[str], taken: int, opened: ExitStack
    ) -> None:
        assert recipe.target is not None  # or there is nothing joint
        _refuse(recipe, moving)
        self.target: Iterable[Any] = several_passes(recipe.target, asked="target=")
        super().__init__(recipe)
        own = Feed(self.target, recipe.epochs, recipe.seed + 1, feed.rank, feed.world)
        self.feed: Feed | None = own
        self.plain: Caller = recipe.caller
        self.caller: Caller = replace(recipe.caller, forward=self._forward, output=None)
        self.weight: float = recipe.target_weight
        self._answers: Tensor | None = None
        self._batches = islice(self._endless(own), taken, None)
        self._ids = Domains()
        options: dict[str, Any] = {"domains": [TARGET, SOURCE]} if recipe.joint == "per_domain" else {}
        conversion = convert_(model, to=recipe.joint, include=moving, **options)
        opened.callback(conversion.settle_)
        for layer in unwrap(model).modules():
            if isinstance(layer, Sets) and layer.current is None:
                layer.current = self._ids
        self.rest()

    def penalty(self) -> Tensor | float:
        assert self._answers is not None  # a forward came before
        logs = self._answers.float().log_softmax(1)
        return self.weight * -(logs.exp() * logs).sum(1).mean()

    def rest(self) -> None:
        self._ids.ids = TARGET  # never cleared: a backward pass that recomputes reads it again

    def scored(self, val: Iterable[Any] | None) -> Iterable[Any] | None:
        """`val`, or where there is none the target, if it has labels."""
        if val is not None:
            return val
        labelled = read(next(iter(self.target))).labels is not None
        return self.target if labelled else None

    def _endless(self, feed: Feed) -> Iterator[Any]:
        for number in count():
            empty = True
            for batch in feed.epoch(number):
                empty = False
                yield batch
            if empty:
                raise BatchError("target= holds no batch; give unlabelled batches of the domain that the model is for.")

    def _forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The answers for the source's part, those for the target's kept aside."""
        ours, theirs = read(batch, model=model), read(next(self._batches), model=model)
        args = tuple(map(_joined, ours.args, theirs.args))
        kwargs = {name: _joined(value, theirs.kwargs.get(name)) for name, value in ours.kwargs.items()}
        self._ids.ids = torch.tensor([1] * ours.samples + [0] * theirs.samples)
        output = model(*args, **kwargs)
        logits = self.plain.find(output)
        if logits is None or logits.dim() != 2:
            raise UsageError(
                "joint training needs a model whose logits are one row per sample; say which part with output=."
            )
        self._answers = logits[ours.samples :]
        return logits[: ours.samples]


def _joined(ours: Any, theirs: Any) -> Tensor:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape[1:] != theirs.shape[1:]:
        shapes = " and ".join(
            str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in (ours, theirs)
        )
        raise BatchError(
            f"source and target are joined into one batch, and their inputs are {shapes}; give both as tensors of one shape "
            "per sample."
        )
    return torch.cat([ours, theirs.to(ours.device, ours.dtype)])


def _refuse(recipe: Recipe, moving: Sequence[str]) -> None:
    if recipe.joint not in LAYERS:
        raise UnknownName("joint layer", recipe.joint, LAYERS)
    wrong = {
        "regularisers=, which compare the source's batches alone": bool(recipe.regularisers),
        "average=, since statistics for averaged weights are estimated on train": recipe.average is not None,
        "gradual=, which holds layers still": recipe.gradual,
        "forward=, since two batches are joined": recipe.caller.forward is not None,
        'a policy under which no batch norm statistics move; give policy="all"': not moving,
    }
    first = next((what for what, stands in wrong.items() if stands), None)
    if first:
        raise UsageError(f"target= was given together with {first}; leave one of the two.")
