"""Digits read as sequences: the same network with torch's LSTM and with batch norm at every step; on new data, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from renorm.bench import digits
from renorm.layers.recurrent.lstm import BNLSTM

__all__ = ["READINGS", "Reader", "race", "rows_of", "trained"]


class Recipe(NamedTuple):
    """How a network is trained on a sequence. `marked`: hidden weights start as the identity and, in training, the state as
    noise of sd 0.1, as Cooijmans et al. 2017 have it where the first steps are the same in every sample."""

    rate: float
    marked: bool = False


# How an image becomes a sequence (N, T, C).
READINGS = {"rows": (8, 8), "pixels": (64, 1), "mnist rows": (28, 28)}
MNIST = 4000, 2000  # of mnist15k, to train on and to look at
# In the longer sequences each network has the best of four: rates of 0.01 and 0.02, marked or not, by its error on seed 0. At
# the 0.003 of the short one neither came near 90 % pixel by pixel in 60 epochs.
RECIPES = {
    ("pixels", "lstm"): Recipe(1e-2),
    ("pixels", "bnlstm"): Recipe(2e-2, marked=True),
    ("mnist rows", "lstm"): Recipe(2e-2),
    ("mnist rows", "bnlstm"): Recipe(2e-2, marked=True),
}
USUAL = Recipe(3e-3)
HIDDEN, BATCH, LOOK = 64, 50, 10  # LOOK: training steps between two looks at the held-out images
GOAL = 0.9


class Reader(nn.Module):
    """Reads a sequence to its end, and says by its last state which of ten it is."""

    rnn: Any
    head: nn.Linear

    def __init__(self, kind: str, width: int, steps: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"steps": steps} if kind == "bnlstm" else {}
        self.rnn = {"lstm": nn.LSTM, "bnlstm": BNLSTM}[kind](width, HIDDEN, batch_first=True, **options)
        if kind == "lstm":  # the same start for both: a forget gate that is open
            with torch.no_grad():
                self.rnn.bias_ih_l0[HIDDEN : 2 * HIDDEN].fill_(1)
        self.head = nn.Linear(HIDDEN, 10)
        self.noise: float = 0.0

    def mark_(self) -> None:
        """Begin as a `Recipe` that is marked says."""
        with torch.no_grad():
            for gate in self.rnn.weight_hh_l0.chunk(4):
                nn.init.eye_(gate)
        self.noise = 0.1

    def forward(self, x: Tensor) -> Tensor:
        begun = None
        if self.noise and self.training:
            h = self.noise * torch.randn(1, len(x), HIDDEN)
            begun = h, torch.zeros_like(h)
        logits: Tensor = self.head(self.rnn(x, begun)[0][:, -1])
        return logits


def race(kind: str, reading: str, *, seed: int, epochs: int, data: Path) -> Mapping[str, float]:
    """Train one network; its error in per cent on images it never saw, and the steps and seconds of training to `GOAL`.

    Seconds are the processor's, of training alone, not of the looks; 0 steps: never reached.
    """
    x, labels, unseen, answers = _sequences(reading, data)
    model, run = _training(kind, reading, x, labels, seed=seed, epochs=epochs)
    seconds, done, reached = 0.0, 0, (0, 0.0)
    for step in run:
        start = process_time()
        step()
        seconds, done = seconds + process_time() - start, done + 1
        if not reached[0] and done % LOOK == 0 and _right(model, unseen, answers) >= GOAL:
            reached = done, seconds
    return {
        "error": 100 * (1 - _right(model, unseen, answers)),
        "steps_to_goal": reached[0],
        "seconds_to_goal": reached[1],
        "steps": done,
        "training_seconds": seconds,
    }


@lru_cache(maxsize=4)
def trained(kind: str, *, seed: int, epochs: int) -> tuple[nn.Module, tuple[Tensor, Tensor], digits.Digits]:
    """A reader of digits by rows, what it was trained on, and digits that it never saw, as images."""
    source, held_out = digits.load()
    x = rows_of(source.images)
    model, run = _training(kind, "rows", x, source.labels, seed=seed, epochs=epochs)
    for step in run:
        step()
    return model.eval(), (x, source.labels), held_out


def rows_of(images: Tensor) -> Tensor:
    """Digits (N, 1, 8, 8) row by row."""
    return images.reshape(len(images), *READINGS["rows"])


@lru_cache(maxsize=2)
def _sequences(reading: str, data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences and labels to train on, then those that are held out."""
    if reading.startswith("mnist"):
        with np.load(data / "mnist15k.npz", allow_pickle=False) as file:
            found = [
                file[name][:count]
                for part, count in zip(("", "_test"), MNIST, strict=True)
                for name in (f"images{part}", f"labels{part}")
            ]
        images, labels, unseen, answers = map(torch.from_numpy, found)
        images, unseen = images / 255, unseen / 255
    else:
        source, held_out = digits.load()
        images, labels, unseen, answers = source.images, source.labels, held_out.images, held_out.labels
    steps, width = READINGS[reading]
    return images.reshape(-1, steps, width), labels, unseen.reshape(-1, steps, width), answers


def _training(
    kind: str, reading: str, x: Tensor, labels: Tensor, *, seed: int, epochs: int
) -> tuple[Reader, Iterator[Callable[[], None]]]:
    """A new network, and the steps of its training, to be taken one after another; the rate falls to 0 along a cosine."""
    steps, width = READINGS[reading]
    recipe = RECIPES.get((reading, kind), USUAL)
    torch.manual_seed(seed)
    model, shuffle = Reader(kind, width, steps), Generator().manual_seed(seed)
    if recipe.marked:
        model.mark_()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // BATCH))

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x[rows]), labels[rows]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    def run() -> Iterator[Callable[[], None]]:
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), generator=shuffle), BATCH):
                yield partial(step, rows)

    return model, run()


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    right = int((model(x).argmax(1) == labels).sum())
    model.train()
    return right / len(labels)
