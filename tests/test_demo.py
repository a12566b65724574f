"""The demo: what it says is so, and it says what it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from renorm.bench import digits, story
from renorm.cli import main
from renorm.cli.demo import Demo
from renorm.cli.screen import Screen
from renorm.report import html, terminal
from renorm.report import json as json_face
from renorm.report.base import Report
from tests.pages import Page


@pytest.fixture(scope="module")
def told() -> Report:
    return Demo().run(Screen())


@pytest.fixture(scope="module")
def result(told: Report) -> Any:
    return json.loads(json_face.render(told, version="0"))["result"]


def test_the_source_has_learnt_its_digits(result: Any) -> None:
    assert result["source"]["value"] > 0.95


@pytest.mark.parametrize("shift", ["low contrast", "fog", "blur"])
def test_a_shift_is_found_and_mended_without_labels(shift: str, result: Any) -> None:
    met = result["targets"][shift]
    assert met["distance"] > 0.3
    assert met["worst_site"] in ("bn1", "bn2", "bn3")
    assert met["accepted"]
    assert met["after"] == met["tried"]
    assert met["after"]["value"] > met["before"]["value"] + 0.1
    assert met["before"]["interval"][1] < met["after"]["interval"][0]


def test_inverted_digits_are_left_to_the_source(result: Any) -> None:
    met = result["targets"]["inverted"]
    assert not met["accepted"]
    assert met["after"] == met["before"]
    assert met["tried"]["value"] <= met["before"]["value"]


def test_every_undo_was_exact(result: Any) -> None:
    assert all(met["undo_exact"] for met in result["targets"].values())


def test_with_few_classes_plain_re_estimation_harms_and_the_profile_does_not(result: Any) -> None:
    clean, shifted = (result["few_classes"][shift] for shift in ("as they are", "low contrast"))
    assert clean["plain"]["value"] < clean["source"]["value"] - 0.03
    assert clean["profiled"]["value"] >= clean["source"]["value"] - 0.01
    assert shifted["profiled"]["value"] > max(shifted["plain"]["value"], shifted["source"]["value"]) + 0.1


def test_the_numbers_on_the_screen_are_those_in_the_json(
    told: Report, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with open(tmp_path / "out", "w+", encoding="utf-8") as out:
        terminal.show(told, out)
        out.seek(0)
        text = out.read()
    for shift, met in result["targets"].items():
        row = re.search(rf"^ *{shift} .*$", text, flags=re.MULTILINE)
        assert row is not None
        for score in (met["before"], met["tried"]):
            assert f" {100 - 100 * score['value']:.1f} " in row[0]
        assert f"{met['distance']:.2f} " in row[0]
        assert row[0].endswith("yes" if met["accepted"] else "no")
    assert "shift or mismatched features?" in text
    assert "bit for bit" in text


def test_the_page_says_the_same_in_chinese(told: Report, result: Any) -> None:
    pytest.importorskip("matplotlib")
    english, chinese = (Page(html.render(told, lang=lang)).said() for lang in ("en", "zh"))
    for met in result["targets"].values():
        for score in (met["before"], met["tried"]):
            number = f"{100 - 100 * score['value']:.1f}"
            assert number in english
            assert number in chinese
    assert set(re.findall(r"[A-Za-z]{3,}", chinese)) <= {
        "renorm",
        "profile",
        "source",
        "demo",
        *"doctor MODEL".split(),
    } | {*("recalibrate", "DATA", "OUT", "check")}


def test_a_failed_undo_would_be_said(told: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    meet = story.meet

    def broken(model: torch.nn.Module, target: digits.Digits, shift: str) -> story.Meeting:
        met = meet(model, target, shift)
        return story.Meeting(**vars(met) | {"exact": False})

    monkeypatch.setattr(story, "meet", broken)
    monkeypatch.setattr(digits, "EPOCHS", 1)
    assert any(getattr(block, "title", "") == "The undo failed" for block in Demo().run(Screen()).blocks)


def test_the_command_leaves_threads_random_numbers_and_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "EPOCHS", 1)
    state = torch.get_rng_state()
    assert main(["demo", "--format", "json"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []
    ran = capsys.readouterr()
    assert list(json.loads(ran.out)["result"]) == ["source", "targets", "few_classes", "notes"]
    assert ran.err == ""


def test_the_digits_are_the_same_every_time_and_stay_in_range() -> None:
    source, target = digits.load()
    again, _ = digits.load()
    assert (len(source), len(target)) == (1000, 797)
    assert torch.equal(source.images, again.images)
    assert torch.equal(source.labels, again.labels)
    for shift in digits.SHIFTS:
        moved = target.shifted(shift)
        assert moved.images.shape == target.images.shape
        assert 0 <= float(moved.images.min()) <= float(moved.images.max()) <= 1
        assert torch.equal(moved.images, target.shifted(shift).images)
        assert torch.equal(moved.labels, target.labels)


def test_training_twice_gives_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 1)
    source, _ = digits.load()
    first, second = ([*digits.training(source[:200])][-1].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not [*digits.training(source[:200])][-1].training
