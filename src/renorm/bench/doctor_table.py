"""The tables of suite `doctor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from renorm.bench.base import Row
from renorm.bench.markdown import table as markdown
from renorm.bench.patients import DISEASES
from renorm.bench.planted import PLANTS
from renorm.bench.threads import THREADS

__all__ = ["table"]

ABOUT = """\
Sick and healthy networks have random weights, an affine that differs between channels, and the statistics of the noise
that they are shown. torch-audit 0.3 looks at the same models (its static and optimiser rules): "found" is anything that it
does not say of the healthy one too. BN502 and BN504 (exported files) are tested in tests/test_stored.py, preprocessing
(BN303) with each of 23 planted mistakes in tests/test_suspects.py.
"""
PLANTED = """\
On ResNet-20 and 200 images of its own kind; padding on a small network for sequences. "Measured" is the median over the
cells in which the rule spoke. From the strength in bold on, every one should be found.
"""
COSTS = 10.0  # points of error from which a shift is said to hurt


def table(rows: Sequence[Row]) -> str:
    """Targets, then a table a part."""
    parts: dict[str, Callable[[Sequence[Row]], str]] = {
        "sick": _sick,
        "planted": _planted,
        "healthy": _healthy,
        "thread": _threads,
        "real": _real,
        "cost": _cost,
    }
    text = [ABOUT, "## Targets\n", markdown(("target", "measured", "verdict"), _targets(rows), words=3)]
    for part, made in parts.items():
        mine = [row for row in rows if row.cell["part"] == part]
        if mine:
            text.append(made(mine))
    return "\n".join(text)


def _targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    def part(name: str) -> list[Row]:
        return [row for row in rows if row.cell["part"] == name]

    lines = []
    if sick := part("sick"):
        found = sum(row.values["found"] for row in sick)
        text = f"{found:.0f} of {len(sick)} ({len({DISEASES[r.cell['disease']].rule for r in sick})} rules)"
        lines.append(
            ("rules on state, files and optimisers: every sick model found", text, _verdict(found == len(sick)))
        )
    if healthy := part("healthy"):
        wrong = sum(bool(row.values["alone error"] or row.values["data error"]) for row in healthy)
        text = f"{wrong} of {len(healthy)}"
        lines.append(
            ("no error on ≥ 40 healthy models, with and without data", text, _verdict(not wrong and len(healthy) >= 40))
        )
    if planted := part("planted"):
        sure = [row for row in planted if row.cell["strength"] in PLANTS[row.cell["plant"]].certain]
        none = [row for row in planted if row.cell["strength"] == PLANTS[row.cell["plant"]].strengths[0]]
        seen, heard = (sum(row.values["found"] for row in rows) for rows in (sure, none))
        lines += [
            (
                "planted: all found from the strength in bold on",
                f"{seen:.0f} of {len(sure)}",
                _verdict(seen == len(sure)),
            ),
            ("planted: nothing found where nothing is planted", f"{heard:.0f} of {len(none)}", _verdict(not heard)),
        ]
    if threads := part("thread"):
        good = sum(bool(row.values["named"]) and row.values["after"] < row.values["before"] for row in threads)
        text = f"{good} of {len(threads)} ({len({row.cell['thread'] for row in threads})} threads)"
        lines.append(("rebuilt threads: cause named first, and mended", text, _verdict(good == len(threads))))
    if real := [row for row in part("real") if row.values["error"] - row.values["home"] >= COSTS]:
        told = sum(bool(row.values["error said"] or row.values["warning said"]) for row in real)
        text = f"{told} of {len(real)}"
        lines.append((f"real shifts that cost ≥ {COSTS:.0f} points: something said", text, _verdict(told == len(real))))
    return lines


def _verdict(holds: bool) -> str:
    return "pass" if holds else "**miss**"


def _sick(rows: Sequence[Row]) -> str:
    lines = []
    for disease in dict.fromkeys(row.cell["disease"] for row in rows):
        mine = [row for row in rows if row.cell["disease"] == disease]
        cells = [f"{sum(row.values[key] for row in mine):.0f} of {len(mine)}" for key in ("found", "first")]
        audit = [row.values["audit"] for row in mine if "audit" in row.values]
        others = f"{sum(row.values['others'] for row in mine):.0f}"
        told = f"{sum(audit):.0f} of {len(audit)}" if audit else "not installed"
        lines.append([disease, DISEASES[disease].rule, *cells, others, told])
    head = ["planted", "rule", "found", "stands first", "findings of other rules", "torch-audit"]
    return "## Sick models\n\n" + markdown(head, lines, words=2)


def _planted(rows: Sequence[Row]) -> str:
    text = ["## Statistical rules over the planted strength\n", PLANTED]
    for plant in [name for name in PLANTS if any(row.cell["plant"] == name for row in rows)]:
        lines = []
        for strength in PLANTS[plant].strengths:
            these = [row for row in rows if (row.cell["plant"], row.cell["strength"]) == (plant, strength)]
            if these:
                lines.append(_strength(strength, these, sure=strength in PLANTS[plant].certain))
        text.append(markdown([f"{PLANTS[plant].rule}: {plant}", "found", "measured", "limit"], lines))
    return "\n".join(text)


def _strength(strength: float, rows: Sequence[Row], *, sure: bool) -> list[str]:
    found = [row.values for row in rows if row.values["found"]]
    return [
        f"**{strength:g}**" if sure else f"{strength:g}",
        f"{len(found)} of {len(rows)}",
        f"{median(values['value'] for values in found):.2g}" if found else "–",
        f"{found[0]['limit']:g}" if found else "–",
    ]


def _healthy(rows: Sequence[Row]) -> str:
    lines = []
    for key, name in (("alone", "without data"), ("data", "with data that fit")):
        counts = [f"{sum(row.values[f'{key} {level}'] > 0 for row in rows)}" for level in ("error", "warning", "info")]
        lines.append([f"renorm doctor, {name}", *counts])
    audited = [row for row in rows if "audit ERROR" in row.values]
    if audited:
        counts = [f"{sum(row.values[f'audit {level}'] > 0 for row in audited)}" for level in ("ERROR", "WARN")]
        lines.append(["torch-audit, static", *counts, "–"])
    noisy = [row.cell["model"] for row in rows if row.values["alone warning"] or row.values["data warning"]]
    named = f"\nWarned of: {', '.join(noisy)}.\n" if noisy else ""
    head = ["of these models", "errors", "warnings", "infos"]
    return f"## {len(rows)} healthy models: of how many something is said\n\n" + markdown(head, lines) + named


def _threads(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row.cell["thread"] for row in rows):
        mine = [row for row in rows if row.cell["thread"] == name]
        thread = THREADS[name]
        rules = ", ".join(sorted({f"BN{row.values['rule']:.0f}" for row in mine}))
        before, after = (f"{sum(row.values[key] for row in mine) / len(mine):.2f}" for key in ("before", "after"))
        mend = "as advised" if thread.by_hand else "by its fix"
        lines.append([name, thread.cited, rules, thread.measure, mend, before, after])
    head = ["thread", "for example", "first line", "measure", "mended", "before", "after"]
    return "## Threads rebuilt\n\n" + markdown(head, lines, words=5)


def _real(rows: Sequence[Row]) -> str:
    lines = []
    keys = dict.fromkeys((row.cell["bed"], row.cell["shift"], row.cell["classes"]) for row in rows)
    for bed, shift, classes in keys:
        mine = [r for r in rows if (r.cell["bed"], r.cell["shift"], r.cell["classes"]) == (bed, shift, classes)]
        mean = {key: sum(row.values[key] for row in mine) / len(mine) for key in mine[0].values}
        firsts = sorted({f"BN{row.values['first']:.0f}" if row.values["first"] else "nothing" for row in mine})
        level = "error" if mean["error said"] else "warning" if mean["warning said"] else "–"
        where = shift if classes > 1 else f"{shift}, one class only"
        numbers = [f"{mean[key]:.1f}" for key in ("home", "error", "recalibrated")]
        lines.append([bed, where, ", ".join(firsts), level, f"{mean['distance']:.2f}", *numbers])
    head = ["network", "shift", "said first", "worst", "distance", "error at home", "error here", "recalibrated"]
    return "## Real networks: what was said, and what was true (error in %)\n\n" + markdown(head, lines, words=4)


def _cost(rows: Sequence[Row]) -> str:
    lines = [
        [
            row.cell["model"],
            f"{row.values['ratio']:.3f} ({row.values['low']:.3f}–{row.values['high']:.3f})",
            f"{row.values['opening']:.2f}",
        ]
        for row in rows
    ]
    head = ["network", "a watched step, as a multiple of a plain one (quartiles)", "beginning and ending it, in steps"]
    return "## The cost of watching (processor time, 8 images of 64², turns)\n\n" + markdown(head, lines)
