"""Labels and answers counted pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np


def confusion(labels: Any, answers: Any, classes: int) -> Any:
    """Rows are labels, columns answers."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    for label, answer in zip(labels.ravel(), answers.ravel(), strict=True):
        counts[label, answer] += 1
    return counts
