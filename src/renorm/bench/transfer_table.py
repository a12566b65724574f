"""The table of suite `transfer`: mean errors by task and share of labels, and the targets with what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from renorm.bench.base import Row
from renorm.bench.intervals import paired
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

ABOUT = """\
CIFAR-10's ResNet-20 on other tasks: error in per cent on the test images, mean over seeds. *plain* is the script that people
write (a new head, Adam at 0.001, `train()`), *plain, BN in eval* the same with its batch norms in evaluation. All see the
same images as often, in batches of 32. The rate of "auto" was set on seed 0 of tinyimagenet20 at 15 %: of all rows, that
one is not independent.
"""
FEW = 0.15  # the target speaks of shares of labels up to this
POLICIES = ("all", "frozen-statistics", "recalibrate-then-freeze", "affine-and-head", "head-only")

Errors = dict[tuple[str, float, int], dict[str, float]]


def table(rows: Sequence[Row]) -> str:
    """Targets first, then the mean errors."""
    errors: Errors = {}
    for row in rows:
        cell = row.cell
        errors.setdefault((cell["task"], cell["share"], cell["seed"]), {})[cell["way"]] = row.values["error"]
    ways = list(dict.fromkeys(row.cell["way"] for row in rows))
    places = list(dict.fromkeys((task, share) for task, share, _ in errors))
    lines = []
    for task, share in places:
        here = [found for (t, s, _), found in errors.items() if (t, s) == (task, share)]
        means = [[found[way] for found in here if way in found] for way in ways]
        lines.append([task, f"{share:.0%}", *(f"{np.mean(m):.1f}" if m else "–" for m in means)])
    return "\n".join([ABOUT, "## Targets\n", _targets(errors, places), "## Error in %\n", _means(ways, lines)])


def _means(ways: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown(("task", "labels", *ways), lines, words=2)


def _targets(errors: Errors, places: Sequence[tuple[str, float]]) -> str:
    gains = [
        found["plain"] - found["auto"]
        for (_, share, _), found in errors.items()
        if share <= FEW and {"plain", "auto"} <= set(found)
    ]
    lines = []
    if gains:
        gain = paired(gains)
        lines.append(("auto at least 2 points above plain at up to 15 % labels", gain.text(), _said(gain.mean >= 2)))
    held = [_near_best(errors, place) for place in places]
    known = [near for near in held if near is not None]
    if known:
        share = sum(known) / len(known)
        words = f"{sum(known)} of {len(known)}"
        lines.append(
            ("auto best, or within its interval of the best policy, on 80 % of cells", words, _said(share >= 0.8))
        )
    return markdown(("target", "measured", "reached"), lines, words=3)


def _near_best(errors: Errors, place: tuple[str, float]) -> bool | None:
    """Whether the best policy's lead over auto, at this task and share, could be none; None where either is missing."""
    here = [found for (task, share, _), found in errors.items() if (task, share) == place and "auto" in found]
    leads = []
    for policy in POLICIES:
        differences = [found["auto"] - found[policy] for found in here if policy in found]
        if differences:
            leads.append(paired(differences))
    return None if not leads else all(lead.low <= 0 for lead in leads)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"
