"""What online adaptation did on a stream, step by step, in words, numbers and lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import isfinite, isinf, nan
from typing import Any, NamedTuple

from renorm.guard import MOVED, UNMOVED
from renorm.report.base import Bar, Block, Lines, Picture, Table, Told, Tone, Words, mean, thinned
from renorm.said import Said, follow, many, say
from renorm.stream import Step

ROWS = 10


class Errors(NamedTuple):
    """Shares of wrong answers on the labelled samples: the stream's, the source's, and their difference with its interval.

    `by_step` are both shares of each step; `difference` is (mean, low, high) of stream less source, sample by sample.
    """

    stream: float
    source: float
    difference: tuple[float, float, float]
    samples: int
    by_step: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A stream that has ended: how much it answered, its log (the last 10,000 steps), and its errors where labels are known.

    `unanswered` of the samples held numbers that are not finite, and got no class.
    """

    method: str
    guarded: bool
    interrupted: bool
    samples: int
    unanswered: int
    steps: int
    log: tuple[Step, ...]
    errors: Errors | None

    @property
    def believed(self) -> bool:
        """Whether the adapted model is believed at the end; without a guard it always is."""
        return not self.guarded or self.log[-1].believed


class Phase(NamedTuple):
    """Steps in a row that the same model answered, the adapted one or the source."""

    believed: bool
    steps: tuple[Step, ...]

    @property
    def samples(self) -> int:
        """Samples in all of them."""
        return sum(step.samples for step in self.steps)


def phases(log: Sequence[Step]) -> tuple[Phase, ...]:
    """The log cut where belief began or ended."""
    return tuple(Phase(believed, tuple(steps)) for believed, steps in groupby(log, key=lambda step: step.believed))


def alarms(log: Sequence[Step]) -> tuple[Step, ...]:
    """The steps at which something was wrong: what was learnt was thrown away, or the guard says why it worried."""
    return tuple(step for step in log if step.action or step.why)


def verdict(streamed: Streamed, *, output: str) -> Words:
    """Who is believed at the end, and what it was worth where labels tell."""
    written = say("Written to {output}.", output=output)
    samples = many(streamed.samples, "{count:,} sample", "{count:,} samples")
    ours = sum(phase.samples for phase in phases(streamed.log) if phase.believed)
    share = 100 * ours / max(1, sum(step.samples for step in streamed.log))
    tone: Tone = "good"
    if not streamed.guarded:
        tone = "plain"
        title = say("Adapted to {samples}, without a guard", samples=samples)
        text = say("Nothing checked whether the adapted model was better than the source.")
    elif streamed.believed:
        title = say("Adapted to {samples}, and believed", samples=samples)
        text = say("The adapted model gave {share:.0f} % of the answers, the source the others.", share=share)
    else:
        tone = "doubt"
        title = say("The source answers: the adapted model is not believed after {samples}", samples=samples)
        text = say(
            "It gave {share:.0f} % of the answers. At the end the guard has no reason to prefer it: there may be nothing to "
            "adapt to, or too few samples came, or the method harms here.",
            share=share,
        )
    if streamed.errors is not None:
        tone = "bad" if streamed.errors.difference[1] > 0 else tone
        text = follow(text, _told(streamed.errors))
    if streamed.interrupted:
        written = follow(say("Stopped by Ctrl-C."), written)
    return Words(follow(text, written), tone, title)


def _told(errors: Errors) -> Said:
    return say(
        "Error {stream:.1f} %, where the source has {source:.1f} % on the same samples.",
        stream=100 * errors.stream,
        source=100 * errors.source,
    )


def blocks(streamed: Streamed) -> tuple[Block, ...]:
    """What follows the verdict: errors, phases, alarms, and the stream drawn."""
    parts: list[Block] = []
    if streamed.errors is not None:
        parts.append(_errors(streamed.errors))
    parts += [*pictures(streamed), _phases(streamed)]
    if alarms(streamed.log):
        parts.append(_alarms(streamed))
    if streamed.unanswered:
        text = many(
            streamed.unanswered,
            "{count:,} sample held numbers that are not finite: it got no class, and taught nothing.",
            "{count:,} samples held numbers that are not finite: they got no class, and taught nothing.",
        )
        parts.append(Words(text, "doubt", say("Unanswered")))
    return tuple(parts)


