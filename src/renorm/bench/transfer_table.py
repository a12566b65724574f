"""The table of suite `transfer`: mean errors by task and share of labels, and the targets with what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from renorm.bench.base import Row
from renorm.bench.intervals import paired
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

ABOUT = """\
Error in per cent on test samples of a new task, mean over seeds. Networks: a small one for gas sensors trained on the first
two batches of measurements, one for digits trained on mnist15k by the loop of `renorm pretrain`, CIFAR-10's ResNet-20
(tinyimagenet20, pacs3 and pneumoniamnist at their own size), MobileNetV1-0.25 (pacs3 at 96²). All ways see the same samples
equally often, in batches of 32, for at least 100 steps and 5 epochs, and all begin with a new head. *plain* is the script that
people write (Adam at 0.001, `train()`), *plain, BN in eval* the same with its batch norms in evaluation, *Lightning* its
`BackboneFinetuning`, with the backbone from a third of the epochs on, *fastai* its `fine_tune`, whose default rate wants more
steps than these. The rate of "auto" was set on tinyimagenet20 at 15 %, seed 0, and the rule
by which it chooses a policy after looking at the rows of the other policies: its own rows are not independent of that.

Of two targets on adapters the reasons are known. A norm layer has four numbers a channel, the layer before it as many weights a
channel as it has inputs: with fewer than about 130 inputs the norm part is above 3 % whatever is trained; the network for gas
has 64 and 128, and MobileNet's depthwise convolutions have nine. USPS has the digits of MNIST, but they fill the whole frame:
features have to learn another size, which no scale and shift of channels gives them; on the gases, whose sensors drift, norm
layers are enough. The near domain is *usps in one frame*, whose network learnt digits of MNIST that were cut to fill the frame
as well; the target is told with either.
"""
FEW = 0.15  # the target speaks of shares of labels up to this
POLICIES = ("all", "frozen-statistics", "recalibrate-then-freeze", "affine-and-head", "head-only", "few-labels")
GASES = ("gas batch 3", "gas batch 5", "gas batch 6")
NEAR = {"": (*GASES, "usps in one frame"), ", USPS as its files are": (*GASES, "usps")}
GAIN, BEST_ON, NORM_PART, ADAPTER, COST = 2.0, 0.8, 0.03, 2.0, 1.03

Place = tuple[str, float]
Errors = dict[Place, dict[str, dict[int, float]]]


def table(rows: Sequence[Row]) -> str:
    """Targets first, then the mean errors."""
    errors: Errors = {}
    for row in rows:
        if "share" in dict(row.cell.factors) and "error_copied" not in row.values:
            ways = errors.setdefault((row.cell["task"], row.cell["share"]), {})
            ways.setdefault(row.cell["way"], {})[row.cell["seed"]] = row.values["error"]
    targets = [*_against_plain(errors), *_best(errors), *_adapters(rows, errors), *_cost(rows)]
    parts = [ABOUT, "## Targets\n", markdown(("target", "measured", "reached"), targets, words=3)]
    named = list(dict.fromkeys(way for ways in errors.values() for way in ways))
    plain = [way for way in named if not way.startswith("+ ")]
    parts += ["## Error in %\n", markdown(("task", "labels", *plain), _means(errors, plain), words=2)]
    beside = ["all", *(way for way in named if way.startswith("+ "))]
    if len(beside) > 1:
        few = {place: ways for place, ways in errors.items() if set(ways) & set(beside[1:])}
        parts += [
            "## Regularisers, at the policy `all`\n",
            markdown(("task", "labels", *beside), _means(few, beside), words=2),
        ]
    averaged = [row for row in rows if "error_copied" in row.values]
    if averaged:
        columns = ("task", "average", "re-estimated", "as the last steps left them", "difference")
        parts += [AVERAGED, markdown(columns, _averages(averaged), words=2)]
    joint = [row for row in rows if "share" not in dict(row.cell.factors) and "error" in row.values]
    if joint:
        pairs = list(dict.fromkeys(row.cell["task"] for row in joint))
        parts += [JOINTLY, markdown(("error on USPS in %", *pairs), _jointly(joint, pairs))]
    return "\n".join(parts)


AVERAGED = """\
## Averaged weights, and the statistics that fit them

Error in per cent at 15 % of the labels, policy `all`: the last weights, their exponential mean (`average="ema"`) and the mean
over the last quarter of the steps (`"swa"`), under statistics re-estimated on the training data, as `finetune_` leaves them,
and under those that the last steps of training left. The difference is paired by seed.
"""


def _averages(rows: Sequence[Row]) -> Iterator[list[str]]:
    for task, way in dict.fromkeys((row.cell["task"], row.cell["way"]) for row in rows):
        found = [row.values for row in rows if (row.cell["task"], row.cell["way"]) == (task, way)]
        means = [f"{np.mean([values[name] for values in found]):.1f}" for name in ("error", "error_copied")]
        apart = paired([values["error"] - values["error_copied"] for values in found])
        yield [task, way.removeprefix("average, "), *means, apart.text()]


JOINTLY = """\
## A labelled source and an unlabelled target

