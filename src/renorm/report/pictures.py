"""Pictures drawn with matplotlib: as a figure for a notebook, or as SVG whose colours the page around it decides.

Drawn on a `Figure` without pyplot, so no backend is chosen and no global setting is left changed. Names are never read as
mathematics, and the colours are a few known ones, which the SVG exchanges for the page's variables: one drawing fits light,
dark and paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from renorm.errors import require
from renorm.report.base import Bars, Curves, Heat, Lines, Matrix, Picture, Spans, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PURPOSE = "pictures in reports"
# What the page knows by these names; the values are those of its light theme. No two may be equal.
COLOURS = {
    "ink": "#1f2328",
    "soft": "#656d76",
    "rule": "#d1d9e0",
    "good": "#1a7f37",
    "doubt": "#9a6700",
    "bad": "#cf222e",
    "plain": "#0969da",
}
HOT = "#d1440c"  # of the strips; from clear to full, it shows on white and on black
LONGEST = 38  # characters of a name in a picture; the tables have it whole
SHORT = 12  # of one beside a matrix, whose squares need the room
COUNTED, NAMED = 8, 14  # squares along a side of a matrix in which a count fits, and beside which a name does
WIDTH = 348.0  # points, which are CSS pixels on a phone held upright: letters keep their size there
SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SETTINGS: Any = {
    "font.size": 11.0,
    "font.family": ["DejaVu Sans"],  # what matplotlib brings; the page's own font replaces it in the SVG
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "renorm",  # the same picture, the same bytes
    "image.composite_image": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.edgecolor": COLOURS["rule"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "axes.labelsize": 11.0,
}


def available() -> None:
    """Raise MissingExtra where matplotlib is not installed."""
    require("matplotlib", extra="report", purpose=PURPOSE)


def figure(pictures: Sequence[Picture], *, titles: bool = True) -> Figure:
    """The pictures one under another, each with its title."""
    require("matplotlib", extra="report", purpose=PURPOSE)
    from matplotlib.figure import Figure

    with _settings():
        tall = [_height(picture) + 26 * titles for picture in pictures]
        made = Figure(figsize=(WIDTH / 72, sum(tall) / 72), layout="constrained")
        parts = made.subfigures(len(pictures), 1, height_ratios=tall, squeeze=False)[:, 0]
        for picture, part in zip(pictures, parts, strict=True):
            if titles:
                part.suptitle(_label(picture.title), x=0.02, ha="left", size=11, weight="bold")
            _draw(picture, part)
    return made


def svg(made: Figure, *, label: str = "", name: str = "picture") -> str:
    """`made` as an SVG element that says `label` to those who cannot see it; `name` keeps its ids apart from others'."""
    out = io.BytesIO()
    with _settings():
        made.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(out.getvalue())
    for parent in [*root.findall(".//*/.."), root]:
        for child in [child for child in parent if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)  # who drew it is said elsewhere; a style inside a page would be the whole page's
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", clean(label))
    themed = {value: f"var(--{key})" for key, value in COLOURS.items()}
    for element in root.iter():
        _theme(element, themed)
        _keep_apart(element, name)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # letters that its own font lacks, as Chinese ones: the page's font has them
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _theme(element: Any, themed: dict[str, str]) -> None:
    style = element.get("style")
    if style is not None:
        for colour, variable in themed.items():
            style = style.replace(colour, variable)
        # the size stays; the family is the page's
        element.set("style", re.sub(r"font: (?:\d+ )?([\d.]+px) [^;]*", r"font-size: \1", style))


def _keep_apart(element: Any, name: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.get('id')}")
    for key, value in element.attrib.items():
        if key == f"{{{LINK}}}href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif key == "clip-path":
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _label(text: str) -> str:
    """`text` on one line, its middle left out where it is long: of a dotted name both ends tell where it is."""
    line = clean(text).replace("\n", " ")
    half = (LONGEST - 1) // 2
    return line if len(line) <= LONGEST else f"{line[:half]}…{line[-half:]}"


def _height(picture: Picture) -> float:
    if isinstance(picture, Heat):
        return 34.0 * len(picture.rows) + 62
    if isinstance(picture, Spans):
        return 36.0 * len(picture.items) + 44
    if isinstance(picture, Matrix):
        return 320.0
    return 190.0


def _draw(picture: Picture, part: SubFigure) -> None:
    if isinstance(picture, Bars):
        _bars(picture, part.subplots())
    elif isinstance(picture, Heat):
        _heat(picture, part)
    elif isinstance(picture, Spans):
        _spans(picture, part.subplots())
    elif isinstance(picture, Lines):
        _lines(picture, part.subplots())
    elif isinstance(picture, Curves):
        _curves(picture, part.subplots())
    elif isinstance(picture, Matrix):
        _matrix(picture, part.subplots())


