"""Pages in a real browser: at the width of a phone and of a desk, light and dark, nothing hangs out, runs or is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from renorm.report import html
from tests.browser import chromium
from tests.pages import HOSTILE, everything

pytest.importorskip("matplotlib")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(chromium.found() is None, reason="needs Chromium: apt-get install chromium"),
]

PHONE, DESK = 360, 1200


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK], ids=["phone", "desk"])
def test_a_page_fits_its_screen(width: int, dark: bool, tmp_path: Path) -> None:
    page = html.render(everything(), lang="zh" if dark else "en")
    seen = chromium.look(page, tmp_path, width=width, dark=dark)
    measured = seen.measured
    assert measured["width"] == width
    assert measured["scrolls"] <= width, "the page scrolls sideways"
    assert measured["wide"] == []
    assert seen.console == []
    assert measured["scripts"] == 0
    assert [name for name in measured["fetched"] if not name.startswith("data:")] == []
    assert measured["smallest"] >= 11, "letters in a picture are too small to read"
    assert measured["caught"] == 0, "a picture has no height"
    paper, ink = (sum(int(part) for part in measured[key][4:-1].split(",")) for key in ("paper", "ink"))
    assert (paper < 120 and ink > 500) if dark else (paper > 700 and ink < 200)
    assert all(sum(int(p) for p in fill[4:-1].split(",")) > 250 for fill in measured["axis"]) or not dark
    assert colours(seen.screenshot) > 50, "the picture of the page is blank"


@pytest.mark.parametrize("width", [PHONE, DESK], ids=["phone", "desk"])
def test_hostile_names_neither_run_nor_break_the_page(width: int, tmp_path: Path) -> None:
    page = html.render(everything(HOSTILE[1] + HOSTILE[-1]))
    seen = chromium.look(page, tmp_path, width=width)
    assert seen.measured["scrolls"] <= width
    assert seen.measured["wide"] == []
    assert seen.measured["fetched"] == []
    assert seen.console == []


def test_a_page_that_would_fetch_or_hang_out_is_noticed(tmp_path: Path) -> None:
    """The checks above can fail."""
    bad = '<img src="https://example.invalid/x.png"><div style="width: 900px">wide</div></main>'
    seen = chromium.look(html.render(everything()).replace("</main>", bad), tmp_path, width=PHONE)
    assert seen.measured["scrolls"] >= 900
    assert any("wide" in element for element in seen.measured["wide"])
    assert any("example.invalid" in line and "Content Security Policy" in line for line in seen.console)


def colours(file: Path) -> int:
    """How many colours a PNG file has."""
    import numpy as np
    from matplotlib.image import imread

    pixels = imread(file)[..., :3].reshape(-1, 3)
    return len(np.unique((pixels * 255).astype(np.uint8), axis=0))
