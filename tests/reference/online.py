"""Online methods as their papers write them, one sample or channel at a time in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def entropy(row: Array) -> float:
    p = softmax(row)
    return float(-sum(q * np.log(q) for q in p))


def normalised(x: Array, mean: Array, var: Array, eps: float) -> Array:
    """(x − mean) / sqrt(var + eps) per channel. Shapes: x (N, C, *)."""
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        out[:, c] = (x[:, c] - mean[c]) / np.sqrt(var[c] + eps)
    return out


def moments(x: Array, *, unbiased: bool = False) -> tuple[Array, Array]:
    """Mean and variance of each channel. Shapes: x (N, C, *) → (C,), (C,)."""
    values = [x[:, c].ravel() for c in range(x.shape[1])]
    return np.array([v.mean() for v in values]), np.array([v.var(ddof=int(unbiased)) for v in values])


def prior(x: Array, mean: Array, var: Array, images: int) -> tuple[Array, Array]:
    """Schneider et al. 2020, eq. 4: N/(N+n) of the source, n/(N+n) of the batch, its variance unbiased."""
    batch_mean, batch_var = moments(x, unbiased=True)
    n = len(x)
    return (images * mean + n * batch_mean) / (images + n), (images * var + n * batch_var) / (images + n)


def running(batches: list[Array], mean: Array, var: Array, rate: float) -> tuple[Array, Array]:
    """Yuan et al. 2023, eq. 4, with `rate` at 64 samples: what the last batch is normalised by."""
    for x in batches:
        share = 1 - (1 - rate) ** (len(x) / 64)
        m, v = moments(x)
        mean, var = (1 - share) * mean + share * m, (1 - share) * var + share * v
    return mean, var


def lame(logits: Array, neighbours: int, rounds: int) -> Array:
    """Boudiaf et al. 2022, eq. 5, row by row. Answers (N, K)."""
    n = len(logits)
    p = softmax(logits)
    unit = np.array([row / np.linalg.norm(row) for row in logits])
    distance = np.array([[np.linalg.norm(a - b) for b in unit] for a in unit])
    width = max(1e-12, np.mean([sorted(row)[min(neighbours, n) - 1] for row in distance]))
    affinity = np.exp(-(distance**2) / (2 * width**2))
    answers, energy = p, None
    for _ in range(rounds):
        pull = np.array([sum(affinity[i, j] * answers[j] for j in range(n)) for i in range(n)])
        answers = softmax(np.log(p) + pull)
        now = float(sum(answers[i] @ (np.log(answers[i]) - np.log(p[i]) - pull[i]) for i in range(n)))
        if energy is not None and abs(now - energy) <= 1e-8 * abs(energy):
            break
        energy = now
    return np.asarray(answers)


def unmixed(mean: Array, var: Array, parts: tuple[Array, Array], temperature: float) -> tuple[Array, Array, Array]:
    """Tomar et al. 2024, eq. 4 to 7: each instance's moments, and how it joins the components."""
    means, variances = parts
    out_mean, out_var, joins = [], [], []
    for m, v in zip(mean, var, strict=True):
        cosines = np.array([m @ k / (np.linalg.norm(m) * np.linalg.norm(k)) for k in means])
        p = softmax(cosines / temperature)
        mu = np.array([(1 - p[k]) * means[k] + p[k] * m for k in range(len(means))])
        s2 = np.array([(1 - p[k]) * variances[k] + p[k] * v for k in range(len(means))])
        out_mean.append(mu.mean(0))
        out_var.append(s2.mean(0) + (mu**2).mean(0) - mu.mean(0) ** 2)
        joins.append(p)
    return np.array(out_mean), np.array(out_var), np.array(joins)


def unmixed_parts(mean: Array, var: Array, parts: tuple[Array, Array], joins: Array, share: float) -> list[Array]:
    """Eq. 8 and 9: every component after the batch."""
    moved = [part.copy() for part in parts]
    for part, seen, old in zip(moved, (mean, var), parts, strict=True):
        for k in range(len(part)):
            part[k] = old[k] + share * np.mean([joins[b, k] * (seen[b] - old[k]) for b in range(len(seen))], axis=0)
    return moved


def selected(logits: Array, sure: float, margin: float, mean: Array | None) -> list[int]:
    """Niu et al. 2022, eq. 3 and 6: rows that are sure, and unlike the mean of those before."""
    kept = []
    for i, row in enumerate(logits):
        p = softmax(row)
        unlike = mean is None or abs(p @ mean) / (np.linalg.norm(p) * np.linalg.norm(mean)) < margin
        if entropy(row) < sure * np.log(len(row)) and unlike:
            kept.append(i)
    return kept


def soft_likelihood_ratio(row: Array) -> float:
    """Marsden et al. 2024: −Σ p ln(p / (1 − p) + 1e-5), p at most 0.99."""
    return float(-sum(p * np.log(p / (1 - p) + 1e-5) for p in np.minimum(softmax(row), 0.99)))


def even(samples: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Groups counted the same, but those of n samples n/(n+1). Shapes: (G,), sums (G, C) → (C,), (C,)."""
    weights = np.array([n / (n + 1) for n in samples])
    mean = second_moment = np.zeros(first.shape[1])
    for g, n in enumerate(samples):
        if n:
            mean = mean + weights[g] / weights.sum() * first[g] / n
            second_moment = second_moment + weights[g] / weights.sum() * second[g] / n
    return mean, second_moment - mean**2


def class_by_class(
    n: Array,
    first: Array,
    second: Array,
    there: tuple[Array, Array],
    classes: tuple[Array, Array],
    prior: Array,
    own: Array,
    eps: Array,
) -> tuple[Array, Array]:
    """Each class by its own moments and by the source's, moved as the whole has; mixed as `prior`. Shapes: (K,), (K, C)."""
    channels = first.shape[1]
    mean, var = np.empty(channels), np.empty(channels)
    for c in range(channels):
        t = first[:, c].sum() / n.sum()
        tv = second[:, c].sum() / n.sum() - t**2
        a = np.sqrt((tv + eps[c]) / (there[1][c] + eps[c]))
        one, two = 0.0, 0.0
        for k in range(len(n)):
            m = t + a * (classes[0][k, c] - there[0][c])
            q = a**2 * classes[1][k, c] + m**2
            one += prior[k] * (own[k] * first[k, c] / n[k] + (1 - own[k]) * m)
            two += prior[k] * (own[k] * second[k, c] / n[k] + (1 - own[k]) * q)
        mean[c], var[c] = one, two - one**2
    return mean, var
