"""What was tried on the user's data, ranked, with the reason for the first."""

from __future__ import annotations

from typing import Any

from renorm.recommend import Candidate, Plan
from renorm.report.base import Block, Spans, Table, Told, Tone, Words
from renorm.said import follow, many, say


def verdict(plan: Plan) -> Words:
    """What to do."""
    samples = many(plan.samples, "{count:,} sample", "{count:,} samples")
    how = (
        say("Judged by the labels of {samples}, each half by what the other half gave.", samples=samples)
        if plan.labelled
        else say("Judged without labels on {samples}: 32 labelled ones would make it surer.", samples=samples)
    )
    tone: Tone = "plain" if plan.best.verb == "leave" else "good"
    return Words(follow(say("{why}.", why=plan.why.capitalised()), how), tone, say("Best: {name}", name=plan.best.name))


def blocks(plan: Plan) -> tuple[Block, ...]:
    """The ranking, drawn where there are labels, and what was left out."""
    parts: list[Block] = []
    leave = next(each for each in plan.ranking if each.verb == "leave")
    known = [each for each in plan.ranking if each.value is not None]
    if known:
        items = tuple(
            (each.name, f"{each.value:.1%}", each.value, *_ends(each, leave), "good" if each is plan.best else "plain")
            for each in known
            if each.value is not None
        )
        parts.append(
            Spans(
                say("Right answers on samples that a candidate had not seen"),
                items=items,  # type: ignore[arg-type, unused-ignore]
                across=say("share of right answers"),
                note=say("The line is a standard error of the difference to leaving the model on either side."),
            )
        )
    rows = tuple(
        (f"{place}", each.name, _judgement(each, plan), f"{each.seconds:.1f}")
        for place, each in enumerate(plan.ranking, start=1)
    )
    note = follow(*(say("{name}: {why}.", name=name, why=why) for name, why in plan.left_out.items()))
    head = ("", say("candidate"), say("right") if plan.labelled else say("believed"), say("seconds"))
    parts.append(Table(say("What was tried, best first"), head, rows, words=(head[1],), note=note))
    return tuple(parts)


def result(plan: Plan) -> dict[str, Any]:
    """The numbers, for machines."""
    return {
        "best": str(plan.best.name),
        "why": str(plan.why),
        "samples": plan.samples,
        "labelled": plan.labelled,
        "ranking": [
            {
                "name": str(each.name),
                "verb": each.verb,
                "options": {key: value for key, value in each.options.items() if key != "source"},
                "accuracy": each.value,
                "gain": each.gain,
                "standard_error": each.error,
                "believed": None if each.trust is None else each.trust.better,
                "reliability": None if each.trust is None else each.trust.reliability,
                "seconds": each.seconds,
                "why": str(each.why),
            }
            for each in plan.ranking
        ],
        "left_out": {str(name): str(why) for name, why in plan.left_out.items()},
    }


def _ends(each: Candidate, leave: Candidate) -> tuple[float, float]:
    value, error = each.value or 0.0, each.error or 0.0
    return (value, value) if each is leave else (value - error, value + error)


def _judgement(each: Candidate, plan: Plan) -> str | Told:
    if each.value is not None:
        gain = "" if each.verb == "leave" else f" ({100 * (each.gain or 0):+.1f} ± {100 * (each.error or 0):.1f})"
        return f"{each.value:.1%}{gain}"
    if each.trust is None:
        return ""
    if each.trust.better:
        return Told(say("yes, {sure:.0%} sure", sure=each.trust.reliability), "good")
    return Told(say("no, {sure:.0%} sure", sure=each.trust.reliability), "doubt")
