"""BN201: a checkpoint without the statistics of its batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.provenance import plain_names
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say
from renorm.sites import unwrap


@dataclass(frozen=True, kw_only=True)
class LostInFile(Rule):
    """A file without a running mean or variance that the model holds was saved from parameters alone."""

    id: ClassVar[str] = "BN201"
    title: ClassVar[str] = say("statistics missing from the file")
    needs: ClassVar[tuple[str, ...]] = (
        "file",
        "held",
    )

    def check(self, facts: Facts) -> Iterator[Finding]:
        file = facts.file or {}
        missing = {name for plain, name in plain_names(unwrap(facts.model).state_dict()).items() if plain not in file}
        missing = {name.replace("_orig_mod.", "") for name in missing}
        for site in facts.batch:
            names = {f"{site.name}.{key}".lstrip(".") for key in ("running_mean", "running_var")}
            lost = names & missing
            if lost and site.slot is None:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error",
                    value=float(len(lost)),
                    unit=many(len(lost), "tensor missing from the file", "tensors missing from the file"),
                    limit=0.0,
                    message=say(
                        "The checkpoint lacks this layer's running statistics: it was saved from parameters alone "
                        "(an adapter, an averaged model, a federated update)."
                    ),
                    advice=say(
                        "Save model.state_dict(), which has the buffers, or estimate the statistics with recalibrate."
                    ),
                    fix_=facts.estimating(site.name),
                )
