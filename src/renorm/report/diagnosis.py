"""The doctor's words: what is wrong, what to do, and how far every site is from what it expects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from math import exp
from typing import Any

from renorm.doctor import Diagnosis
from renorm.report import estimates, shifts
from renorm.report.base import Bar, Block, Picture, Table, Told, Tone, Words, plainly
from renorm.report.shifts import name
from renorm.rules.base import Finding, catalogue
from renorm.rules.data_shift import DataShift
from renorm.rules.few_updates import FewUpdates
from renorm.said import Said, follow, listed, many, say

TONES: Mapping[str, Tone] = {"error": "bad", "warning": "doubt", "info": "plain"}
ROWS = 10  # sites in a table: the worst, and it still fits one screen
FIT: Mapping[Tone, Said] = {"bad": say("far"), "doubt": say("off"), "good": say("fits")}
KINDS: Mapping[str, Said] = {
    "batch": say("batch"),
    "layer": say("layer"),
    "group": say("group"),
    "instance": say("instance"),
    "rms": say("RMS"),
}


def verdict(diagnosis: Diagnosis) -> Words:
    """The one thing to know."""
    batch = sum(site.kind == "batch" for site in diagnosis.sites)
    if not diagnosis.healthy:
        return _about(diagnosis.findings)[0]
    if not batch:
        others = Counter(site.kind for site in diagnosis.sites)
        counted = [many(n, "{count} {kind} norm", "{count} {kind} norms", kind=KINDS[k]) for k, n in others.items()]
        return Words(
            say(
                "Norm layers found: {found}. None of them carries statistics of the data it was trained on, so none can "
                "disagree with yours.",
                found=listed(counted) if counted else say("none of any kind"),
            ),
            "good",
            say("This model has no batch norm"),
        )
    if not diagnosis.samples:
        return Words(
            many(
                batch,
                "{count:,} batch norm, all with sound statistics. Whether they fit your data, only your data can tell: "
                "renorm doctor MODEL DATA.",
                "{count:,} batch norms, all with sound statistics. Whether they fit your data, only your data can tell: "
                "renorm doctor MODEL DATA.",
            ),
            "good",
            say("The model alone shows nothing wrong"),
        )
    if not diagnosis.distances:
        return Words(
            say(
                "None of its batch norms holds statistics of earlier data that these {samples} could be compared with.",
                samples=many(diagnosis.samples, "{count:,} sample", "{count:,} samples"),
            ),
            "plain",
            say("Nothing to compare these data with"),
        )
    site, far = next(iter(diagnosis.distances.items()))
    return Words(
        say(
            "The batch norm farthest from what it expects, {site}, is {far:.2f} source standard deviations away over "
            "{samples}; up to {limit:.2g} is what models show on fresh data of their own kind. There is no shift to mend "
            "here. Whether the model knows what is in the data, only labels tell: renorm evaluate.",
            site=name(site),
            far=far,
            samples=many(diagnosis.samples, "{count:,} sample", "{count:,} samples"),
            limit=DataShift.limit,
        ),
        "good",
        say("The values in these data are as the model expects them"),
    )


def blocks(diagnosis: Diagnosis, *, rows: int = ROWS, judged: Iterable[Finding] | None = None) -> tuple[Block, ...]:
    """What follows the verdict: the findings that it is not, then the sites, worst first.

    `judged` are the findings by which sites are called far, where the diagnosis no longer has those that are known.
    """
    tones = _tones(diagnosis.distances, diagnosis.findings if judged is None else judged)
    parts: list[Block] = list(_about(diagnosis.findings)[0 if diagnosis.healthy else 1 :])
    parts += estimates.blocks(diagnosis.kind, diagnosis.estimate)
    parts += _pictures(diagnosis, tones)
    if diagnosis.distances:
        parts.append(_table(diagnosis, rows, tones))
    if diagnosis.unvisited:
        names = listed(map(name, diagnosis.unvisited[:ROWS]))
        more = max(0, len(diagnosis.unvisited) - ROWS)
        text = (
            say("No batch reached {names} and {more} more; nothing can be said of them.", names=names, more=more)
            if more
            else say("No batch reached {names}; nothing can be said of them.", names=names)
        )
        parts.append(Words(text, "plain", say("Not looked at")))
    return tuple(parts)


def pictures(diagnosis: Diagnosis) -> tuple[Picture, ...]:
    """Shift per layer, and per channel of the worst; none without data."""
    return _pictures(diagnosis, _tones(diagnosis.distances, diagnosis.findings))


def _pictures(diagnosis: Diagnosis, tones: Mapping[str, Tone]) -> tuple[Picture, ...]:
    return shifts.pictures(
        diagnosis.distances,
        diagnosis.shifts,
        order=[site.name for site in diagnosis.sites],
        title=say("How far each layer is from what it expects"),
        tones=tones,
    )


def result(diagnosis: Diagnosis) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "healthy": diagnosis.healthy,
        "worst": None if diagnosis.worst is None else _plain(diagnosis.worst),
        "findings": [_plain(finding) for finding in diagnosis.findings],
        "shifts": {
            site: {"distance": distance, **diagnosis.shifts[site].layer._asdict()}
            for site, distance in diagnosis.distances.items()
        },
        "unvisited": list(diagnosis.unvisited),
        "samples": diagnosis.samples,
        "skipped": list(diagnosis.skipped),
        **estimates.result(diagnosis.kind, diagnosis.estimate),
        "sites": [{"name": site.name, "kind": site.kind, "channels": site.channels} for site in diagnosis.sites],
    }


def _about(findings: Iterable[Finding]) -> list[Words]:
    """One paragraph a rule, in the order of its worst finding."""
    order = list(dict.fromkeys(finding.rule for finding in findings))
    ranked = sorted(findings, key=lambda finding: order.index(finding.rule))
    said = []
    for rule, group in groupby(ranked, key=lambda finding: finding.rule):
        first, *rest = group
        title = catalogue()[rule].title
        named = title.capitalised() if isinstance(title, Said) else title[:1].upper() + title[1:]
        text = say("{what}\nTo do: {advice}", what=follow(first.message, _where(first, len(rest))), advice=first.advice)
        said.append(Words(text, TONES[first.severity], say("{title} [{rule}]", title=named, rule=rule)))
    return said


def _where(first: Finding, others: int) -> Said:
    values = {"site": name(first.site), "value": plainly(first.value), "unit": first.unit}
    if first.limit:
        said = say("Worst at {site}: {value} {unit} (limit {limit:.2g})", limit=first.limit, **values)
    else:
        said = say("At {site}: {value} {unit}", **values)
    if others:
        return many(others, "{where}, and {count:,} other site.", "{where}, and {count:,} other sites.", where=said)
    return say("{where}.", where=said)


def _tones(distances: Mapping[str, float], findings: Iterable[Finding]) -> dict[str, Tone]:
    """What each site's distance means, as the rules on them judged it."""
    by = (FewUpdates.id, DataShift.id)
    found = [f for f in findings if f.rule in by]
    judged = {f.site: TONES[f.severity] for f in sorted(found, key=lambda f: by.index(f.rule))}
    return {site: judged.get(site, "good") for site in distances}


