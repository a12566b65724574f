"""The face for people at a terminal: verdict first, then tables; colours only where the terminal wants them."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, TextIO

from renorm.report.base import Bar, Block, Cell, Report, Table, Told, Tone, Words

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

STYLE: dict[Tone, str] = {"good": "green", "doubt": "yellow", "bad": "red", "plain": ""}
MARK: dict[Tone, str] = {"good": "✓", "doubt": "!", "bad": "✗", "plain": "·"}  # tone without colour
BAR = 12  # characters of a full bar: eighths make it 96 steps, and a table still fits 80 columns


def show(report: Report, file: TextIO) -> None:
    """Write `report` to `file`, as wide as its terminal."""
    console = console_for(file)
    subject = " · ".join(part for part in (report.model, report.data) if part)
    console.print(_text(f"renorm {report.command}", "bold") + _text(f"  {subject}", "dim"), soft_wrap=True)
    for block in (report.verdict, *report.blocks):
        console.print()
        for renderable in _rendered(block):
            console.print(renderable)


def console_for(file: TextIO) -> Console:
    """A console that neither guesses colours inside words nor reads `[...]` in names as markup."""
    from rich.console import Console

    return Console(file=file, highlight=False, markup=False, emoji=False)


def clean(text: str) -> str:
    """`text` without control characters, so that a name in a file cannot steer the terminal."""
    return "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else "�" for c in text)


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(clean(text), style=style)


def _rendered(block: Block) -> list[RenderableType]:
    if isinstance(block, Table):
        return _table(block)
    return [_words(block)]


def _words(block: Words) -> RenderableType:
    from rich.padding import Padding
    from rich.table import Table as Grid

    if block.tone == "plain" and not block.title:
        return Padding(_text(block.text), (0, 0, 0, 2))
    grid = Grid.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column()
    title = _text(block.title, "bold") + _text("\n" if block.title and block.text else "")
    grid.add_row(_text(MARK[block.tone], f"bold {STYLE[block.tone]}".strip()), title + _text(block.text))
    return grid


def _table(block: Table) -> list[RenderableType]:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table as Grid

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for place, name in enumerate(block.columns):
        prose = name in block.words or place == 0
        bars = any(isinstance(row[place], Bar) for row in block.rows)
        grid.add_column(
            clean(name),
            justify="left" if prose or bars else "right",
            overflow="fold",
            no_wrap=not prose,
        )
    for row in block.rows:
        grid.add_row(*map(_cell, row))
    parts: list[RenderableType] = [Padding(_text(block.title, "bold"), (0, 0, 0, 2))] if block.title else []
    parts.append(Padding(grid, (0, 0, 0, 2)))
    if block.note:
        parts.append(Padding(_text(block.note, "dim"), (0, 0, 0, 2)))
    return parts


def _cell(cell: Cell) -> Text:
    if isinstance(cell, Bar):
        return _text(f"{cell.text} ") + _text(drawn(cell.share), "cyan")
    if isinstance(cell, Told):
        return _text(cell.text, STYLE[cell.tone])
    return _text(cell)


def drawn(share: float) -> str:
    """A bar of eighths of a character, at most `BAR` characters long."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()
