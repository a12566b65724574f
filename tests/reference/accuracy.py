"""Accuracy estimates, sample by sample in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    rows = []
    for row in logits:
        powers = [math.exp(value - max(row)) for value in row]
        rows.append([power / sum(powers) for power in powers])
    return np.array(rows)


def home(logits: Array, labels: Array) -> tuple[float, float, float]:
    """The share of right answers, the mean confidence, and the confidence that so large a share reaches."""
    sure = sorted(max(row) for row in softmax(logits))
    right = sum(int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True)) / len(labels)
    place = (1 - right) * (len(sure) - 1)
    low = math.floor(place)
    high = min(low + 1, len(sure) - 1)
    return right, sum(sure) / len(sure), sure[low] + (place - low) * (sure[high] - sure[low])


def estimate(source: Array, others: list[Array], moved: float, far: float, bar: float | None) -> float:
    """`(1 − w) sureness + w agreement` of probabilities, the agreement with whichever other agrees least."""
    sure = 0.0
    agree = [0.0 for _ in others]
    for n, one in enumerate(source):
        sure += (max(one) if bar is None else float(max(one) >= bar)) / len(source)
        for k, other in enumerate(others):
            agree[k] += sum(a * b for a, b in zip(one, other[n], strict=True)) / len(source)
    weight = moved * moved / (moved * moved + far * far)
    return (1 - weight) * sure + weight * min(agree)
