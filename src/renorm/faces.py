"""What a notebook may ask of a result: HTML, a table, a picture. Stated here; how it is done, `report/` says.

A result is a value of the centre, and the centre knows no pandas, no matplotlib and no sentence about itself. So each face
is a function here that knows no type yet; `report/notebook.py` registers one for every result, when renorm is imported.
"""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Faces", "figure", "frame", "html"]


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
    raise _faceless(value)


@singledispatch
def frame(value: Any, per: str) -> Any:
    """A pandas table of the numbers."""
    raise _faceless(value)


@singledispatch
def figure(value: Any) -> Any:
    """A matplotlib figure."""
    raise _faceless(value)


def _faceless(value: Any) -> TypeError:
    return TypeError(f"no face is registered for {type(value).__name__}; renorm.report.notebook has the list.")
