"""A report in Chinese is the same report: every sentence has a translation, with the same values in it."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from renorm import report as report_room
from renorm.report.base import Bar, Report, Table, Told, Words
from renorm.report.language import LANGUAGES, catalogue, translated
from renorm.rules.base import catalogue as rules
from renorm.said import Said, follow, listed, many, say, some

PACKAGE = Path(report_room.__file__).parents[1]
ROOMS_THAT_ARE_SHOWN = ("report", "rules")


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Where every `say` and `many` of the package stands, and the call."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("say", "many"):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node


def literals() -> dict[str, str]:
    """Every template that is said, and where."""
    found = {}
    for where, call in calls():
        template = call.args[0] if isinstance(call.func, ast.Name) and call.func.id == "say" else call.args[2]
        assert isinstance(template, ast.Constant), f"{where}: a template is written where it is said, not computed"
        found[template.value] = where
    return found


def shape(template: str) -> list[tuple[str, str | None, str | None]]:
    """The fields of a template with their formats, sorted."""
    parsed = string.Formatter().parse(template)
    return sorted((name, spec, conversion) for _, name, spec, conversion in parsed if name is not None)


@pytest.mark.parametrize("lang", sorted(set(LANGUAGES) - {"en"}))
def test_every_sentence_has_a_translation_and_no_translation_is_left_over(lang: str) -> None:
    said, known = literals(), catalogue(lang)
    missing = {template: where for template, where in said.items() if template not in known}
    assert not missing, f"report/{lang}.yaml has no translation for these"
    assert not set(known) - set(said), f"report/{lang}.yaml translates what nobody says"


@pytest.mark.parametrize("lang", sorted(set(LANGUAGES) - {"en"}))
def test_a_translation_has_the_same_fields_in_the_same_formats(lang: str) -> None:
    for template, translation in catalogue(lang).items():
        assert shape(template) == shape(translation), template


@pytest.mark.parametrize("lang", sorted(set(LANGUAGES) - {"en"}))
def test_no_sentence_is_translated_twice(lang: str) -> None:
    text = (PACKAGE / "report" / f"{lang}.yaml").read_text(encoding="utf-8")
    keys = [key.value for key, _ in yaml.compose(text).value]
    assert len(keys) == len(set(keys))


def test_both_numbers_of_a_counted_sentence_have_the_same_fields() -> None:
    for where, call in calls():
        if isinstance(call.func, ast.Name) and call.func.id == "many":
            one, more = (ast.literal_eval(argument) for argument in call.args[1:3])
            assert shape(one) == shape(more), where


def test_what_a_finding_says_is_said() -> None:
    """A rule's own words come from `say`, so that they are in every catalogue; a literal would stay English."""
    for file in sorted((PACKAGE / "rules").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                for keyword in node.keywords:
                    if keyword.arg in ("message", "advice", "unit"):
                        plain = isinstance(keyword.value, ast.Constant | ast.JoinedStr | ast.BinOp)
                        assert not plain, f"rules/{file.name}:{keyword.value.lineno}: say() it"
    assert all(isinstance(rule.title, Said) for rule in rules().values())


PROSE = {"Words", "Table", "Told", "Bars", "Heat", "Lines", "Matrix", "Spans"}


def test_what_a_report_or_a_note_says_is_said() -> None:
    """No sentence is given as a plain literal to a block, or appended to notes: it would stay English."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            given: list[ast.expr] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PROSE:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "notes.append":
                given = node.args
            elif isinstance(node, ast.Assign | ast.AugAssign) and isinstance(node.value, ast.Tuple | ast.List):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                given = node.value.elts if "notes" in map(ast.unparse, targets) else []
            for value in given:
                sentence = isinstance(value, ast.Constant) and isinstance(value.value, str) and " " in value.value
                prose = isinstance(value, ast.JoinedStr) and any(
                    isinstance(part, ast.Constant) and re.search(r"[a-z]{3}", str(part.value)) for part in value.values
                )
                assert not sentence, f"{file.name}:{value.lineno}: say() it"
                assert not prose, f"{file.name}:{value.lineno}: say() it"


# ── Said ──


def test_it_is_a_plain_string_to_everything_else() -> None:
    said = say("{n} of {total:.1f}", n=3, total=4)
    assert said == "3 of 4.0"
    assert {said: 1}["3 of 4.0"] == 1
    assert type(said + "!") is str
    assert type(f"{said}") is str


def test_it_survives_copies_and_processes() -> None:
    said = say("{facts}.", facts=say("yes"))
    for copied in (copy.deepcopy(said), pickle.loads(pickle.dumps(said))):
        assert (copied, copied.template, copied.values) == (said, said.template, said.values)


def test_values_that_were_said_are_translated_too_and_names_are_not() -> None:
    known = {"{what} at {site}": "{site}: {what}", "far": "远"}
    assert say("{what} at {site}", what=say("far"), site="far").translated(known.get) == "far: 远"


def test_without_a_translation_the_english_stands() -> None:
    assert say("{n} things", n=3).translated({}.get) == "3 things"
    assert Said("as it is").translated({}.get) == "as it is"


def test_a_capital_letter_is_english_alone() -> None:
    said = say("both models agree").capitalised()
    assert said == "Both models agree"
    assert said.translated({"both models agree": "一致"}.get) == "一致"


@pytest.mark.parametrize(
    ("count", "english", "chinese"), [(1, "1 sample", "1 个样本"), (2000, "2,000 samples", "2,000 个样本")]
)
def test_counts_have_their_plural(count: int, english: str, chinese: str) -> None:
    said = many(count, "{count:,} sample", "{count:,} samples")
    assert (said, translated(said, "zh")) == (english, chinese)


def test_lists_and_sentences_are_joined_as_each_language_does() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert translated(listed(["a", "b", "c"]), "zh") == "a、b、c"
    assert (listed([]), listed(["a"])) == ("", "a")
    assert some(["a", "b", "c"], 2) == "a, b …"
    assert translated(some(["a", "b"], 2), "zh") == "a、b"
    both = follow(say("Written to {output}.", output="x"), "", say("Untouched"))
    assert both == "Written to x. Untouched"
    assert translated(both, "zh") == "已写入 x。未改动"
    assert follow("", "") == ""


@given(st.text(), st.text())
def test_no_name_can_reach_the_template(name: str, other: str) -> None:
    assert say("{a}/{b}", a=name, b=other) == f"{name}/{other}"
    assert translated(listed([name, other]), "zh") == f"{name}、{other}"


# ── reports ──


def test_a_report_is_translated_in_all_its_parts_but_the_numbers_for_machines() -> None:
    given = Report(
        command="doctor",
        model="far",
        data="",
        verdict=Words(say("Untouched"), "good", say("The source")),
        blocks=(
            Table(
                say("site"),
                ("", say("far")),
                (("far", Told(say("far"), "bad")), (Bar(1.0, "far"), "")),
            ),
        ),
        result={"message": say("Untouched")},
        notes=(say("{name}: {note}", name="far", note=say("resized from {height} × {width}", height=1, width=2)),),
        origin={"command": "renorm doctor far"},
    )
    shown = translated(given, "zh")
    assert shown.verdict == Words("未改动", "good", "源")
    assert shown.blocks == (Table("位置", ("", "远"), (("far", Told("远", "bad")), (Bar(1.0, "far"), ""))),)
    assert shown.notes == ("far：由 1 × 2 缩放而来",)
    assert (shown.model, shown.result, shown.origin) == ("far", given.result, given.origin)
    assert translated(given, "en") is given
