"""What a notebook may ask of a result: HTML, a table, a picture. Stated here; how it is done, `report/` says.

A result is a value of the centre, and the centre knows no pandas, no matplotlib and no sentence about itself. So each face
is a function here that knows no type yet. `report/notebook.py` registers one for every result; `renorm/__init__.py` says that
it does, and the first face that is asked for imports it.
"""

from __future__ import annotations

from functools import singledispatch
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Faces", "figure", "frame", "html", "registered_by"]


_registrars: list[str] = []


def registered_by(module: str) -> None:
    """Importing `module` will register faces; that is put off until one is asked for."""
    _registrars.append(module)


class Faces:
    """Gives a result its `to_frame`, its `plot`, and how a notebook shows it."""

    def to_frame(self, *, per: str = "") -> DataFrame:
        """The numbers as a pandas table; for results about sites `per="channel"` has a row for each channel, not each site.

        Raises MissingExtra without pandas (extra `tables`), UsageError for another `per`.
        """
        made: DataFrame = frame(self, per)
        return made

    def plot(self) -> Figure:
        """The same picture as in the HTML report, as a matplotlib figure of no window; MissingExtra without matplotlib."""
        made: Figure = figure(self)
        return made

    def _repr_html_(self) -> str:
        return html(self)


@singledispatch
def html(value: Any) -> str:
    """A fragment of HTML, every name in it escaped: words and tables, no script and nothing to fetch."""
    return str(_again(html, value))


@singledispatch
def frame(value: Any, per: str) -> Any:
    """A pandas table of the numbers."""
    return _again(frame, value, per)


@singledispatch
def figure(value: Any) -> Any:
    """A matplotlib figure."""
    return _again(figure, value)


def _again(face: Any, value: Any, *options: Any) -> Any:
    """`face` with what was announced registered; TypeError where that knows no face for `value` either."""
    for module in _registrars:
        import_module(module)
    if face.dispatch(type(value)) is face.dispatch(object):
        raise TypeError(f"no face is registered for {type(value).__name__}; renorm.report.notebook has the list.")
    return face(value, *options)
