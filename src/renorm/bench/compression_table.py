"""The tables of suite `compression`: errors before and after, and the share of the loss that one call returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from renorm.bench.base import Cell, Row
from renorm.bench.intervals import paired, ratio
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

COLUMNS = {
    "source": "source",
    "compressed": "compressed",
    "prior_0": "`recalibrate_(prior=0)`",
    "auto": "`recalibrate_()`",
    "mean": '`repair_(match="mean")`',
    "repaired": "`repair_`",
}
FEWEST = 3  # seeds: fewer have no interval
MOST = 0.5  # of the loss: what a target calls "most"

ABOUT = """\
Errors in per cent on images that calibrate nothing, mean over the seeds; a seed chooses the images that calibrate (for the
photographs also those that are measured) and the fine-tuning of the copies that are averaged. Calibration images are of the
data set as it is, without labels; `repair_` sees the source beside the model on them. Weights are rounded without data by
torchao's arithmetic (symmetric between the largest values, one grid a channel unless said), activations are not; pruning is
torch's global magnitude pruning of convolutions; averages are torch's `AveragedModel`. "folded" networks have no batch norm
left, so there is nothing to recalibrate. Returned is the loss (compressed minus source) taken back by `repair_`, as a ratio
of means with a bootstrap interval; the source of an average is the mean of its copies, which an average may beat.
"""


def table(rows: Sequence[Row]) -> str:
    """Targets, then a table for rounding and pruning, one for the number of images, one for averages."""
    parts = [
        ABOUT,
        "## Targets\n",
        markdown(("target", "measured", "verdict"), _targets(rows), words=3),
    ]
    averaged = [row for row in rows if row.cell["how"] == "averaged"]
    rest = [row for row in rows if row.cell["how"] != "averaged"]
    for bed in dict.fromkeys(row.cell["bed"] for row in rest):
        here = [row for row in rest if row.cell["bed"] == bed]
        usual = [row for row in here if row.cell["images"] == 64]
        parts += [
            f"## {bed}: 64 images\n",
            _errors(usual, lambda row: _named(row.cell["how"], row.cell["amount"], row)),
        ]
        few = [row for row in here if (row.cell["how"], row.cell["amount"], row.cell["form"]) == ("bits", 4, "norms")]
        parts += [
            f"## {bed}: 4 bits, by number of images\n",
            _errors(few, lambda row: str(row.cell["images"])),
        ]
    if averaged:
        parts += [
            "## Averages, 64 images\n",
            _errors(_apart(averaged), lambda row: f"{row.cell['bed']}, {row.cell['how']}"),
        ]
    return "\n".join(parts)


def _named(how: str, amount: float, row: Row) -> str:
    if row.cell["form"] == "both":
        return how
    text = f"{amount:.0%} pruned" if how == "sparsity" else f"{amount} {how}"
    return f"{text}, folded" if row.cell["form"] == "folded" else text


def _errors(rows: Sequence[Row], name: Callable[[Row], str]) -> str:
    lines = []
    for case in dict.fromkeys(map(name, rows)):
        group = [row for row in rows if name(row) == case]
        means = [[row.values[way] for row in group if way in row.values] for way in COLUMNS]
        cells = (f"{np.mean(found):.1f}" if found else "–" for found in means)
        lines.append([case, *cells, _returned(group), str(len(group))])
    return markdown(["", *COLUMNS.values(), "returned", "seeds"], lines)


def _returned(rows: Sequence[Row]) -> str:
    """The share of the loss, where there was one beyond the noise of a few images; with an interval from three seeds on."""
    lost = [row.values["compressed"] - row.values["source"] for row in rows]
    if np.mean(lost) < 1:
        return "no loss"
    share = ratio([row.values["compressed"] - row.values["repaired"] for row in rows], lost)
    text = f"{100 * share.mean:.0f} %"
    return text if len(rows) < FEWEST else f"{text} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _apart(rows: Sequence[Row]) -> list[Row]:
    """A row of its own for each case that a cell with several copies measured."""
    found = []
    for row in rows:
        for case in dict.fromkeys(key.partition(": ")[0] for key in row.values):
            values = {key.partition(": ")[2]: value for key, value in row.values.items() if key.startswith(f"{case}: ")}
            found.append(Row(Cell.of(**{**dict(row.cell.factors), "how": case}), values))
    return found


def _targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Whether one call returns most of the loss, in a low-bit and in a merged case, and whether it ever harms."""
    usual = [row for row in rows if row.cell["how"] != "averaged" and row.cell["images"] == 64]
    merged = _apart([row for row in rows if row.cell["how"] == "averaged"])
    lines = []
    for target, group in (
        (
            "low bit: most of the loss returned",
            [row for row in usual if "bits" in row.cell["how"] and row.cell["amount"] < 8],
        ),
        ("merged or averaged: most of the loss returned", merged),
    ):
        if best := _best(group):
            name, share = best
            lines.append(
                (
                    target,
                    f"{100 * share:.0f} % ({name})",
                    _verdict(share > MOST, group),
                )
            )
    both = [row for row in (*usual, *merged) if {"repaired", "prior_0"} <= row.values.keys()]
    if both:
        gap = paired([row.values["repaired"] - row.values["prior_0"] for row in both])
        lines.append(
            (
                "`repair_` no worse than `recalibrate_(prior=0)`",
                gap.text(),
                _verdict(gap.mean <= 0, both),
            )
        )
    every = [row for row in (*usual, *merged) if "repaired" in row.values]
    if every:
        cases: dict[str, list[float]] = {}
        for row in every:
            cases.setdefault(_case(row), []).append(row.values["repaired"] - row.values["compressed"])
        worst = max(cases, key=lambda case: float(np.mean(cases[case])))
        harm = float(np.mean(cases[worst]))
        text = f"{sum(np.mean(c) > 0.5 for c in cases.values())} of {len(cases)} cases; worst {harm:+.1f} ({worst})"
        lines.append(
            (
                "`repair_` never costs more than 0.5 points",
                text,
                _verdict(harm <= 0.5, every),
            )
        )
    return lines


def _verdict(holds: bool, rows: Sequence[Row]) -> str:
    seeds = len({row.cell["seed"] for row in rows})
    if seeds < FEWEST:
        return f"open: {seeds} of {FEWEST} seeds"
    return "pass" if holds else "**miss**"


def _case(row: Row) -> str:
    return f"{row.cell['bed']}, {_named(row.cell['how'], row.cell['amount'], row)}"


def _best(rows: Sequence[Row]) -> tuple[str, float] | None:
    """The case of which `repair_` returns the largest share of the loss, where it was a point or more, and that share."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    found = []
    for case, group in cases.items():
        lost = float(np.mean([row.values["compressed"] - row.values["source"] for row in group]))
        back = float(np.mean([row.values["compressed"] - row.values["repaired"] for row in group]))
        if lost >= 1:
            found.append((back / lost, case))
    return (max(found)[1], max(found)[0]) if found else None
