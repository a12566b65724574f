"""How far two models part, in words and numbers."""

from __future__ import annotations

from typing import Any

from renorm.report.base import Table, Words
from renorm.said import follow, many, say
from renorm.verify import Gap


def verdict(gap: Gap) -> Words:
    """Whether the two are the same, and if not, where they part."""
    samples = many(gap.samples, "{count:,} sample", "{count:,} samples")
    if gap.max_abs == 0:
        return Words(
            say("Every output is equal, over {samples}.", samples=samples), "good", say("The models are the same")
        )
    text = say(
        "Over {samples} the outputs differ by {mean:.3g} on average and by {max:.3g} at the most.",
        samples=samples,
        mean=gap.mean_abs,
        max=gap.max_abs,
    )
    if gap.agreement is not None:
        text = follow(text, say("{share:.1%} of the answers are the same.", share=gap.agreement))
    if gap.first_site is None:
        return Words(text, "plain", say("The models differ, and at no norm layer that both have"))
    where = gap.first_site or say("the model itself")
    return Words(text, "plain", say("The models part at {site}", site=where))


def table(gap: Gap) -> Table:
    """The numbers."""
    rows = [
        (say("largest difference of an output"), f"{gap.max_abs:.4g}"),
        (say("mean difference"), f"{gap.mean_abs:.4g}"),
    ]
    if gap.agreement is not None:
        rows.append((say("same answer"), f"{gap.agreement:.1%}"))
    return Table("", ("", ""), tuple(rows))


def result(gap: Gap) -> dict[str, Any]:
    """The numbers, for machines."""
    names = ("max_abs", "mean_abs", "agreement", "first_site", "samples")
    return {name: getattr(gap, name) for name in names}
