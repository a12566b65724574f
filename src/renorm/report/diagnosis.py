"""The doctor's words: what is wrong, what to do, and how far every site is from what it expects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from math import exp
from typing import Any

from renorm.doctor import Diagnosis
from renorm.report.base import Bar, Block, Table, Told, Tone, Words
from renorm.rules.base import Finding, catalogue
from renorm.rules.data_shift import DataShift

TONES: Mapping[str, Tone] = {"error": "bad", "warning": "doubt", "info": "plain"}
ROWS = 10  # sites in a table: the worst, and it still fits one screen


def verdict(diagnosis: Diagnosis) -> Words:
    """The one thing to know."""
    batch = sum(site.kind == "batch" for site in diagnosis.sites)
    if diagnosis.findings:
        return _about(diagnosis.findings)[0]
    if not batch:
        others = Counter(site.kind for site in diagnosis.sites)
        found = ", ".join(_many(count, f"{kind} norm") for kind, count in others.items()) or "none of any kind"
        return Words(
            f"Norm layers found: {found}. None of them carries statistics of the data it was trained on, so none can "
            "disagree with yours.",
            "good",
            "This model has no batch norm",
        )
    if not diagnosis.samples:
        return Words(
            f"{_many(batch, 'batch norm')}, all with sound statistics. Whether they fit your data, only your data can tell: "
            "renorm doctor MODEL DATA.",
            "good",
            "The model alone shows nothing wrong",
        )
    site, far = next(iter(diagnosis.distances.items()), ("", 0.0))
    return Words(
        f"The batch norm farthest from what it expects, {_name(site)}, is {far:.2f} source standard deviations away over "
        f"{_many(diagnosis.samples, 'sample')}; up to {DataShift.limit:.2g} is what models show on fresh data of their own "
        "kind. There is no shift to mend here. Whether the model knows what is in the data, only labels tell: renorm evaluate.",
        "good",
        "The values in these data are as the model expects them",
    )


def blocks(diagnosis: Diagnosis, *, rows: int = ROWS) -> tuple[Block, ...]:
    """What follows the verdict: the other findings, then the sites, worst first."""
    parts: list[Block] = list(_about(diagnosis.findings)[1:])
    if diagnosis.distances:
        parts.append(_table(diagnosis, rows))
    if diagnosis.unvisited:
        names = ", ".join(map(_name, diagnosis.unvisited[:ROWS]))
        more = "" if len(diagnosis.unvisited) <= ROWS else f" and {len(diagnosis.unvisited) - ROWS} more"
        parts.append(Words(f"No batch reached {names}{more}; nothing can be said of them.", "plain", "Not looked at"))
    return tuple(parts)


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
        "sites": [{"name": site.name, "kind": site.kind, "channels": site.channels} for site in diagnosis.sites],
    }


def _about(findings: Iterable[Finding]) -> list[Words]:
    """One paragraph a rule, in the order of its worst finding."""
    order = list(dict.fromkeys(finding.rule for finding in findings))
    ranked = sorted(findings, key=lambda finding: order.index(finding.rule))
    said = []
    for rule, group in groupby(ranked, key=lambda finding: finding.rule):
        first, *rest = group
        more = f", and {_many(len(rest), 'other site')}" if rest else ""
        limit = f" (limit {first.limit:.2g})" if first.limit else ""
        place = f"{'Worst at' if first.limit else 'At'} {_name(first.site)}"
        numbers = f"{place}: {first.value:.2g} {first.unit}{limit}{more}."
        title = f"{catalogue()[rule].title[:1].upper()}{catalogue()[rule].title[1:]} [{rule}]"
        said.append(Words(f"{first.message} {numbers}\nTo do: {first.advice}", TONES[first.severity], title))
    return said


def _table(diagnosis: Diagnosis, rows: int) -> Table:
    longest = max(diagnosis.distances.values()) or 1.0
    drawn = []
    for site, distance in list(diagnosis.distances.items())[:rows]:
        shift = diagnosis.shifts[site]
        spread = exp(float(shift.log_sd_ratio.mean()))
        tone: Tone = "bad" if distance > DataShift.error else "doubt" if distance > DataShift.limit else "good"
        word = {"bad": "far", "doubt": "off", "good": "fits"}[tone]
        bar = Bar(distance / longest, f"{distance:.2f}")
        drawn.append((_name(site), bar, f"{shift.layer.mean_gap:.2f}", f"× {spread:.2f}", Told(word, tone)))
    hidden = len(diagnosis.distances) - len(drawn)
    more = (
        f" {_many(hidden, 'site')} nearer than these: --top {len(diagnosis.distances)}, or --format json."
        if hidden
        else ""
    )
    return Table(
        "How far the data lie from what each batch norm expects, worst first",
        ("site", "distance", "mean", "spread", ""),
        tuple(drawn),
        note="Distance and mean in source standard deviations, averaged over channels; spread as a multiple of the "
        f"source's.{more}",
    )


def _plain(finding: Finding) -> dict[str, Any]:
    names = ("rule", "site", "severity", "value", "unit", "limit", "message", "advice")
    return {name: getattr(finding, name) for name in names}


def _name(site: str) -> str:
    return site or "the model itself"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
