"""What is wrong with a model's norm layers, and on this data: gather facts, run the rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from renorm.calls import Caller, Forward, Output
from renorm.faces import Faces
from renorm.rules.base import Facts, Finding, catalogue
from renorm.shift import Shift
from renorm.sites import Site

if TYPE_CHECKING:
    from renorm.profile import Profile

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True, repr=False)
class Diagnosis(Faces):
    """What the rules found; without data, what the model alone shows.

    findings   worst first; empty where nothing is wrong
    shifts     per site, how far the data lie from the statistics it holds
    distances  per site, `shifts` in one number: source sd, sampling error taken off; worst first; without sites whose
               statistics were never estimated
    unvisited  batch norm sites that no batch reached
    sites      every norm layer of the model, of any kind
    samples    how many samples were looked at; 0 without data
    """

    findings: tuple[Finding, ...]
    shifts: Mapping[str, Shift]
    distances: Mapping[str, float]
    unvisited: tuple[str, ...]
    sites: tuple[Site, ...]
    samples: int

    @property
    def worst(self) -> Finding | None:
        """The worst finding, or None."""
        return self.findings[0] if self.findings else None

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity == "info" for finding in self.findings)

    def __str__(self) -> str:
        if not self.findings:
            return "nothing wrong was found"
        return "\n".join(
            f"{f.rule} {f.severity} at {f.site or 'the model itself'}: {f.message} {f.advice} "
            f"({f.value:.3g} {f.unit}, limit {f.limit:.3g})"
            for f in self.findings
        )

    __repr__ = __str__


def diagnose(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    source: Profile | None = None,
    *,
    forward: Forward | None = None,
    output: Output | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
) -> Diagnosis:
    """Everything the doctor's rules find wrong, worst first; the model is the same afterwards, bit for bit.

    Without `batches` only the rules that need none run. A model without batch norm is healthy. The cheapest rules run
    first; one pass over the batches serves them all.
    Raises BatchError for batches that cannot be used.
    """
    caller = Caller(forward=forward, output=output, device=device, autocast=autocast, channels_last=channels_last)
    facts = Facts(model, batches, source, caller)
    findings: list[Finding] = []
    for rule in sorted(catalogue().values(), key=lambda rule: rule.passes()):
        if all(map(facts.has, rule.needs)):
            findings += rule().check(facts)
    seen = batches is not None
    return Diagnosis(
        findings=tuple(sorted(findings, key=lambda finding: finding.weight)),
        shifts=facts.shifts if seen else {},
        distances=dict(sorted(facts.distances.items(), key=lambda item: -item[1])) if seen else {},
        unvisited=facts.observed.unvisited if seen else (),
        sites=facts.sites,
        samples=facts.observed.samples if seen else 0,
    )
