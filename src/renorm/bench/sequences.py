"""Digits read as sequences: the same network with torch's LSTM and with batch norm at every step."""

from __future__ import annotations

from collections.abc import Mapping
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from renorm.bench import digits
from renorm.layers.recurrent.lstm import BNLSTM

__all__ = ["READINGS", "Reader", "race"]

# How an 8 × 8 image becomes a sequence (N, T, C).
READINGS = {"rows": (8, 8), "pixels": (64, 1)}
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

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


def race(kind: str, reading: str, *, seed: int, epochs: int, rate: float) -> Mapping[str, float]:
    """Train one network; its error in per cent on images it never saw, and the steps and seconds of training to `GOAL`.

    The learning rate falls to 0 along a cosine.
    Seconds are the processor's, of training alone, not of the looks; 0 steps: never reached.
    """
    source, held_out = digits.load()
    steps, width = READINGS[reading]
    x, unseen = (part.images.reshape(len(part), steps, width) for part in (source, held_out))
    torch.manual_seed(seed)
    model, shuffle = Reader(kind, width, steps), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    total = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    seconds, done, reached = 0.0, 0, (0, 0.0)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=shuffle), BATCH):
            start = process_time()
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[rows]), source.labels[rows]))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds, done = seconds + process_time() - start, done + 1
            if not reached[0] and done % LOOK == 0 and _right(model, unseen, held_out.labels) >= GOAL:
                reached = done, seconds
    return {
        "error": 100 * (1 - _right(model, unseen, held_out.labels)),
        "steps_to_goal": reached[0],
        "seconds_to_goal": reached[1],
        "steps": done,
        "training_seconds": seconds,
    }


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    right = int((model(x).argmax(1) == labels).sum())
    model.train()
    return right / len(labels)