def _table(diagnosis: Diagnosis, rows: int, tones: Mapping[str, Tone]) -> Table:
    longest = max(diagnosis.distances.values()) or 1.0
    drawn = []
    for site, distance in list(diagnosis.distances.items())[:rows]:
        shift = diagnosis.shifts[site]
        spread = exp(float(shift.log_sd_ratio.mean()))
        felt = tones[site]
        bar = Bar(distance / longest, f"{distance:.2f}")
        drawn.append((name(site), bar, f"{shift.layer.mean_gap:.2f}", f"× {spread:.2f}", Told(FIT[felt], felt)))
    hidden = len(diagnosis.distances) - len(drawn)
    note = say(
        "Distance and mean in source standard deviations, averaged over channels; spread as a multiple of the source's."
    )
    if hidden:
        more = many(
            hidden,
            "{count:,} site nearer than these: --top {all}, or --format json.",
            "{count:,} sites nearer than these: --top {all}, or --format json.",
            all=len(diagnosis.distances),
        )
        note = follow(note, more)
    return Table(
        say("How far the data lie from what each batch norm expects, worst first"),
        (say("site"), say("distance"), say("mean"), say("spread"), ""),
        tuple(drawn),
        note=note,
    )


def _plain(finding: Finding) -> dict[str, Any]:
    names = ("rule", "site", "severity", "value", "unit", "limit", "message", "advice")
    return {name: getattr(finding, name) for name in names}
