"""What kind of shift it is: other values, other shares of classes, or content that the model does not know.

Batch norm hurts for two reasons, and only the first can be mended by statistics: the values that reach a layer have moved,
or the features do not fit what is in the data. Moments tell the first; predicted classes tell whether the classes are mixed
otherwise; and what is left when both are allowed for (a model that stays unsure after recalibration) is content.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from renorm.accuracy import Look
from renorm.methods.equal_mix import class_mix
from renorm.moments import TINY, Moments, Observed
from renorm.profile import Profile
from renorm.said import Said, say
from renorm.shift import Shift
from renorm.sites import Site

__all__ = ["Kind", "KindName", "Traces", "classes_of", "kind", "moved_at", "traces"]

KindName = Literal["none", "covariate", "label", "covariate and label", "content"]

# Where a trace speaks as much for as against, and what a doubling of it is worth in log odds; set on the cells of
# `renorm bench estimate`, whose table says how often each kind is told rightly. The first of two is with a profile.
VALUES = (0.025, 0.06)
CLASSES = 0.33
EVENED = 1.3  # plain re-estimation evens classes out: what it still shows counts this much more
CONTENT = 0.8
FADES = 0.1  # so much less of `CONTENT` where values moved to four times their limit: what they hide costs sureness too
SLOPE = 3.0
DOUBT = 0.5  # of what is said about classes, and content, where the values moved too: each hides the other


class Traces(NamedTuple):
    """What tells the kinds apart.

    values   `Shift.moved`, mean over sites, of the batches against the source: at the batches' own class mix with a profile,
             else against the statistics held
    classes  half the sum of differences between the estimated class mix and the source's, 0 to 1; without a profile against
             equal shares
    sure     mean confidence after recalibration, as a share of the source's own; None without a profile
    """

    values: float
    classes: float
    sure: float | None

    @property
    def known(self) -> bool:
        """Whether a profile of the source was there."""
        return self.sure is not None

    @property
    def limit(self) -> float:
        """Where `values` speak for a shift as much as against one."""
        return VALUES[0 if self.known else 1]


class Kind(NamedTuple):
    """What kind of shift it is, and how sure that is.

    name     "none", "covariate", "label", "covariate and label", or "content": what no statistics mend
    sure     the probability of that, as the benchmark bears it out
    parts    the probability of each: values moved, classes mixed otherwise, content not known
    why      what it follows from, in words
    traces   the numbers behind
    """

    name: KindName
    sure: float
    parts: Mapping[str, float]
    why: Said
    traces: Traces


def traces(seen: Look, *, values: float, source: Profile | None = None) -> Traces:
    """The numbers from which a kind follows; `values` is what `moved_at` or `Shift.moved` gave."""
    count = seen.source.shape[1]
    prior = torch.full((count,), 1 / count, dtype=torch.float64) if source is None else source.prior
    own = _apart(seen.source if seen.mixed is None else seen.mixed, prior)
    evened = _apart(seen.pooled, prior)
    sure = None
    if source is not None and seen.mixed is not None:
        sure = float(seen.mixed.amax(1).mean()) / max(source.confidence, TINY)
    return Traces(values, classes_of(own, evened, values=values, known=sure is not None), sure)


def classes_of(own: float, evened: float, *, values: float, known: bool) -> float:
    """How far the classes are mixed otherwise: as the model says, unless the values moved; then the less of both estimates."""
    return own if values < VALUES[0 if known else 1] else min(own, EVENED * evened)


def _apart(probabilities: Tensor, prior: Tensor) -> float:
    return 0.5 * float((class_mix(probabilities, prior, doubt=0.1) - prior).abs().sum())


def moved_at(mix: Tensor, source: Profile, seen: Mapping[str, Observed], sites: Iterable[Site]) -> float:
    """`Shift.moved`, mean over sites, of `seen` against what the source would show if its classes were mixed as `mix`."""
    there: dict[str, Moments] = source.at(mix)
    eps = {site.name: site.eps for site in sites}
    found = [Shift.between(there[name], seen[name].values, eps=eps[name]).moved for name in there if name in seen]
    return sum(found) / len(found) if found else 0.0


def kind(found: Traces) -> Kind:
    """The likeliest kind. A trace at its limit is worth even odds; each doubling of it `SLOPE` more in log odds."""
    values = _odds(found.values / found.limit)
    classes = _odds(found.classes / CLASSES, 2 * SLOPE)
    if values > 0.5:
        classes = 0.5 + (classes - 0.5) * DOUBT
    content = 0.0
    if found.sure is not None:
        far = min(
            1.0, max(0.0, math.log2(max(found.values, TINY) / (2 * found.limit)))
        )  # 0 to twice the limit, 1 at four
        content = _odds(CONTENT * (1 - FADES * far) / max(found.sure, TINY), 8 * SLOPE * (1 - DOUBT * far))
    likely: dict[KindName, float] = {
        "none": (1 - values) * (1 - classes) * (1 - content),
        "covariate": values * (1 - classes) * (1 - content),
        "label": (1 - values) * classes * (1 - content),
        "covariate and label": values * classes * (1 - content),
        "content": content,
    }
    name = max(likely, key=lambda each: likely[each])
    parts = {"covariate": values, "label": classes, "content": content}
    why = say(
        "the moments moved by {values:.3f} ({limit:.3g} is the limit), and the class mix differs by {classes:.0%}",
        values=found.values,
        limit=found.limit,
        classes=found.classes,
    )
    if found.sure is not None:
        why = say("{why}; recalibrated, the model is {sure:.0%} as sure as at home", why=why, sure=found.sure)
    return Kind(name, likely[name], parts, why, found)


def _odds(ratio: float, slope: float = SLOPE) -> float:
    """The logistic of `slope` times log₂ of `ratio`, which lies in [0, ∞)."""
    power: float = min(ratio, 1e6) ** (slope / math.log(2))
    return power / (1 + power)
