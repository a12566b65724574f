"""docs/rules.md is made from the rules: `python -m tests.test_rules_page` writes it, and the test compares."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from renorm.bench.planted import PLANTS
from renorm.costs import price
from renorm.rules.base import Rule, catalogue

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"
START, END = "<!-- rules: made by python -m tests.test_rules_page -->\n", "<!-- end of rules -->\n"
SOURCE = Path(__file__).parents[1] / "src" / "renorm" / "rules"


def made() -> str:
    """The part of the page that follows from the catalogue: a table, then a paragraph a rule."""
    rows = ["| id | question | needs passes | limits | mends |", "|---|---|--:|---|:-:|"]
    told = []
    for id, rule in catalogue().items():
        limits = ", ".join(f"{name} {value:g}" for name, value in _limits(rule)) or "any"
        rows.append(f"| [{id}](#{id.lower()}) | {rule.title} | {_passes(rule)} | {limits} | {_mends(rule)} |")
        told.append(
            f"### {id}\n\n**{str(rule.title)[:1].upper()}{str(rule.title)[1:]}.** {_claim(rule)}\n{_reasons(rule)}{_curve(id)}"
        )
    return "\n".join(rows) + "\n\n" + "\n".join(told)


def _passes(rule: type[Rule]) -> str:
    """What the rule may cost, and with what it only wants."""
    most = price((*rule.needs, *rule.wants))
    return f"{rule.passes()}" if most == rule.passes() else f"{rule.passes()} to {most}"


def _limits(rule: type[Rule]) -> list[tuple[str, float]]:
    return [
        (each.name, float(getattr(rule, each.name))) for each in fields(rule) if not each.name.startswith("default")
    ]


def _mends(rule: type[Rule]) -> str:
    return "yes" if "fix_=" in _text(rule) else ""


def _claim(rule: type[Rule]) -> str:
    paragraphs = re.split(r"\n\s*\n", rule.__doc__ or "")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _reasons(rule: type[Rule]) -> str:
    """The comments that stand in front of the limits: the measurements that set them."""
    found = re.findall(r"((?: {4}# .*\n)+) {4}\w+: (?:float|int) =", _text(rule))
    return "".join("\n" + " ".join(line.strip("# ") for line in block.splitlines()) + "\n" for block in found)


def _curve(id: str) -> str:
    """From which planted strength on `renorm bench doctor` finds every one."""
    told = [
        f"\nPlanted ({name}), every one is found from {plant.sure:g} on: "
        "[the curve](../benchmarks/results/doctor.md#statistical-rules-over-the-planted-strength).\n"
        for name, plant in PLANTS.items()
        if plant.rule == id
    ]
    return "".join(told)


def _text(rule: type[Rule]) -> str:
    return (SOURCE / f"{rule.__module__.rpartition('.')[2]}.py").read_text(encoding="utf-8")


def page() -> str:
    """The page with that part made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + made() + END + rest.partition(END)[2]


def test_the_page_says_what_the_rules_do() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.test_rules_page"


def test_a_limit_has_the_measurement_that_set_it_beside_it() -> None:
    for rule in catalogue().values():
        if any(name == "limit" for name, _ in _limits(rule)):
            assert re.search(r"# .*\d", _text(rule)), rule.id


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
