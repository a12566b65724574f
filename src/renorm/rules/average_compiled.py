"""BN506: momentum None under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import setting
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class AverageCompiled(Rule):
    """A compiled model breaks its graph in training at a layer with momentum None, and fails with `fullgraph=True`."""

    id: ClassVar[str] = "BN506"
    title: ClassVar[str] = say("plain average in a compiled model")
    needs: ClassVar[tuple[str, ...]] = ("batch",)

    default: float = 0.1

    def check(self, facts: Facts) -> Iterator[Finding]:
        compiled = any(
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            for module in facts.model.modules()
        )
        if not compiled:
            return
        for site in facts.batch:
            if site.tracks and site.momentum is None:
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="warning",
                    value=1.0,
                    unit=many(1, "layer with momentum None", "layers with momentum None"),
                    limit=0.0,
                    message=say(
                        "The model is compiled, and momentum None makes the layer read a counter on the host: the graph "
                        "breaks here in training, and fullgraph=True fails."
                    ),
                    advice=say("Give it a momentum, 0.1 for example."),
                    fix_=setting([site.name], label="setting momentum", momentum=self.default),
                )
