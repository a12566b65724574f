"""The face for people at a terminal: verdict first, then tables; colours only where the terminal wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from renorm.report.base import Bar, Cell, Picture, Report, Table, Told, Tone, Words, clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table as Grid
    from rich.text import Text

STYLE: dict[Tone, str] = {"good": "green", "doubt": "yellow", "bad": "red", "plain": ""}
MARK: dict[Tone, str] = {"good": "✓", "doubt": "!", "bad": "✗", "plain": "·"}  # tone without colour
WIDEST = 100  # columns: longer lines of prose lose the reader's eye
BAR = 12  # characters of a full bar: eighths make it 96 steps, and a table still fits 80 columns


def show(report: Report, file: TextIO) -> None:
    """Write `report` to `file`, as wide as its terminal."""
    console = console_for(file)
    with console.capture() as captured:
        subject = " · ".join(part for part in (report.model, report.data) if part)
        console.print(_joined((f"renorm {report.command}", "bold"), (f"  {subject}", "dim")), soft_wrap=True)
        for block in (report.verdict, *report.blocks):
            if isinstance(block, Picture):
                continue
            console.print()
            for renderable in _rendered(block, console):
                console.print(renderable)
        if report.notes:
            console.print()
            console.print(_notes(report.notes))
    # rich fills every line with spaces, which only make a copy of it ugly
    file.write("".join(line.rstrip(" ") + "\n" for line in captured.get().splitlines()))


def console_for(file: TextIO) -> Console:
    """A console that neither guesses colours inside words nor reads `[...]` in names as markup."""
    from rich.console import Console

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDEST)
    return console


def _text(text: str, style: str = "") -> Text:
    return _joined((text, style))


def _joined(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*((clean(text), style) for text, style in parts))


def _rendered(block: Words | Table, console: Console) -> list[RenderableType]:
    if isinstance(block, Table):
        return _table(block, console)
    return [_words(block)]


def _words(block: Words) -> RenderableType:
    from rich.padding import Padding
    from rich.table import Table as Grid

    if block.tone == "plain" and not block.title:
        return Padding(_text(block.text), (0, 0, 0, 2))
    grid = Grid.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")  # Chinese has no spaces to break at
    said = _joined((block.title, "bold"), ("\n" if block.title and block.text else "", ""), (block.text, ""))
    grid.add_row(_text(MARK[block.tone], f"bold {STYLE[block.tone]}".strip()), said)
    return grid


def _notes(notes: tuple[str, ...]) -> RenderableType:
    from rich.padding import Padding
    from rich.table import Table as Grid

    grid = Grid.grid(padding=(0, 1))
    grid.add_column(width=1, style="dim")
    grid.add_column(style="dim", overflow="fold")
    for note in notes:
        grid.add_row("·", _text(note))
    return Padding(grid, (0, 0, 0, 2))


def _table(block: Table, console: Console) -> list[RenderableType]:
    from rich.padding import Padding

    grid: RenderableType = Padding(_grid(block, bars=True), (0, 0, 0, 2))
    if console.measure(grid).maximum > console.width:
        grid = Padding(_grid(block, bars=False), (0, 0, 0, 2))  # the numbers stay beside where they were drawn
    parts: list[RenderableType] = [Padding(_text(block.title, "bold"), (0, 0, 0, 2))] if block.title else []
    parts.append(grid)
    if block.note:
        parts.append(Padding(_text(block.note, "dim"), (0, 0, 0, 2)))
    return parts


def _grid(block: Table, *, bars: bool) -> Grid:
    from rich import box
    from rich.table import Table as Grid

    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    last = len(block.columns) - 1
    lengths = [max((len(_cell(row[place], bars=bars).plain) for row in block.rows), default=0) for place in (0, last)]
    folds = last if lengths[1] > lengths[0] else 0  # names are folded, or the reasons behind them; numbers never
    for place, name in enumerate(block.columns):
        drawn = bars and any(isinstance(row[place], Bar) for row in block.rows)
        words = place == 0 or drawn or name in block.words
        grid.add_column(clean(name), justify="left" if words else "right", overflow="fold", no_wrap=place != folds)
    for row in block.rows:
        grid.add_row(*(_cell(cell, bars=bars) for cell in row))
    return grid


def _cell(cell: Cell, *, bars: bool) -> Text:
    if isinstance(cell, Bar):
        return _joined((f"{cell.text} ", ""), (drawn(cell.share), "cyan")) if bars else _text(cell.text)
    if isinstance(cell, Told):
        return _text(cell.text, STYLE[cell.tone])
    return _text(cell)


def drawn(share: float) -> str:
    """A bar of eighths of a character, at most `BAR` characters long."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()