The network for digits, trained on mnist15k, on USPS, of which no label is seen: as it came; trained on, with 3,000 labelled
digits of MNIST alone; recalibrated on 2,000 unlabelled ones of USPS; trained on with both (`finetune_(…, target=, joint=)`).
Mean over seeds with the smallest and the largest. As the files are, MNIST leaves a rim free around its digits and USPS none, so
that most of the shift is their size: no statistics mend that, the network is wrong more often than right, and lowering the
entropy of its answers makes it surer of wrong ones. In one frame digits are as large on both sides.
"""


def _jointly(rows: Sequence[Row], pairs: Sequence[str]) -> Iterator[list[str]]:
    for way in dict.fromkeys(row.cell["way"] for row in rows):
        cells = [[r.values["error"] for r in rows if (r.cell["way"], r.cell["task"]) == (way, pair)] for pair in pairs]
        yield [way, *(f"{np.mean(e):.1f} ({min(e):.1f}–{max(e):.1f})" if e else "–" for e in cells)]


def _means(errors: Errors, ways: Sequence[str]) -> Iterator[list[str]]:
    for (task, share), found in errors.items():
        cells = [list(found.get(way, {}).values()) for way in ways]
        most = max(map(len, cells))
        # an interrupted run leaves some seeds out, and means over others are not to be compared
        means = [f"{np.mean(v):.1f}" + (f" ({len(v)} of {most})" if len(v) < most else "") if v else "–" for v in cells]
        yield [task, f"{share:.0%}", *means]


def _differences(ways: dict[str, dict[int, float]], one: str, other: str) -> list[float]:
    """Errors of one way less those of another, by seed."""
    seeds = set(ways.get(one, {})) & set(ways.get(other, {}))
    return [ways[one][seed] - ways[other][seed] for seed in sorted(seeds)]


def _against_plain(errors: Errors) -> Iterator[tuple[str, str, str]]:
    gains = [g for (_, share), ways in errors.items() if share <= FEW for g in _differences(ways, "plain", "auto")]
    if gains:
        gain = paired(gains)
        yield f"auto at least {GAIN:.0f} points above plain at up to 15 % labels", gain.text(), _said(gain.mean >= GAIN)


def _best(errors: Errors) -> Iterator[tuple[str, str, str]]:
    known = [near for ways in errors.values() if (near := _near_best(ways)) is not None]
    if known:
        words = f"{sum(known)} of {len(known)}"
        what = f"auto best, or within its interval of the best policy, on {BEST_ON:.0%} of cells"
        yield what, words, _said(sum(known) / len(known) >= BEST_ON)


def _near_best(ways: dict[str, dict[int, float]]) -> bool | None:
    """Whether no policy's lead over auto is surely one; None where either is missing."""
    leads = [paired(found) for policy in POLICIES if (found := _differences(ways, "auto", policy))]
    return None if not leads else all(lead.low <= 0 for lead in leads)


def _adapters(rows: Sequence[Row], errors: Errors) -> Iterator[tuple[str, str, str]]:
    shares = {
        row.cell["task"]: row.values["norm_numbers"] / row.values["numbers"]
        for row in rows
        if "norm_numbers" in row.values
    }
    if shares:
        words = ", ".join(f"{task} {share:.1%}" for task, share in shares.items())
        what = f"the norm part of an adapter at most {NORM_PART:.0%} of the checkpoint"
        yield what, words, _said(max(shares.values()) <= NORM_PART)
    for which, tasks in NEAR.items():
        losses = {
            task: found
            for (task, share), ways in errors.items()
            if task in tasks and share == FEW and (found := _differences(ways, "affine-and-head", "all"))
        }
        if losses:
            loss = paired([each for found in losses.values() for each in found])
            each = ", ".join(f"{task} {np.mean(found):+.1f}" for task, found in losses.items())
            what = f"an adapter within {ADAPTER:.0f} points of `all` on near domains at 15 %{which}"
            yield what, f"{loss.text()}: {each}", _said(loss.mean <= ADAPTER)


def _cost(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    ratios = [row.values["ours"] / row.values["plain"] for row in rows if "ours" in row.values]
    if ratios:
        words = f"{np.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
        yield f"a step at most {COST} times a plain loop's", words, _said(float(np.median(ratios)) <= COST)


def _said(holds: bool) -> str:
    return "yes" if holds else "no"
