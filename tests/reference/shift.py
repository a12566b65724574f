"""Distances between the Gaussians N(ms, vs) and N(mt, vt), from their definitions and without shortcuts."""

from __future__ import annotations

import math

from scipy import integrate, stats  # type: ignore[import-untyped]


def mean_gap(ms: float, vs: float, mt: float, vt: float) -> float:
    return abs(mt - ms) / math.sqrt(vs)


def log_sd_ratio(ms: float, vs: float, mt: float, vt: float) -> float:
    return math.log(math.sqrt(vt) / math.sqrt(vs))


def kl(m0: float, v0: float, m1: float, v1: float) -> float:
    """KL divergence of N(m0, v0) from N(m1, v1), by numerical integration of p log(p/q)."""
    p, q = stats.norm(m0, math.sqrt(v0)), stats.norm(m1, math.sqrt(v1))
    low, high = m0 - 12 * math.sqrt(v0), m0 + 12 * math.sqrt(v0)
    value, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high, limit=200)
    return float(value)


def sym_kl(ms: float, vs: float, mt: float, vt: float) -> float:
    """The sum of the divergences in both directions, Jeffreys' J."""
    return kl(ms, vs, mt, vt) + kl(mt, vt, ms, vs)


def wasserstein2(ms: float, vs: float, mt: float, vt: float) -> float:
    """Root mean squared distance under the optimal coupling (quantile to quantile), in source standard deviations."""
    p, q = stats.norm(ms, math.sqrt(vs)), stats.norm(mt, math.sqrt(vt))
    value, _ = integrate.quad(lambda u: (p.ppf(u) - q.ppf(u)) ** 2, 1e-12, 1 - 1e-12, limit=400)
    return math.sqrt(value) / math.sqrt(vs)
