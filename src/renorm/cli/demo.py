"""`renorm demo`: the whole story on real handwriting, offline, in under a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from renorm.cli.base import Command

if TYPE_CHECKING:
    from renorm.bench.story import FewClasses, Meeting
    from renorm.cli.screen import Screen
    from renorm.evaluate import Score
    from renorm.report.base import Report, Table, Words


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
            blocks=(_source(learnt), _table(met), *_refusals(met), _undone(met), _few(few), _yours()),
            result=_result(learnt, met, few),
        )


def _verdict(met: list[Meeting]) -> Words:
    from renorm.report.base import Words

    mended = [m for m in met if m.accepted]
    changes = ", ".join(f"{m.shift} {_error(m.before)} → {_error(m.after)} %" for m in mended)
    refused = ", ".join(m.shift for m in met if not m.accepted)
    text = f"Error: {changes}. Nothing but the statistics of three batch norms moved: 400 images, no training."
    if refused:
        text += f" On {refused} digits they could not help; renorm noticed, without labels, and kept the source."
    return Words(
        text,
        "good",
        "A network that met new data, mended without labels",
    )


def _source(learnt: Score) -> Words:
    from renorm.report.base import Words

    low, high = (100 - 100 * bound for bound in learnt.interval)
    return Words(
        f"A small network learnt to read 1,000 handwritten digits. Of {learnt.count} new ones from the same hands it gets "
        f"{_error(learnt)} % wrong (95 % interval {high:.1f} to {low:.1f} %). Then the world changes: the same digits arrive "
        "with low contrast, in fog, blurred, and inverted. Each of its batch norms still subtracts the mean and divides by "
        "the standard deviation of the old ones.",
        title="The source",
    )


def _table(met: list[Meeting]) -> Table:
    from renorm.report.base import Bar, Table, Told

    longest = max(m.distance for m in met)
    rows = tuple(
        (
            m.shift,
            Bar(m.distance / longest, f"{m.distance:.2f}"),
            m.site,
            _error(m.before),
            _error(m.tried),
            _interval(m.tried),
            Told("yes", "good") if m.accepted else Told("no", "doubt"),
        )
        for m in met
    )
    return Table(
        "What the doctor sees, and the error before and after recalibration",
        ("target", "worst shift", "at", "before %", "after %", "95 % interval", "kept"),
        rows,
        note=f"Shift in source standard deviations. Errors on {met[0].before.count} digits that recalibration never saw.",
    )


def _refusals(met: list[Meeting]) -> Iterator[Words]:
    from renorm.report.base import Words

    for m in met:
        if not m.accepted:
            why = f"Its answers before and after were compared, without labels: {m.why.rstrip('.')}."
            yield Words(
                f"{why} So the values are not merely shifted, the features do not match: what "
                "the network learnt to look for, bright strokes on dark paper, is not in these images, and no mean or "
                "variance puts it there. A shift is mended by statistics; a mismatch takes labels and fine-tuning, or "
                "images turned back.",
                "doubt",
                f"Why {m.shift} digits were left to the source: shift or mismatched features?",
            )


def _undone(met: list[Meeting]) -> Words:
    from renorm.report.base import Words

    if all(m.exact for m in met):
        return Words(
            "After each target the change was undone: every tensor of the network, and every output, was compared "
            "bit for bit with what it was before.",
            "good",
            "Undone exactly",
        )
    wrong = ", ".join(m.shift for m in met if not m.exact)
    return Words(f"After {wrong} the network was not what it was before. Please report this.", "bad", "The undo failed")


def _few(few: list[FewClasses]) -> Table:
    from renorm.bench.story import FEW
    from renorm.report.base import Table, Told

    rows = []
    for each in few:
        harmed = each.plain.value < each.source.value
        plain = Told(_error(each.plain), "bad" if harmed else "plain")
        rows.append((each.shift, _error(each.source), plain, Told(_error(each.profiled), "good")))
    present = ", ".join(map(str, FEW[:-1])) + f" and {FEW[-1]}"
    return Table(
        f"When only the digits {present} are there: error %",
        ("target", "source", "plain re-estimation", "with a source profile"),
        tuple(rows),
        note="Plain re-estimation takes the missing digits for a shift. A profile of the source (renorm profile, then "
        "--source) compares both sides at the same mix of digits.",
    )


def _yours() -> Words:
    from renorm.report.base import Words

    return Words(
        "renorm doctor MODEL DATA\nrenorm recalibrate MODEL DATA --check DATA -o OUT",
        title="Now yours",
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
    return f"{100 - 100 * high:.1f} to {100 - 100 * low:.1f}"


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
