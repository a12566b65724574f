"""`renorm demo`: the whole story on real handwriting, offline, in under a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from renorm.cli.base import Command
from renorm.said import follow, listed, say

if TYPE_CHECKING:
    from renorm.bench.story import FewClasses, Meeting
    from renorm.cli.screen import Screen
    from renorm.evaluate import Score
    from renorm.report.base import Picture, Report, Table, Tone, Words
    from renorm.shift import Shift

SHIFTS = {
    "as they are": say("as they are"),
    "low contrast": say("low contrast"),
    "fog": say("fog"),
    "blur": say("blur"),
    "inverted": say("inverted"),
}
WHEN = {"before": say("before"), "after": say("after")}


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Tell the whole story on real handwriting: train, shift, diagnose, recalibrate, undo.

    Offline, seeded, under a minute; nothing is written. The digits ship with scikit-learn.
    """

    name: ClassVar[str] = "demo"
    example: ClassVar[str] = "renorm demo"

    def run(self, screen: Screen) -> Report:
        from renorm.bench import digits, story
        from renorm.profile import profile
        from renorm.report.base import Report

        with _one_thread():
            source, target = digits.load()
            *_, model = screen.steps(digits.training(source), "training on the source", total=digits.EPOCHS)
            learnt = story.score(model, target[story.ADAPTING :])
            shifts = [shift for shift in digits.SHIFTS if shift != "as they are"]
            watched = screen.steps(shifts, "meeting shifted copies", total=len(shifts))
            met = [story.meet(model, target, shift) for shift in watched]
            known = profile(model, digits.batches(source, labelled=True))
            few = [story.few_classes(model, known, target, shift) for shift in ("as they are", "low contrast")]
        return Report(
            command=self.name,
            model="",
            data="",
            verdict=_verdict(met),
            blocks=(_source(learnt), _table(met), *_pictures(met), *_refusals(met), _undone(met), _few(few), _yours()),
            result=_result(learnt, met, few),
            origin=self.origin(),
        )


def _verdict(met: list[Meeting]) -> Words:
    from renorm.report.base import Words

    mended = [m for m in met if m.accepted]
    changes = listed(
        say("{shift} {before} → {after} %", shift=SHIFTS[m.shift], before=_error(m.before), after=_error(m.after))
        for m in mended
    )
    refused = [SHIFTS[m.shift] for m in met if not m.accepted]
    text = say(
        "Error: {changes}. Nothing but the statistics of three batch norms moved: 400 images, no training.",
        changes=changes,
    )
    if refused:
        sorry = say(
            "On {refused} digits they could not help; renorm noticed, without labels, and kept the source.",
            refused=listed(refused),
        )
        text = follow(text, sorry)
    return Words(text, "good", say("A network that met new data, mended without labels"))


def _source(learnt: Score) -> Words:
    from renorm.report.base import Words

    low, high = (100 - 100 * bound for bound in learnt.interval)
    return Words(
        say(
            "A small network learnt to read 1,000 handwritten digits. Of {count} new ones from the same hands it gets "
            "{error} % wrong (95 % interval {least:.1f} to {most:.1f} %). Then the world changes: the same digits arrive "
            "with low contrast, in fog, blurred, and inverted. Each of its batch norms still subtracts the mean and divides "
            "by the standard deviation of the old ones.",
            count=learnt.count,
            error=_error(learnt),
            least=high,
            most=low,
        ),
        title=say("The source"),
    )


def _table(met: list[Meeting]) -> Table:
    from renorm.report.base import Bar, Table, Told

    longest = max(m.distance for m in met)
    rows = tuple(
        (
            SHIFTS[m.shift],
            Bar(m.distance / longest, f"{m.distance:.2f}"),
            m.site,
            _error(m.before),
            _error(m.tried),
            _interval(m.tried),
            Told(say("yes"), "good") if m.accepted else Told(say("no"), "doubt"),
        )
        for m in met
    )
    columns = (say("target"), say("worst shift"), say("at"), say("before %"), say("after %"), say("95 % interval"))
    return Table(
        say("What the doctor sees, and the error before and after recalibration"),
        (*columns, say("kept")),
        rows,
        note=say(
            "Shift in source standard deviations. Errors on {count} digits that recalibration never saw.",
            count=met[0].before.count,
        ),
    )


