"""An average of the weights over the steps of a run, kept beside those that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from renorm.errors import UsageError
from renorm.recipe import Recipe
from renorm.said import say
from renorm.state import put_

LAST = 0.75  # of all steps; "swa" averages those after it, as in its paper (Izmailov et al. 2018)

Update = Callable[[Any, Any, Any], None]


class Unaveraged:
    """No average: the weights stay as the optimiser leaves them."""

    @property
    def count(self) -> int:
        """How many steps the average is of."""
        return 0

    def held_from(self) -> int | None:
        """The batch from which on the rate stays where it is; None: it falls to the end."""
        return None

    def take(self, taken: int) -> None:
        """The weights as they are after `taken` batches."""

    @contextmanager
    def standing(self) -> Iterator[bool]:
        """Inside, the model has the averaged weights, if there are any; whether there are."""
        yield False

    def settle_(self) -> None:
        """Let the model have the averaged weights for good."""

    def saved(self) -> dict[str, Tensor]:
        """All that it takes to go on from here."""
        return {}

    def go_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Stand where `saved` was."""

    def notes(self) -> tuple[str, ...]:
        """What the user should know of it."""
        return ()


class Average(Unaveraged):
    """The mean of the weights that train: `recipe.average` is "ema", which forgets, or "swa", equal over the last steps.

    "ema" weighs what it has by `ema_decay` at each step; in the first steps by (1 + t) / (10 + t), or a short run would end as
    it began. "swa" begins after three quarters of the `batches`, and the rate stays from there where it is.
    Raises UsageError for weights of less precision than float32, in which small changes of a mean are lost.
    """

    def __init__(self, weights: Sequence[Tensor], recipe: Recipe, *, batches: int) -> None:
        coarse = next((w for w in weights if w.is_floating_point() and torch.finfo(w.dtype).bits < 32), None)
        if coarse is not None:
            raise UsageError(
                f"average={recipe.average!r} was asked for, and the weights are {coarse.dtype}, in which small changes of a "
                "mean are lost; keep them in float32 and give autocast= or accelerator= for the precision of the forward."
            )
        self._kind = recipe.average
        self._after = int(LAST * batches) if recipe.average == "swa" else 0
        self._weights = list(weights)
        self._trained = nn.ParameterList(self._weights)
        mean: Callable[[], Update] = get_swa_multi_avg_fn
        update = _forgetting(recipe.ema_decay) if recipe.average == "ema" else mean()
        self._averaged = AveragedModel(self._trained, multi_avg_fn=update)

    @property
    def count(self) -> int:
        return int(self._averaged.n_averaged)

    def held_from(self) -> int | None:
        return self._after if self._kind == "swa" else None

    def take(self, taken: int) -> None:
        if taken > self._after:
            self._averaged.update_parameters(self._trained)

    @contextmanager
    def standing(self) -> Iterator[bool]:
        trained = [weight.detach().clone() for weight in self._weights]
        self.settle_()
        try:
            yield self.count > 0
        finally:
            put_(self._weights, trained)

    def settle_(self) -> None:
        if self.count:
            put_(self._weights, list(self._averaged.module.parameters()))

    def saved(self) -> dict[str, Tensor]:
        return {f"average.{name}": tensor.detach() for name, tensor in self._averaged.state_dict().items()}

    def go_to(self, tensors: Mapping[str, Tensor]) -> None:
        own = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
        self._averaged.load_state_dict(own)

    def notes(self) -> tuple[str, ...]:
        if not self.count:
            return ()
        if self._kind == "ema":
            return (say("the weights are the exponential mean of those after {count} steps", count=self.count),)
        return (say("the weights are the mean of those after {count} steps", count=self.count),)


def average_for(recipe: Recipe, optimiser: Any, *, batches: int, once: bool) -> Unaveraged:
    """The average that was asked for, over all that `optimiser` moves in so many `batches`.

    Raises UsageError where there are none, or they can be read only `once`.
    """
    if recipe.average is None:
        return Unaveraged()
    if once:
        raise UsageError(
            f"average={recipe.average!r} needs statistics estimated anew for the averaged weights, and the batches can be read "
            "only once; give a list or a DataLoader."
        )
    if not batches:
        raise UsageError(
            f"average={recipe.average!r} is of the weights after each step, and this policy takes none; leave one of the two."
        )
    return Average([p for group in optimiser.param_groups for p in group["params"]], recipe, batches=batches)


def _forgetting(decay: float) -> Update:
    weighed: Callable[[float], Update] = get_ema_multi_avg_fn

    def update(averaged: Any, current: Any, count: Any) -> None:
        taken = int(count)
        weighed(min(decay, (1 + taken) / (10 + taken)))(averaged, current, count)

    return update
