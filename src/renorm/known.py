"""Findings that are known already: ignored for a reason, or in the report of an earlier run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from renorm.errors import UnknownName, UsageError
from renorm.rules.base import SEVERITIES, Finding, Severity, catalogue

__all__ = ["Baseline", "Sorted", "read_baseline", "sort_out"]

Baseline = Mapping[tuple[str, str], Severity]  # (rule, site) → how bad it was


class Sorted(NamedTuple):
    """Findings by what is to be done about them: `new` ones count, `ignored` and `old` ones do not."""

    new: tuple[Finding, ...]
    ignored: tuple[Finding, ...]
    old: tuple[Finding, ...]


def sort_out(
    findings: Iterable[Finding], *, ignore: Mapping[str, str] | None = None, baseline: Baseline | None = None
) -> Sorted:
    """The findings, in their order, without those of rules in `ignore` and those that `baseline` has, no worse.

    `ignore` maps a rule's id to the reason. Raises UnknownName for an id that no rule has, UsageError for an empty reason.
    """
    reasons, before = dict(ignore or {}), baseline or {}
    known = catalogue()
    for rule, reason in reasons.items():
        if rule not in known:
            raise UnknownName("rule", rule, known)
        if not str(reason).strip():
            raise UsageError(f"a rule is ignored for a reason, and {rule} was given none; say why in a few words.")
    new, ignored, old = [], [], []
    for finding in findings:
        then = before.get((finding.rule, finding.site))
        if finding.rule in reasons:
            ignored.append(finding)
        elif then is not None and SEVERITIES.index(finding.severity) >= SEVERITIES.index(then):
            old.append(finding)
        else:
            new.append(finding)
    return Sorted(tuple(new), tuple(ignored), tuple(old))


def read_baseline(path: str | os.PathLike[str]) -> Baseline:
    """What `renorm doctor --format json` found before, read from the file it was put into.

    Raises UsageError where the file is missing or is no such report.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = found["result"]["findings"]
        listed = {(str(entry["rule"]), str(entry["site"])): _severity(entry["severity"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--baseline takes a report that renorm doctor --format json wrote; {path} cannot be read as one "
            f"({type(error).__name__}). Make it with: renorm doctor MODEL --format json > {path}"
        ) from None
    return listed


def _severity(said: object, known: Collection[Severity] = SEVERITIES) -> Severity:
    for severity in known:
        if severity == said:
            return severity
    raise ValueError(f"no severity {said!r}")