def _errors(errors: Errors) -> Table:
    mean, low, high = (100 * value for value in errors.difference)
    between = say("unknown") if isinf(low) else say("{low:+.1f} to {high:+.1f}", low=low, high=high)
    tone: Tone = "bad" if low > 0 else "good" if high < 0 else "plain"
    rows = (
        (say("the stream"), f"{100 * errors.stream:.1f} %", Told(f"{mean:+.1f}", tone), between),
        (say("the source alone"), f"{100 * errors.source:.1f} %", "", ""),
    )
    columns = ("", say("error"), say("difference, points"), say("95 % interval"))
    note = many(errors.samples, "On {count:,} labelled sample.", "On {count:,} labelled samples, compared one by one.")
    return Table(say("What it was worth"), columns, rows, note=note)


def _phases(streamed: Streamed) -> Table:
    found = phases(streamed.log)
    rows = tuple(
        (
            _range(phase.steps),
            f"{phase.samples:,}",
            Told(say("the adapted model"), "good") if phase.believed else Told(say("the source"), "doubt"),
            Bar(mean(step.weight for step in phase.steps), f"{mean(step.weight for step in phase.steps):.2f}"),
            _number(phase.steps[-1].evidence),
            f"{sum(step.left_out for step in phase.steps):,}",
        )
        for phase in found[-ROWS:]
    )
    note = say(
        "Weight is the target's mean share in what normalises, evidence what spoke for the adapted model at the end of the "
        "phase (−1 to 1); left out are samples that taught nothing, because they are garbage or not finite."
    )
    if hidden := len(found) - len(rows):
        note = follow(note, say("{hidden} earlier ones in --format json.", hidden=hidden))
    if streamed.steps > len(streamed.log):
        note = follow(note, say("Only the last {kept:,} steps are known.", kept=len(streamed.log)))
    columns = (say("steps"), say("samples"), say("who answered"), say("weight"), say("evidence"), say("left out"))
    return Table(say("Who answered"), columns, rows, note=note)


def _alarms(streamed: Streamed) -> Table:
    done = {"": say("noted"), "back": say("back to the last good state"), "anew": say("began anew from the source")}
    found = alarms(streamed.log)
    rows = tuple((str(step.step), done[step.action], step.why) for step in found[-ROWS:])
    hidden = len(found) - len(rows)
    note = say("{hidden} earlier ones in --format json.", hidden=hidden) if hidden else ""
    why = say("why")
    return Table(say("Alarms"), (say("step"), say("what was done"), why), rows, words=(why,), note=note)


def pictures(streamed: Streamed) -> tuple[Picture, ...]:
    """The stream over its steps: weight, evidence, drift and errors, as far as each is known."""
    log = streamed.log
    bands: tuple[tuple[float, float, Tone], ...] = tuple(
        (phase.steps[0].step - 0.5, phase.steps[-1].step + 0.5, "doubt")
        for phase in phases(log)
        if not phase.believed and streamed.guarded
    )
    marks: tuple[tuple[float, Tone], ...] = tuple((float(step.step), "bad") for step in alarms(log))
    around: dict[str, Any] = {"bands": bands, "marks": marks, "across": say("step")}
    shaded = say("Shaded: the source answered. Dashed: an alarm.")

    def line(title: Said, value: Callable[[Step], float], up: Said, note: Said, **more: Any) -> list[Picture]:
        points = thinned([(float(step.step), value(step)) for step in log])
        if not any(isfinite(y) for _, y in points):
            return []
        return [Lines(title, items=((up, "plain", points),), up=up, note=follow(note, shaded), **around, **more)]

    drawn = line(
        say("How much of the target was in what normalised"),
        lambda step: step.weight,
        say("weight of the target"),
        say("0 is the source itself, 1 the target alone."),
        full=(0.0, 1.0),
    )
    drawn += line(
        say("What spoke for the adapted model"),
        lambda step: step.evidence,
        say("evidence"),
        say("Above 0 the adapted model was surer where the two part, below it the source."),
        full=(-1.0, 1.0),
    )
    drawn += line(
        say("How far the stream lay from the source"),
        lambda step: step.moved,
        say("moved, first norm layers"),
        say(
            "Up to {unmoved:.2g} the guard sees no shift; from {moved:.2g} on it takes one for certain.",
            unmoved=UNMOVED,
            moved=MOVED,
        ),
    )
    drawn += _drawn_layers(log, around, shaded)
    if streamed.errors is not None:
        drawn.append(
            _drawn_errors(streamed, streamed.errors, follow(say("Means over neighbouring steps."), shaded), around)
        )
    return tuple(drawn)


