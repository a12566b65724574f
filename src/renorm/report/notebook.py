"""The faces that `renorm.faces` states, for every result: shown in a notebook, as a pandas table, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

from renorm.advise import Advice
from renorm.doctor import Diagnosis
from renorm.errors import UnknownName, UsageError, require
from renorm.evaluate import Score
from renorm.faces import figure, frame, html
from renorm.recalibrate import Adaptation
from renorm.recommend import Plan
from renorm.report import adaptation as adaptations
from renorm.report import advice as settings
from renorm.report import diagnosis as diagnoses
from renorm.report import gap as gaps
from renorm.report import plan as plans
from renorm.report import score as scores
from renorm.report.base import Bars, Picture, Tone
from renorm.said import say
from renorm.shift import Shift
from renorm.verify import Gap

# ── shown ──


@html.register
def _(value: Diagnosis) -> str:
    from renorm.report.html import fragment

    return fragment(diagnoses.verdict(value), *diagnoses.blocks(value))


@html.register
def _(value: Adaptation) -> str:
    from renorm.report.html import fragment

    return fragment(adaptations.verdict(value, output=""), *adaptations.blocks(value))


@html.register
def _(value: Score) -> str:
    from renorm.report.html import fragment

    return fragment(scores.verdict(value))


@html.register
def _(value: Gap) -> str:
    from renorm.report.html import fragment

    return fragment(gaps.verdict(value), gaps.table(value))


@html.register
def _(value: Advice) -> str:
    from renorm.report.html import fragment

    return fragment(settings.verdict(value), *settings.blocks(value))


@html.register
def _(value: Plan) -> str:
    from renorm.report.html import fragment

    return fragment(plans.verdict(value), *plans.blocks(value))


# ── tables ──


@frame.register
def _(value: Diagnosis, per: str) -> Any:
    kinds = {site.name: site for site in value.sites if site.kind == "batch"}
    rules: dict[str, list[str]] = {name: [] for name in kinds}
    for finding in value.findings:
        rules.setdefault(finding.site, []).append(finding.rule)
    far = sorted(kinds, key=lambda name: -value.distances.get(name, -1.0))
    if per == "channel":
        return _channels(value.shifts, far)
    _sites_only(per)
    rows = {
        name: {
            "channels": kinds[name].channels,
            "distance": value.distances.get(name),
            **_layer(value.shifts.get(name)),
            "findings": " ".join(dict.fromkeys(rules[name])),
        }
        for name in far
    }
    return _by_site(rows)


@frame.register
def _(value: Adaptation, per: str) -> Any:
    order = [*adaptations.distances(value)]
    order += [name for name in value.shifts if name not in order]
    if per == "channel":
        return _channels(value.shifts, order)
    _sites_only(per)
    rows = {
        name: {
            **_layer(value.shifts.get(name)),
            "source_weight": value.weights.get(name),
            "visited": name not in value.unvisited,
        }
        for name in [*order, *value.unvisited]
    }
    return _by_site(rows)


@frame.register
def _(value: Score, per: str) -> Any:
    _one_row(per)
    low, high = value.interval
    row = {"metric": value.metric, "value": value.value, "low": low, "high": high}
    return _pandas().DataFrame([row | {"count": value.count, "nll": value.nll, "ece": value.ece}])


@frame.register
def _(value: Gap, per: str) -> Any:
    _one_row(per)
    return _pandas().DataFrame([gaps.result(value)])


@frame.register
def _(value: Advice, per: str) -> Any:
    _one_row(per)
    rows = {i.topic: {"choice": i.choice, "value": i.value, "unit": i.unit, "why": i.why} for i in value.items}
    return _pandas().DataFrame.from_dict(rows, orient="index").rename_axis("topic")


@frame.register
def _(value: Plan, per: str) -> Any:
    _one_row(per)
    return _pandas().DataFrame(plans.result(value)["ranking"]).set_index("name")


# ── pictures ──


@figure.register
def _(value: Diagnosis) -> Any:
    return _drawn(diagnoses.pictures(value), "diagnose was given no batches, so there is no shift to draw")


@figure.register
def _(value: Adaptation) -> Any:
    return _drawn(adaptations.pictures(value), "no site has a distance that is a number")


@figure.register
def _(value: Score) -> Any:
    found = [block for block in scores.blocks(value) if isinstance(block, Picture)]
    return _drawn(found, f"the interval of {value.metric} is not known")


@figure.register
def _(value: Gap) -> Any:
    sizes: tuple[tuple[str, float, Tone], ...] = (
        (say("mean"), value.mean_abs, "plain"),
        (say("largest"), value.max_abs, "plain"),
    )
    title = gaps.verdict(value).title
    if not isfinite(value.max_abs):
        return _drawn([], "the outputs differ by numbers that are not finite")
    return _drawn([Bars(title, items=sizes, up=say("difference of the outputs"))], "")


@figure.register
def _(value: Advice) -> Any:
    return _drawn(settings.pictures(value), "no site saw two images")


@figure.register
def _(value: Plan) -> Any:
    found = [block for block in plans.blocks(value) if isinstance(block, Picture)]
    return _drawn(found, "there are no labels to count right answers by")


# ── how ──


def _drawn(found: Sequence[Picture], why: str) -> Any:
    if not found:
        raise UsageError(f"there is nothing to plot: {why}.")
    from renorm.report import pictures

    made = pictures.figure(found)
    # a figure without pyplot shows itself in no notebook; this is all that one asks of it
    made._repr_svg_ = partial(pictures.svg, made, label=found[0].title)  # type: ignore[attr-defined, unused-ignore]
    return made


def _pandas() -> Any:
    return require("pandas", extra="tables", purpose="to_frame()")


def _by_site(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    made = _pandas().DataFrame.from_dict(rows, orient="index")
    return made.rename_axis("site")


def _layer(shift: Shift | None) -> dict[str, float | None]:
    return dict.fromkeys(Shift._fields) if shift is None else dict(shift.layer._asdict())


def _channels(shifts: Mapping[str, Shift], order: Iterable[str]) -> Any:
    pandas = _pandas()
    parts = {
        name: pandas.DataFrame({field: values.cpu().numpy() for field, values in shifts[name]._asdict().items()})
        for name in order
        if name in shifts
    }
    if not parts:
        return pandas.DataFrame(columns=list(Shift._fields))
    return pandas.concat(parts, names=["site", "channel"])


def _sites_only(per: str) -> None:
    if per not in ("", "site"):
        raise UnknownName("per= of to_frame", per, ("site", "channel"))


def _one_row(per: str) -> None:
    if per:
        raise UsageError(f"to_frame(per={per!r}) was asked of a result that is one row. Leave per= away.")
