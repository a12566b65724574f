"""One value, several faces: the envelope is fixed, JSON is valid, and no name in it can steer a terminal."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from renorm.evaluate import Score
from renorm.report import json as json_face
from renorm.report import score, terminal
from renorm.report.base import Bar, Report, Table, Told, Words


def report(**changes: Any) -> Report:
    given: dict[str, Any] = {
        "command": "doctor",
        "model": "nets.py:net",
        "data": "photos/",
        "verdict": Words("They lie far away.", "bad", "Data shift"),
        "blocks": (
            Table(
                "Sites",
                ("site", "distance", "n", ""),
                (("bn1", Bar(1.0, "0.87"), "3", Told("far", "bad")), ("bn2", Bar(0.5, "0.43"), "12", "fits")),
                note="In source sd.",
            ),
            Words("Just so."),
        ),
        "result": {"value": 1.5},
        "notes": ("read in a random order",),
    }
    return Report(**given | changes)


def printed(shown: Report, monkeypatch: pytest.MonkeyPatch, *, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    terminal.show(shown, out)
    return out.getvalue()


def test_the_envelope_has_these_keys_in_this_order() -> None:
    envelope = json.loads(json_face.render(report(), version="1.2.3"))
    assert list(envelope) == ["schema", "version", "command", "model", "data", "result"]
    assert envelope["schema"] == "renorm/1"
    assert envelope["version"] == "1.2.3"
    assert envelope["result"] == {"value": 1.5, "notes": ["read in a random order"]}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (math.nan, None),
        (-math.inf, None),
        ((1, 2.5, "a"), [1, 2.5, "a"]),
        ({1: {"x": math.inf}}, {"1": {"x": None}}),
        (torch.tensor([1.0, math.nan]), [1.0, None]),
        (np.float32(0.5), 0.5),
        (True, True),
        (None, None),
    ],
)
def test_numbers_become_valid_json(value: Any, plain: Any) -> None:
    text = json_face.render(report(result={"value": value}), version="0")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["result"]["value"] == plain


def test_no_repr_becomes_part_of_the_schema() -> None:
    with pytest.raises(TypeError, match="object has no place in a report"):
        json_face.render(report(result={"value": object()}), version="0")


def test_the_verdict_comes_before_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(report(), monkeypatch)
    places = [
        text.index(part) for part in ("renorm doctor", "nets.py:net", "✗ Data shift", "They lie far", "0.87", "random")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_or_ends_in_spaces(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words("a long sentence " * 20, "good", "Title")
    lines = printed(report(blocks=(words, *report().blocks)), monkeypatch, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [40, 80])
def test_a_sentence_without_spaces_is_folded_and_not_cut(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "这些数据送入该层的数值与训练时不同而该层仍在减去旧数据的均值除以旧数据的标准差" * 3
    shown = report(verdict=Words(sentence, "bad", sentence), blocks=(Words(sentence),), notes=(sentence,))
    text = printed(shown, monkeypatch, width=width)
    assert "".join(text.split()).count(sentence) == 4


def test_a_pipe_gets_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in printed(report(), monkeypatch)


def test_names_can_neither_steer_the_terminal_nor_be_read_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "\x1b[31mred\x07[bold]x[/bold]:smile:\u202e"
    text = printed(report(model=name, verdict=Words(name), notes=(name,)), monkeypatch)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert text.count("[31mred�[bold]x[/bold]:smile:") == 3


@pytest.mark.parametrize(("share", "bar"), [(0.0, ""), (1.0, "█" * 12), (0.5, "█" * 6), (2.0, "█" * 12), (-1.0, "")])
def test_bars_are_as_long_as_their_share(share: float, bar: str) -> None:
    assert terminal.drawn(share) == bar


def test_a_part_of_a_character_is_drawn() -> None:
    assert terminal.drawn(1 / 96) == "▏"
    assert terminal.drawn(13 / 96) == "█▋"


def test_a_score_says_its_interval_and_how_honest_its_probabilities_are() -> None:
    given = Score(value=0.9, interval=(0.85, 0.934), count=200, nll=0.5, ece=0.07, metric="accuracy")
    said = score.verdict(given)
    assert said.title == "Accuracy: 90.0 %"
    assert "85.0 to 93.4 %, from 200 samples" in said.text
    assert "off by 7.0 points" in said.text


def test_a_score_without_interval_or_classes_says_so() -> None:
    given = Score(value=3.25, interval=(math.nan, math.nan), count=2, nll=math.nan, ece=math.nan, metric="mse")
    said = score.verdict(given)
    assert said.title == "Mse: 3.25"
    assert said.text == "95 % interval unknown, from 2 samples."
    assert score.interval(Score(value=1, interval=(0.5, 2), count=9, nll=1, ece=1, metric="mse")) == "0.5 to 2"


def test_reasons_fold_and_are_never_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "because " * 20 + "of this"
    shown = printed(
        report(blocks=(Table("Chosen", ("", "what", "why"), (("learning rate", "0.003", why),)),)), monkeypatch
    )
    assert "learning rate" in shown
    assert " ".join(shown.split()).count("because") == 20
    assert "of this" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80
