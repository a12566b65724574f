"""Which batch norm and which settings fit: the number behind each, the sample curve, and the timings."""

from __future__ import annotations

from typing import Any

from renorm.advise import NOISY, STABLE, Advice, Item
from renorm.curve import Curve
from renorm.report.base import Bar, Block, Curves, Picture, Table, Words, plainly
from renorm.report.shifts import name as site_name
from renorm.said import Said, follow, many, say
from renorm.timing import Timings


def verdict(advice: Advice) -> Words:
    """The one thing to know: whether to stay with batch norm, or else its kind."""
    first = _first(advice)
    title = say("{topic} {choice}", topic=first.topic.capitalised(), choice=first.choice)
    samples = many(advice.samples, "{count:,} sample", "{count:,} samples")
    value = plainly(first.value, 3)
    measured = say("Measured on {samples}: {value} {unit}.", samples=samples, value=value, unit=first.unit)
    return Words(follow(first.why, measured), "good", title)


def blocks(advice: Advice) -> tuple[Block, ...]:
    """A paragraph for each other setting, the curve as picture and table, the timings."""
    parts: list[Block] = [
        Words(
            say("{why}\n{measured}", why=item.why, measured=_measured(item)),
            "plain",
            say("{topic}: {choice}", topic=item.topic.capitalised(), choice=item.choice),
        )
        for item in advice.items
        if item is not _first(advice)
    ]
    if advice.curve is not None:
        parts += [*pictures(advice), _curve(advice.curve)]
    if advice.timings is not None:
        parts.append(_timings(advice.timings))
    return tuple(parts)


def _first(advice: Advice) -> Item:
    return next((item for item in advice.items if item.topic == "stay with batch norm?"), advice.items[0])


def _measured(item: Item) -> Said:
    return say("Measured: {value} {unit}.", value=plainly(item.value, 3), unit=item.unit)


def pictures(advice: Advice) -> tuple[Picture, ...]:
    """The sample curve; none where nothing was measured of it."""
    found = advice.curve
    if found is None:
        return ()
    top = max(found.images, found.needed(STABLE)) * 2
    counts = [2.0]
    while counts[-1] < top:
        counts.append(min(counts[-1] * 2, float(top)))
    series = [(say("independent images"), tuple((n, found.error(n)) for n in counts), "plain")]
    if found.halves:
        series.append((say("as measured, by halves"), tuple((float(n), error) for n, error in found.halves), "good"))
    return (
        Curves(
            say("How certain an estimate is, by how many images"),
            series=tuple(series),  # type: ignore[arg-type, unused-ignore]
            limits=((NOISY, "bad"), (STABLE, "doubt")),
            across=say("images"),
            up=say("standard error, source sd"),
            note=say(
                "At the least certain site. Above the upper line a batch's own mean is mostly chance; below the lower one "
                "statistics are stable. Points far above the line: the batches are ordered, or come in clusters."
            ),
        ),
    )


def result(advice: Advice) -> dict[str, Any]:
    """The numbers, for machines."""
    found, timings = advice.curve, advice.timings
    return {
        "samples": advice.samples,
        "items": [
            {"topic": str(i.topic), "choice": str(i.choice), "value": i.value, "unit": str(i.unit), "why": str(i.why)}
            for i in advice.items
        ],
        "curve": None
        if found is None
        else {
            "site": found.site,
            "single": found.single,
            "images": found.images,
            "clustered": found.clustered,
            "halves": [list(point) for point in found.halves],
            "needed": {f"{error:g}": found.needed(error) for error in (NOISY, STABLE, STABLE / 2)},
        },
        "timings": None
        if timings is None
        else {
            "seconds": dict(timings.seconds),
            "left_out": {name: str(why) for name, why in timings.left_out.items()},
            "samples": timings.samples,
            "rounds": timings.rounds,
            "first_call": dict(timings.first),
        },
    }


def _curve(found: Curve) -> Table:
    counts = [count for count in (8, 16, 32, 64, 128, 256, 512, 1024) if count <= 8 * found.images]
    measured = dict(found.halves)
    top = found.error(counts[0]) if counts else 1.0
    rows = tuple(
        (
            f"{count:,}",
            Bar(found.error(count) / top, f"{found.error(count):.3f}"),
            f"{measured[count]:.3f}" if count in measured else "",
        )
        for count in counts
    )
    return Table(
        say("Standard error of the mean at {site}, in source standard deviations", site=site_name(found.site)),
        (say("images"), say("independent images"), say("as measured, by halves")),
        rows,
    )


def _timings(timings: Timings) -> Table:
    slowest = max(timings.seconds.values())
    drawn = sorted(timings.seconds.items(), key=lambda item: item[1])
    rows = tuple((name, Bar(seconds / slowest, f"{1000 * seconds:.1f}")) for name, seconds in drawn)
    told = [say("{name}: {why}.", name=name, why=why) for name, why in timings.left_out.items()]
    if "compiled" in timings.first:
        told.append(say("compiled: its first call took {seconds:.0f} s.", seconds=timings.first["compiled"]))
    note = follow(*told)
    return Table(
        say("Milliseconds for {samples} samples, by way of running the model", samples=timings.samples),
        (say("way"), say("ms")),
        rows,
        note=note,
    )
