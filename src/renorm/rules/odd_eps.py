"""BN107: an eps that is none, or not the one that the others have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from renorm.mend import setting
from renorm.rules.base import Facts, Finding, Rule
from renorm.said import many, say


@dataclass(frozen=True, kw_only=True)
class OddEps(Rule):
    """An eps of 0 divides by zero at a constant channel; one unlike the others' is a fault only where it has an effect.

    The effect is the largest relative change of a channel's scale if the layer had the eps that most others have.
    """

    id: ClassVar[str] = "BN107"
    title: ClassVar[str] = say("odd eps")
    needs: ClassVar[tuple[str, ...]] = ("held", "settings")

    # Relative change of a scale. In each of 45 architectures of timm (tests/test_healthy.py) all eps are equal; 1e-3
    # beside 1e-5 makes a hundredth where a variance is below 0.05.
    limit: float = 0.01
    default: float = 1e-5

    def check(self, facts: Facts) -> Iterator[Finding]:
        sites = [site for site in facts.batch if site.name in facts.held]
        if not sites:
            return
        usual = Counter(site.eps for site in sites).most_common(1)[0][0]
        for site in sites:
            var = facts.held[site.name].var.clamp_min(0)
            if site.eps <= 0:
                constant = int((var == 0).sum())
                yield Finding(
                    rule=self.id,
                    site=site.name,
                    severity="error" if constant else "warning",
                    value=float(constant),
                    unit=many(constant, "channel divided by zero", "channels divided by zero"),
                    limit=0.0,
                    message=say("eps is 0: a channel that does not vary is divided by zero."),
                    advice=say("Set eps to the value that the model was trained with; torch's own is 1e-05."),
                    fix_=setting([site.name], label="setting eps", eps=usual if usual > 0 else self.default),
                )
            elif site.eps != usual:
                ratio = float(((var + site.eps) / (var + usual)).sqrt().sub(1).abs().nan_to_num().max())
                if ratio > self.limit:
                    yield Finding(
                        rule=self.id,
                        site=site.name,
                        severity="warning",
                        value=ratio,
                        unit=say("relative change of a scale against the eps of the other layers"),
                        limit=self.limit,
                        message=say(
                            "This layer's eps is not that of the others, and its variances are so small that it matters."
                        ),
                        advice=say(
                            "Compare it with the code that trained the model: 1e-05 is torch's default, 0.001 that of "
                            "TensorFlow and Keras."
                        ),
                    )
