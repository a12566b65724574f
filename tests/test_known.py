"""Findings that are known do not count: ignored for a reason, or in an earlier report and no worse than then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from renorm.errors import UnknownName, UsageError
from renorm.known import read_baseline, sort_out
from renorm.rules.base import Finding

FINDING = Finding("BN105", "a", "warning", 1.0, "layers", 0.0, "It is so.", "Do something.")


def test_an_ignored_rule_is_left_out_everywhere() -> None:
    other = replace(FINDING, rule="BN108")
    known = sort_out([FINDING, other, replace(FINDING, site="b")], ignore={"BN105": "made so"})
    assert known.new == (other,)
    assert [f.site for f in known.ignored] == ["a", "b"]


@pytest.mark.parametrize(
    ("then", "now", "counts"), [("warning", "warning", False), ("warning", "error", True), ("error", "info", False)]
)
def test_the_baseline_holds_what_is_no_worse(tmp_path: Path, then: str, now: str, counts: bool) -> None:
    file = tmp_path / "before.json"
    file.write_text(json.dumps({"result": {"findings": [{"rule": "BN105", "site": "a", "severity": then}]}}))
    known = sort_out([replace(FINDING, severity=now)], baseline=read_baseline(file))  # type: ignore[arg-type]
    assert bool(known.new) == counts
    assert sort_out([replace(FINDING, site="elsewhere")], baseline=read_baseline(file)).new


def test_what_cannot_be_ignored() -> None:
    with pytest.raises(UnknownName, match="no rule 'BN15'"):
        sort_out([], ignore={"BN15": "no such rule"})
    with pytest.raises(UsageError, match="BN105 was given none"):
        sort_out([], ignore={"BN105": " "})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"result": {"findings": [{"rule": "BN1", "site": "", "severity": "grave"}]}}']
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "before.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="--baseline takes a report"):
        read_baseline(file)
    with pytest.raises(UsageError, match="FileNotFoundError"):
        read_baseline(tmp_path / "none.json")
