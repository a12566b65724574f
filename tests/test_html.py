"""The page: whole in one file, nothing to run or fetch, every name shown as it is, in both languages, with its pictures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm.cli import main
from renorm.errors import MissingExtra
from renorm.report import diagnosis as diagnoses
from renorm.report import html, pictures, terminal
from renorm.report.base import Bars, Heat, Report, Spans, Words, clean
from tests.pages import HOSTILE, Page, everything

pytest.importorskip("matplotlib")


def named(name: str) -> nn.Module:
    """A network whose batch norm has this name."""
    model = nn.Module()
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.add_module(name.replace(".", "_") or "x", inner)
    model.forward = inner.forward  # type: ignore[method-assign]
    return model.eval()


# ── nothing runs, nothing is fetched, names are text ──


@cache
def harmless_tags(lang: str) -> set[str]:
    return {tag for tag, _ in Page(html.render(everything("layer1"), lang=lang)).tags}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_name_is_text_wherever_it_stands(name: str, lang: str) -> None:
    page = Page(html.render(everything(name), lang=lang))
    assert {tag for tag, _ in page.tags} == harmless_tags(lang), "a name became a tag"
    assert clean(name) in page.said()
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "img",
        "base",
        "form",
        "a",
    }
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], tag
        assert not attributes.keys() & {"src", "srcdoc", "action", "formaction", "data"}
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_layer_may_have_any_name(name: str) -> None:
    model = named(name)
    torch.manual_seed(0)
    found = renorm.diagnose(model, [torch.randn(20, 3, 8, 8) * 4 + 3])
    report = Report("doctor", name, "", diagnoses.verdict(found), diagnoses.blocks(found), {})
    page = Page(html.render(report))
    assert clean(name.replace(".", "_")) in page.said()
    assert "script" not in {tag for tag, _ in page.tags}
    fragment = Page(found._repr_html_())
    assert clean(name.replace(".", "_")) in fragment.said()
    assert "script" not in {tag for tag, _ in fragment.tags}


def test_the_page_forbids_the_browser_to_fetch_and_names_no_place_to_fetch_from() -> None:
    text = html.render(everything())
    policy = next(a["content"] for tag, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    places = set(re.findall(r"https?://[^\"' <)]+", text))
    assert places <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "only the names of SVG itself"
    assert "url(http" not in text
    assert "@import" not in text


def test_no_control_character_reaches_the_page() -> None:
    text = html.render(everything(HOSTILE[6]))
    assert not set(text) & {"\x1b", "\x00", "\u202e"}


# ── what a reader needs ──


def test_the_page_fits_a_phone_the_dark_and_paper() -> None:
    text = html.render(everything())
    tags = Page(text).tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert ("meta", {"charset": "utf-8"}) in tags
    for query in ("prefers-color-scheme: dark", "@media print", "max-width"):
        assert query in text


@pytest.mark.parametrize(("lang", "name"), [("en", "en"), ("zh", "zh-CN")])
def test_the_page_says_its_language(lang: str, name: str) -> None:
    assert ("html", {"lang": name}) in Page(html.render(everything(), lang=lang)).tags


def test_the_verdict_comes_first_and_the_origin_last() -> None:
    said = Page(html.render(everything())).said()
    order = [
        "renorm doctor",
        "0.7 source sd",
        "Not looked at",
        "a long sentence",
        "no class folders",
        "Where this comes",
    ]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    assert "0" * 64 in said


def test_tones_are_said_in_words_too() -> None:
    labels = [a["aria-label"] for tag, a in Page(html.render(everything())).tags if a.get("class") == "mark"]
    assert labels == ["bad", "doubtful", "good"]


def test_every_id_stands_once_and_every_reference_leads_somewhere() -> None:
    text = html.render(everything())
    tags = Page(text).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"][1:] for _, a in tags if a.get("xlink:href", "").startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(ids)


def test_a_page_without_notes_origin_model_or_blocks_has_no_empty_parts() -> None:
    page = Page(html.render(Report("demo", "", "", Words("Well."), (), {})))
    assert not {"ul", "footer", "dl", "figure"} & {tag for tag, _ in page.tags}
    assert "Well." in page.said()


def test_the_same_report_is_the_same_bytes() -> None:
    assert html.render(everything()) == html.render(everything())


# ── pictures ──


def test_the_colours_of_a_picture_are_the_pages() -> None:
    drawn = pictures.svg(pictures.figure([block for block in everything().blocks if isinstance(block, Bars)]))
    assert {"var(--doubt)", "var(--bad)", "var(--good)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", drawn))
    assert not set(re.findall(r"#[0-9a-f]{6}", drawn)) - {"#ffffff"}, "a colour that no page can change"


def test_bars_are_as_high_as_their_values() -> None:
    bars = Bars("", items=(("a", 1.0, "good"), ("b", 3.0, "bad")), limits=((2.0, "doubt"),))
    (axes,) = pictures.figure([bars]).axes
    low, high = (patch.get_height() for patch in axes.patches)
    assert (low, high) == (1.0, 3.0)
    assert axes.lines[0].get_ydata()[0] == 2.0
    assert axes.get_ylim()[1] > 3.0


def test_strips_hold_every_channel_in_its_shade() -> None:
    values = (1.5, 0.75, 0.0)
    axes, scale = pictures.figure([Heat("", rows=(("bn1", "0.75", values), ("bn2", "0", (0.0,))), top=1.5)]).axes
    assert axes.images[0].get_array().tolist() == [list(values)]
    assert axes.images[0].get_clim() == (0, 1.5)
    assert axes.images[0].to_rgba(axes.images[0].get_array())[0, 0, 3] == 1.0
    assert [label.get_text() for label in scale.get_xticklabels()][-1] == "1.5+"


def test_spans_reach_from_end_to_end() -> None:
    spans = Spans("", items=(("a", "50", 50.0, 40.0, 61.0, "plain"),), full=(0, 100))
    (axes,) = pictures.figure([spans]).axes
    assert axes.lines[0].get_xdata().tolist() == [40.0, 61.0]
    assert axes.lines[1].get_xdata().tolist() == [50.0]
    assert axes.get_xlim()[0] < 0 < 100 < axes.get_xlim()[1]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 53, 400])
def test_any_number_of_layers_can_be_drawn(count: int) -> None:
    bars = Bars("", items=tuple((f"layer{k}", k / count, "good") for k in range(count)))
    axes = pictures.figure([bars]).axes[0]
    ticks = axes.get_xticks()
    assert min(ticks) >= 1
    assert max(ticks) <= count
    assert "<svg" in pictures.svg(pictures.figure([bars]))


def test_drawing_changes_no_setting_of_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.svg(pictures.figure([block for block in everything().blocks if isinstance(block, Heat)]))
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_terminal_leaves_pictures_out(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(Report("doctor", "", "", Words("Well."), (Bars("a picture", items=()),), {}), sys.stdout)
    assert capsys.readouterr().out == "renorm doctor\n\n  Well.\n"


# ── from the command line ──

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model[1].momentum = None
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    model.train()(torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return model.eval()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import numpy as np

    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "far.npz", images=images // 16, labels=rng.integers(0, 2, 60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = (
    "doctor nets.py:net far.npz",
    "doctor nets.py:net",
    "recalibrate nets.py:net far.npz -o new.pt --check far.npz",
    "recalibrate nets.py:net far.npz -o new.pt",
    "evaluate nets.py:net far.npz",
    "evaluate nets.py:net far.npz --metric nll",
    "profile nets.py:net far.npz -o net.profile",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_a_page(words: str, folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    main([*words.split(), "--format", "html"])
    ran = capsysbinary.readouterr()
    assert ran.err == b""
    page = Page(ran.out.decode("utf-8"))
    assert f"renorm {words} --format html" in page.said()
    assert "fingerprint of the model" in page.said()


# What stays in Latin letters on a Chinese page: commands, options, formats, units, and Python's own names.
LATIN = {
    *("renorm", "torch", "Python", "UTC", "SHA", "tensor", "npz", "far", "nets", "net", "images", "sha"),
    *("check", "DATA", "MODEL", "OUT", "data", "source", "format", "json", "top", "ECE", "NLL", "new", "evaluate"),
    *(
        "recalibrate",
        "doctor",
        "profile",
        "pretrained",
        "cfg",
        "html",
        "lang",
        "metric",
        "report",
        "demo",
        "file",
        "nll",
    ),
    *("docs", "shift", "mismatch"),  # the name of a page
}


@pytest.mark.parametrize("words", COMMANDS)
def test_nothing_english_is_left_on_a_chinese_page(
    words: str, folder: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    main([*words.split(), "--format", "html", "--lang", "zh"])
    said = Page(capsysbinary.readouterr().out.decode("utf-8")).said()
    said = re.sub(r"sha256:[0-9a-f]+|\b[0-9a-f]{64}\b|\S+\+\S+", "", said)
    assert set(re.findall(r"[A-Za-z]{3,}", said)) <= LATIN
    assert len(re.findall(r"[\u4e00-\u9fff]", said)) > 60


def test_a_page_beside_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("doctor nets.py:net far.npz --report far.html".split()) == 1
    assert "Data shift [BN302]" in capsys.readouterr().out
    assert "Data shift [BN302]" in Page((folder / "far.html").read_text(encoding="utf-8")).said()


def test_a_table_in_chinese(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("doctor nets.py:net far.npz --lang zh".split()) == 1
    assert "数据偏移 [BN302]" in capsys.readouterr().out


def test_json_is_for_machines_and_stays_english(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("doctor nets.py:net far.npz --lang zh --format json".split())
    assert not re.search(r"[\u4e00-\u9fff]", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--report old.html", "old.html stands there already"),
        ("--report no/such/page.html", "there is no folder"),
        ("--report .", "a folder"),
        ("-o page.pt --report ./page.pt", "-o and --report both name"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    more: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "old.html").write_text("mine")
    monkeypatch.setattr("renorm.recalibrate.recalibrate_", lambda *_, **__: pytest.fail("it worked all the same"))
    output = "" if "-o " in more else "-o new.pt "
    assert main(f"recalibrate nets.py:net far.npz {output}{more}".split()) == 2
    assert said in capsys.readouterr().err
    assert (folder / "old.html").read_text() == "mine"
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".html", ".npz", ".py"]


def test_a_page_is_written_over_with_force(folder: Path) -> None:
    (folder / "old.html").write_text("mine")
    assert main("doctor nets.py:net --report old.html --force --quiet".split()) == 0
    assert "renorm doctor" in (folder / "old.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_error_names_the_extra(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for more in ("--format html", "--report page.html"):
        assert main(f"doctor nets.py:net far.npz {more}".split()) == 2
        assert 'pip install "renorm[report]"' in capsys.readouterr().err
    assert not (folder / "page.html").exists()
    with pytest.raises(MissingExtra, match="pictures in reports needs matplotlib"):
        html.render(everything())


def test_a_page_that_fails_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Callable[..., Any] = lambda *_, **__: 1 / 0  # noqa: E731
    monkeypatch.setattr(html, "render", broken)
    assert main("doctor nets.py:net far.npz --report page.html".split()) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not list(folder.glob("*page*"))