def _drawn_layers(log: Sequence[Step], around: dict[str, Any], shaded: Said) -> list[Picture]:
    """The first norm layer, the last, and two between them."""
    names = list(dict.fromkeys(name for step in log for name in step.drift))
    if len(names) < 2:
        return []
    tones: tuple[Tone, ...] = ("bad", "doubt", "good", "plain")
    places = sorted({round(k * (len(names) - 1) / (len(tones) - 1)) for k in range(len(tones))})
    items = tuple(
        (names[place], tone, thinned([(float(step.step), step.drift.get(names[place], nan)) for step in log]))
        for place, tone in zip(places, tones, strict=False)
    )
    note = many(
        len(names),
        "Of {count:,} layer; later ones are measured after the earlier ones were put right.",
        "Of {count:,} layers; later ones are measured after the earlier ones were put right.",
    )
    title = say("How far single layers lay from the source")
    return [Lines(title, items=items, up=say("moved"), note=follow(note, shaded), **around)]


def _drift(log: Sequence[Step]) -> dict[str, dict[str, float]]:
    """Of every layer: the step's `moved` at first, at the most and at last."""
    found: dict[str, list[float]] = {}
    for step in log:
        for name, far in step.drift.items():
            found.setdefault(name, []).append(far)
    return {name: {"first": far[0], "largest": max(far), "last": far[-1]} for name, far in found.items()}


def _drawn_errors(streamed: Streamed, errors: Errors, note: Said, around: dict[str, Any]) -> Picture:
    first = streamed.steps - len(errors.by_step) + 1
    both: tuple[tuple[Said, Tone], ...] = ((say("the stream"), "good"), (say("the source alone"), "plain"))
    items = tuple(
        (name, tone, thinned([(float(first + k), 100 * pair[place]) for k, pair in enumerate(errors.by_step)], most=40))
        for place, (name, tone) in enumerate(both)
    )
    return Lines(say("Errors along the stream"), items=items, up=say("error, %"), note=note, **around)


def _range(steps: Sequence[Step]) -> str:
    first, last = steps[0].step, steps[-1].step
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _number(value: float) -> str:
    return f"{value:+.2f}" if isfinite(value) else "–"


def result(streamed: Streamed) -> dict[str, Any]:
    """The numbers, for machines; `log` has the last 10,000 steps."""
    errors = streamed.errors
    return {
        "method": streamed.method,
        "guarded": streamed.guarded,
        "believed": streamed.believed,
        "interrupted": streamed.interrupted,
        "samples": streamed.samples,
        "unanswered": streamed.unanswered,
        "steps": streamed.steps,
        "errors": None
        if errors is None
        else {
            "stream": errors.stream,
            "source": errors.source,
            "difference": dict(zip(("mean", "low", "high"), errors.difference, strict=True)),
            "count": errors.samples,
        },
        "phases": [
            {
                "believed": phase.believed,
                "first": phase.steps[0].step,
                "last": phase.steps[-1].step,
                "samples": phase.samples,
            }
            for phase in phases(streamed.log)
        ],
        "alarms": [{"step": step.step, "action": step.action, "why": step.why} for step in alarms(streamed.log)],
        "drift": _drift(streamed.log),
        "log": [{key: value for key, value in asdict(step).items() if key != "drift"} for step in streamed.log],
    }
