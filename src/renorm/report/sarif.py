"""The face for code scanners: the doctor's findings as SARIF 2.1.0, one result a finding, one rule an id of the catalogue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from renorm.report.base import Report
from renorm.report.json import plain
from renorm.rules.base import catalogue

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS: Mapping[str, str] = {"error": "error", "warning": "warning", "info": "note"}
HELP = "docs/rules.md"


def render(report: Report, *, version: str) -> str:
    """`report`, of a doctor's run, as one SARIF text; sites are logical locations within the model."""
    findings = report.result.get("findings", ())
    rules = list(catalogue())
    run = {
        "tool": {"driver": {"name": "renorm", "version": version, "rules": [_rule(id) for id in rules]}},
        "invocations": [{"executionSuccessful": True, "commandLine": f"renorm {report.command}"}],
        "results": [_result(finding, report, rules) for finding in findings],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)


def _rule(id: str) -> dict[str, Any]:
    rule = catalogue()[id]
    question = " ".join((rule.__doc__ or "").partition("\n\n")[0].split())
    return {
        "id": id,
        "name": rule.__name__,
        "shortDescription": {"text": str(rule.title)},
        "fullDescription": {"text": question},
        "help": {"text": f"{HELP}#{id.lower()}"},
    }


def _result(finding: Mapping[str, Any], report: Report, rules: list[str]) -> dict[str, Any]:
    site = str(finding["site"])
    name = f"{report.model}::{site}" if site else report.model
    return {
        "ruleId": finding["rule"],
        "ruleIndex": rules.index(str(finding["rule"])),
        "level": LEVELS[str(finding["severity"])],
        "message": {"text": f"{finding['message']} {finding['advice']}"},
        "locations": [
            {"logicalLocations": [{"name": site or report.model, "fullyQualifiedName": name, "kind": "module"}]}
        ],
        "partialFingerprints": {"ruleAndSite/v1": f"{finding['rule']}:{site}"},
        "properties": plain({"value": finding["value"], "unit": str(finding["unit"]), "limit": finding["limit"]}),
    }