def _bars(picture: Bars, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    count = len(picture.items)
    values = [value for _, value, _ in picture.items]
    axes.bar(range(1, count + 1), values, width=0.8, color=[COLOURS[tone] for _, _, tone in picture.items])
    room = max(0.0, (7 - count) / 2)  # a bar of a small model is no wall
    axes.set_xlim(0.4 - room, count + 0.6 + room)
    top = max([*values, *(value for value, _ in picture.limits)]) or 1.0
    axes.set_ylim(0, 1.12 * top)
    for value, tone in picture.limits:
        axes.axhline(value, color=COLOURS[tone], linewidth=1, linestyle=(0, (4, 3)))
        if value < 0.1 * top:
            continue  # beside bars as tall as these it would stand on its neighbour
        axes.annotate(
            f"{value:.2g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            size=11,
            color=COLOURS[tone],
        )
    names = [_label(name) for name, _, _ in picture.items]
    if count <= 7 and max(map(len, names)) <= 8:
        axes.set_xticks(range(1, count + 1), names)
    else:
        marks = MaxNLocator(8, integer=True, min_n_ticks=1).tick_values(1, count)
        axes.set_xticks([mark for mark in marks if 1 <= mark <= count])
    axes.tick_params(length=0)
    axes.set_xlabel(_label(picture.across))
    axes.set_ylabel(_label(picture.up))


def _heat(picture: Heat, part: SubFigure) -> None:
    import numpy

    shades = _shades()
    axes, scale = part.subplots(2, 1, height_ratios=[34 * len(picture.rows), 10])
    for place, (name, text, values) in enumerate(picture.rows):
        strip = {"cmap": shades, "vmin": 0, "vmax": picture.top, "aspect": "auto", "interpolation": "none"}
        axes.imshow(numpy.array([values]), extent=(0, 1, place + 0.95, place + 0.5), **strip)
        axes.text(0, place + 0.42, _label(name), va="bottom", size=11)
        axes.text(1, place + 0.42, _label(text), va="bottom", ha="right", size=11)
    axes.set(xlim=(0, 1), ylim=(len(picture.rows), 0), xticks=[], yticks=[], xlabel=_label(picture.across))
    axes.spines["bottom"].set_visible(False)
    scale.imshow(numpy.linspace(0, 1, 64)[None], cmap=shades, aspect="auto", extent=(0, picture.top, 0, 1))
    ticks = [0, picture.top / 4, picture.top / 2, 3 * picture.top / 4, picture.top]
    scale.set(yticks=[], xlabel=_label(picture.up))
    scale.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks[:-1]] + [f"{picture.top:.2g}+"])
    scale.tick_params(length=0)


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    red, green, blue, _ = to_rgba(HOT)
    return LinearSegmentedColormap.from_list("hot", [(red, green, blue, 0.05), (red, green, blue, 1.0)])


def _matrix(picture: Matrix, axes: Axes) -> None:
    import numpy

    counts = numpy.array(picture.counts, dtype=float)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap=_shades(), vmin=0, vmax=1, interpolation="none")
    size = len(picture.names)
    if size <= COUNTED and counts.max() < 1000:  # more digits than these do not fit into a square
        for (row, column), count in numpy.ndenumerate(counts):
            if count:
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", size=11)
    every = -(-size // NAMED)  # names need a line each
    names = [name if len(name) <= SHORT else f"{name[: SHORT - 1]}…" for name in map(_label, picture.names[::every])]
    axes.set_xticks(range(0, size, every), names, rotation=90)
    axes.set_yticks(range(0, size, every), names)
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel(_label(picture.across))
    axes.set_ylabel(_label(picture.up))


def _spans(picture: Spans, axes: Axes) -> None:
    low, high = picture.full or (min(item[3] for item in picture.items), max(item[4] for item in picture.items))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    for place, (name, text, value, least, most, tone) in enumerate(picture.items):
        axes.plot([least, most], [place + 0.72] * 2, color=COLOURS[tone], linewidth=3, solid_capstyle="round")
        axes.plot([value], [place + 0.72], "o", color=COLOURS[tone], markersize=8)
        for side, words in ((0, name), (1, text)):
            axes.text(
                side,
                place + 0.46,
                _label(words),
                va="bottom",
                ha="right" if side else "left",
                size=11,
                transform=axes.get_yaxis_transform(),
            )
    axes.set(xlim=(low - margin, high + margin), ylim=(len(picture.items) + 0.1, 0), yticks=[])
    axes.set_xlabel(_label(picture.across))
    axes.tick_params(length=0)
    axes.grid(axis="x", color=COLOURS["rule"], linewidth=0.6)
    axes.set_axisbelow(True)


def _lines(picture: Lines, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for start, end, tone in picture.bands:
        axes.axvspan(start, end, color=COLOURS[tone], alpha=0.15, linewidth=0)
    for x, tone in picture.marks:
        axes.axvline(x, color=COLOURS[tone], linewidth=1, linestyle=(0, (4, 3)))
    for name, tone, points in picture.items:
        xs, ys = zip(*points, strict=True)
        dot = "o" if len(points) == 1 else ""
        axes.plot(xs, ys, color=COLOURS[tone], linewidth=1.5, marker=dot, markersize=5, label=_label(name))
    if picture.full:
        low, high = picture.full
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    if len(picture.items) > 1:
        axes.legend(frameon=False, fontsize=11, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, borderpad=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    # a number of ticks of its own: by default they follow the height, which follows the width of their numbers
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=0)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_label(picture.across))
    axes.set_ylabel(_label(picture.up))


def _curves(picture: Curves, axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for name, points, tone in picture.series:
        across, up = zip(*points, strict=True)
        style = {"marker": "o", "linestyle": "none", "markersize": 5} if tone == "good" else {"linewidth": 1.6}
        axes.plot(across, up, color=COLOURS[tone], label=_label(name), **style)
    for value, tone in picture.limits:
        axes.axhline(value, color=COLOURS[tone], linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xscale="log", yscale="log", xlabel=_label(picture.across), ylabel=_label(picture.up))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0), numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(LogLocator(10, subs=()))
    axes.legend(frameon=False, loc="lower left", fontsize=11)
