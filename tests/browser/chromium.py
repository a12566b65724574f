"""Debian's Chromium, headless and without a network, as a function from a page and a width to what a reader would see.

The page runs no script, so it is measured from outside: it stands in a frame of the wanted width on a second page, which
writes what it measures into its own text.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nobody is called, and who tries is heard on the console
    *("--enable-logging=stderr", "--v=0"),
)
MEASURE = """
const frame = document.querySelector('iframe');
frame.onload = () => {
  const inner = frame.contentDocument, root = inner.documentElement, wide = [];
  for (const element of inner.body.querySelectorAll('*')) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > frame.clientWidth + 0.5 || box.left < -0.5)) wide.push(element.outerHTML.slice(0, 120));
  }
  const style = element => frame.contentWindow.getComputedStyle(element), main = inner.querySelector('main');
  const texts = [...inner.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height);
  frame.style.height = root.scrollHeight + 'px';
  document.querySelector('pre').textContent = JSON.stringify({
    width: frame.clientWidth, scrolls: root.scrollWidth, height: root.scrollHeight, wide, title: inner.title,
    ink: style(main).color, paper: style(main).backgroundColor, scripts: inner.scripts.length,
    axis: [...inner.querySelectorAll('svg text')].map(text => style(text).fill), smallest: Math.min(...texts),
    fetched: frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name),
    caught: [...inner.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().height < 40).length,
  });
};
frame.srcdoc = page;
"""


@dataclass(frozen=True)
class Seen:
    """What Chromium measured on a page, what it wrote to its console, and the picture it took."""

    measured: dict[str, Any]
    console: list[str]
    screenshot: Path


def found() -> str | None:
    """The browser's path, or None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def look(page: str, folder: Path, *, width: int, dark: bool = False, height: int = 3000) -> Seen:
    """Open `page` in a frame of `width` CSS pixels; files go to `folder`."""
    name = f"{width}-{'dark' if dark else 'light'}"
    script = f"const page = {json.dumps(page).replace('</', '<' + chr(92) + '/')};{MEASURE}"
    style = f"body {{margin: 0}} iframe {{border: 0; width: {width}px}} pre {{display: none}}"
    outer = f"<!doctype html><meta charset=utf-8><style>{style}</style>"
    file = folder / f"{name}.html"
    file.write_text(f"{outer}<iframe></iframe><pre></pre><script>{script}</script>", encoding="utf-8")
    shot = folder / f"{name}.png"
    done = subprocess.run(
        [
            str(found()),
            *FLAGS,
            f"--user-data-dir={folder / name}",
            f"--window-size={max(width, 500)},{height}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            "--virtual-time-budget=4000",
            f"--screenshot={shot}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    written = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, flags=re.DOTALL)
    assert written, f"the page was not measured: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(written[1])), console, shot)