def _pictures(met: list[Meeting]) -> tuple[Picture, ...]:
    from renorm.report import shifts
    from renorm.report.base import Spans

    points: list[tuple[str, str, float, float, float, Tone]] = []
    for m in met:
        for name, score, tone in (("before", m.before, "plain"), ("after", m.tried, "good" if m.accepted else "doubt")):
            low, high = (100 - 100 * bound for bound in score.interval[::-1])
            label = say("{shift}, {when}", shift=SHIFTS[m.shift], when=WHEN[name])
            points.append((label, f"{_error(score)} %", 100 - 100 * score.value, low, high, cast("Tone", tone)))
    errors = Spans(
        say("The error before and after, with its 95 % interval"),
        items=tuple(points),
        full=(0, 100),
        across=say("error, %"),
        note=say(
            "Green was kept; where renorm kept the source instead, amber shows what recalibration would have cost."
        ),
    )
    far: dict[str, float] = {}
    moved: dict[str, Shift] = {}
    for m in met:
        for site, shift in m.diagnosis.shifts.items():
            strip = say("{shift}, {site}", shift=SHIFTS[m.shift], site=site)
            far[strip], moved[strip] = m.diagnosis.distances[site], shift
    return errors, shifts.channels(far, moved, title=say("Which channels of the three layers moved, target by target"))


def _refusals(met: list[Meeting]) -> Iterator[Words]:
    from renorm.report.base import Words

    for m in met:
        if not m.accepted:
            yield Words(
                say(
                    "Its answers before and after were compared, without labels: {why}. So the values are not merely "
                    "shifted, the features do not match: what the network learnt to look for, bright strokes on dark paper, "
                    "is not in these images, and no mean or variance puts it there. A shift is mended by statistics; a "
                    "mismatch takes labels and fine-tuning, or images turned back.",
                    why=m.why,
                ),
                "doubt",
                say("Why {shift} digits were left to the source: shift or mismatched features?", shift=SHIFTS[m.shift]),
            )


def _undone(met: list[Meeting]) -> Words:
    from renorm.report.base import Words

    if all(m.exact for m in met):
        return Words(
            say(
                "After each target the change was undone: every tensor of the network, and every output, was compared "
                "bit for bit with what it was before."
            ),
            "good",
            say("Undone exactly"),
        )
    wrong = listed(SHIFTS[m.shift] for m in met if not m.exact)
    text = say("After {wrong} the network was not what it was before. Please report this.", wrong=wrong)
    return Words(text, "bad", say("The undo failed"))


def _few(few: list[FewClasses]) -> Table:
    from renorm.bench.story import FEW
    from renorm.report.base import Table, Told

    rows = []
    for each in few:
        harmed = each.plain.value < each.source.value
        plain = Told(_error(each.plain), "bad" if harmed else "plain")
        rows.append((SHIFTS[each.shift], _error(each.source), plain, Told(_error(each.profiled), "good")))
    return Table(
        say("When only the digits {some} and {last} are there: error %", some=listed(map(str, FEW[:-1])), last=FEW[-1]),
        (say("target"), say("source"), say("plain re-estimation"), say("with a source profile")),
        tuple(rows),
        note=say(
            "Plain re-estimation takes the missing digits for a shift. A profile of the source (renorm profile, then "
            "--source) compares both sides at the same mix of digits."
        ),
    )


def _yours() -> Words:
    from renorm.report.base import Words

    return Words(
        say("renorm doctor MODEL DATA\nrenorm recalibrate MODEL DATA --check DATA -o OUT"),
        title=say("Now yours"),
    )


def _result(learnt: Score, met: list[Meeting], few: list[FewClasses]) -> dict[str, Any]:
    from renorm.report.score import result

    return {
        "source": result(learnt),
        "targets": {
            m.shift: {
                "worst_site": m.site,
                "distance": m.distance,
                "before": result(m.before),
                "tried": result(m.tried),
                "after": result(m.after),
                "accepted": m.accepted,
                "why": m.why,
                "undo_exact": m.exact,
            }
            for m in met
        },
        "few_classes": {
            each.shift: {
                "source": result(each.source),
                "plain": result(each.plain),
                "profiled": result(each.profiled),
            }
            for each in few
        },
    }


def _error(score: Score) -> str:
    return f"{100 - 100 * score.value:.1f}"


def _interval(score: Score) -> str:
    low, high = score.interval
    return say("{low:.1f} to {high:.1f}", low=100 - 100 * high, high=100 - 100 * low)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Images of 8 × 8 pixels are so small that handing them to a second thread costs more than it saves."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
