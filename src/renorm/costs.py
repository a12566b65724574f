"""What each fact costs in passes over the batches, on top of those that it is built on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

__all__ = ["PASSES", "price"]

# The most that measuring a fact may take, counted by tests/test_costs.py. A second look (calls, settled, parting, company,
# padding, gap, suspect) runs again over the first batches alone, and counts as whole passes as if there were no others.
PASSES: Mapping[str, int] = {
    **{"batch": 0, "held": 0, "new": 0, "broken": 0, "thawing": 0, "file": 0, "graph": 0, "settings": 0},
    **{"optimizers": 0, "loop": 0, "ranks": 0},
    **{"observed": 1, "parts": 0, "few": 0, "shifts": 0, "distances": 0, "mistakes": 0},
    **{
        "calls": 1,
        "settled": 1,
        "parting": 4,
        "company": 2,
        "padding": 1,
        "mixtures": 1,
        "gap": 4,
        "look": 7,
        "suspect": 32,
    },
}
ON: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("parts", "few", "shifts", "distances", "calls", "parting", "company", "padding", "mixtures", "gap", "look"),
        ("observed",),
    ),
    "mistakes": ("observed", "parts"),
    "suspect": ("observed", "distances"),
    "settled": ("observed", "distances"),
}


def price(facts: Iterable[str], known: Collection[str] = ()) -> int:
    """What measuring `facts` takes, with all that they are built on, where those in `known` are measured already."""
    wanted: set[str] = set()
    queue = list(facts)
    while queue:
        fact = queue.pop()
        if fact not in known and fact not in wanted:
            wanted.add(fact)
            queue += ON.get(fact, ())
    return sum(PASSES[fact] for fact in wanted)
