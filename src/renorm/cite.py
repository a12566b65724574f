"""BibTeX of what was used, so that the papers behind a result are cited, and not only the tool."""

from __future__ import annotations

from typing import Any

from renorm.errors import UnknownName, UsageError
from renorm.layers.base import catalogue as layers
from renorm.methods.base import catalogue as methods
from renorm.recalibrate import Adaptation
from renorm.recommend import Plan
from renorm.regularisers.base import catalogue as regularisers

__all__ = ["cite"]


def cite(method_or_plan: Any) -> str:
    """The BibTeX entries of a method, layer or regulariser (its name, class or an instance), an adaptation or a plan.

    Entries are in the order of use, each once, with a blank line between; "" where what was used comes from no paper.
    Raises UnknownName for a name that is in no catalogue, UsageError for anything that cites nothing.
    """
    return "\n\n".join(dict.fromkeys(_entries(method_or_plan)))


def _entries(asked: Any) -> list[str]:
    if isinstance(asked, Plan):
        if asked.best.verb != "recalibrate_":
            return []
        return _entries("equal_mix" if "source" in asked.best.options else "pooled")
    if isinstance(asked, Adaptation):
        return _entries(asked.method)
    if isinstance(asked, str):
        known: dict[str, Any] = {**layers(), **regularisers(), **methods()}
        if asked not in known:
            raise UnknownName("method, layer or regulariser", asked, known)
        asked = known[asked]
    cites = getattr(asked, "cites", None)
    if not isinstance(cites, str):
        raise UsageError(
            f"cite takes a method, a layer, a regulariser (or its name), an adaptation or a plan; got {type(asked).__name__}."
        )
    return [cites] if cites else []
