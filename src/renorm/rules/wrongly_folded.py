"""BN503: a folded model that answers otherwise than the one it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.rules.base import Facts, Finding, Rule
from renorm.said import say


@dataclass(frozen=True, kw_only=True)
class WronglyFolded(Rule):
    """The outputs of the model that is said to be this one folded (`folded=`) differ from its own by more than rounding.

    Tools that fold each batch norm into the layer registered before it are wrong where the forward goes another way.
    """

    id: ClassVar[str] = "BN503"
    title: ClassVar[str] = say("fold that is not equivalent")
    needs: ClassVar[tuple[str, ...]] = ("parting",)

    # A share of the largest output. Of 124 networks of timm that were folded by the order of registration (`renorm bench fold`)
    # the right ones differ by up to 0.004, the network's own rounding in float32 among it, the wrong ones by 0.03 and more.
    limit: float = 0.01

    def check(self, facts: Facts) -> Iterator[Finding]:
        parting = facts.parting
        if parting is not None and not parting.error <= self.limit:
            yield Finding(
                rule=self.id,
                site=parting.site,
                severity="error",
                value=parting.error,
                unit=say("of the largest output"),
                limit=self.limit,
                message=say(
                    "The folded model does not answer as this one: from here on nothing in it is what it was before the fold."
                ),
                advice=say(
                    "Fold again with renorm fold MODEL -o FILE, which proves each fold on an example and undoes those that do "
                    "not hold."
                ),
            )
