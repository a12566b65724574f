"""Recurrent batch norm as its formulas say it, one sequence, one step, one gate at a time, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Moments = dict[tuple[str, int], tuple[Array, Array, int]]  # (norm, step): mean, biased variance, samples


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


class _Norms:
    def __init__(
        self, weights: Mapping[str, Array], held: Mapping[str, tuple[Array, Array]] | None, eps: float
    ) -> None:
        self.weights, self.held, self.eps = weights, held, eps
        self.seen: Moments = {}

    def __call__(self, norm: str, step: int, rows: Array) -> Array:
        """Rows (n, C) of the sequences that run at this step."""
        if self.held is None:
            mean, var = rows.mean(0), rows.var(0)
            self.seen[norm, step] = mean, var, len(rows)
        else:
            means, variances = self.held[norm]
            place = min(step, len(means) - 1)
            mean, var = means[place], variances[place]
        return (rows - mean) / np.sqrt(var + self.eps) * self.weights[f"{norm}.weight"] + self.weights.get(
            f"{norm}.bias", 0.0
        )


def run(
    kind: str,
    sequences: Sequence[Array],
    weights: Mapping[str, Array],
    held: Mapping[str, tuple[Array, Array]] | None,
    *,
    eps: float = 1e-5,
) -> tuple[list[Array], list[Any], Moments]:
    """Every sequence's outputs (T, H) and last state, and what each norm saw at each step; `held` None: as in training."""
    norms = _Norms(weights, held, eps)
    hidden = weights["weight_hh_l0"].shape[1]
    h, c = ([np.zeros(hidden) for _ in sequences] for _ in range(2))
    outputs: list[list[Array]] = [[] for _ in sequences]
    b_x, b_h = weights["bias_ih_l0"], weights["bias_hh_l0"]
    for t in range(max(map(len, sequences))):
        running = [n for n, sequence in enumerate(sequences) if len(sequence) > t]
        x = norms("input", t, np.stack([weights["weight_ih_l0"] @ sequences[n][t] for n in running]))
        u = norms("hidden", t, np.stack([weights["weight_hh_l0"] @ h[n] for n in running]))
        if kind == "lstm":
            parts = np.split(x + u + b_x + b_h, 4, axis=1)
            i, f, o = (_sigmoid(parts[k]) for k in (0, 1, 3))
            cells = f * np.stack([c[n] for n in running]) + i * np.tanh(parts[2])
            states = o * np.tanh(norms("cell", t, cells))
        else:
            (x_r, x_z, x_n), (u_r, u_z, u_n) = np.split(x + b_x, 3, axis=1), np.split(u + b_h, 3, axis=1)
            r, z = _sigmoid(x_r + u_r), _sigmoid(x_z + u_z)
            cells = np.zeros((len(running), hidden))
            states = (1 - z) * np.tanh(x_n + r * u_n) + z * np.stack([h[n] for n in running])
        for row, n in enumerate(running):
            h[n], c[n] = states[row], cells[row]
            outputs[n].append(states[row])
    return [np.stack(output) for output in outputs], list(zip(h, c, strict=True)), norms.seen
