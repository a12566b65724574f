"""How far layers and their channels lie from what they hold: the pictures that diagnosis and adaptation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite

from renorm.report.base import Bars, Heat, Picture, Tone
from renorm.rules.data_shift import DataShift
from renorm.said import Said, say
from renorm.shift import Shift

WORST = say("Which channels moved, worst site first")
STRIPS = 16  # sites in the picture of channels: the worst, and still one screen of a phone


def name(site: str) -> str:
    """A site's name, in words for the model that is itself a norm layer."""
    return site or say("the model itself")


def pictures(
    distances: Mapping[str, float],
    shifts: Mapping[str, Shift],
    *,
    order: Sequence[str],
    title: Said,
    tones: Mapping[str, Tone] | None = None,
) -> tuple[Picture, ...]:
    """A bar per layer along the depth of the model, and a strip of channels for each of the worst sites.

    `distances` come worst first; `order` has the sites in the model's order; `tones` are the doctor's. None for distances
    that were not measured while the model runs as deployed: the doctor's limits are not for those, and are not drawn.
    """
    if not distances:
        return ()
    deep = [site for site in order if site in distances]
    bars = Bars(
        title,
        items=tuple((name(site), distances[site], "plain" if tones is None else tones[site]) for site in deep),
        limits=((DataShift.limit, "doubt"), (DataShift.error, "bad")) if tones else (),
        across=say("norm layers, first to last"),
        up=say("distance, source sd"),
        note=say(
            "One bar for each batch norm. Up to the lower line ({limit:.2g}) is what models show on fresh data of their own "
            "kind; above the upper one ({error:.2g}), models lost 30 points of accuracy and more.",
            limit=DataShift.limit,
            error=DataShift.error,
        )
        if tones
        else say(
            "One bar for each batch norm, measured while the layers before it are already mended: so it is less than what "
            "the doctor sees, where every layer hands its shift on to the next."
        ),
    )
    return bars, channels(distances, shifts)


def channels(distances: Mapping[str, float], shifts: Mapping[str, Shift], *, title: Said = WORST) -> Heat:
    """Every channel of the first sites in `distances`."""
    worst = {site: _finite(shifts[site].wasserstein2.tolist()) for site in list(distances)[:STRIPS]}
    # nine channels in ten keep their shade, however far the rest are out
    every = sorted(value for values in worst.values() for value in values)
    top = float(f"{max(2 * DataShift.error, every[int(0.9 * len(every))] if every else 0.0):.1g}")
    rows = [(name(site), f"{distances[site]:.2f}", tuple(values)) for site, values in worst.items()]
    return Heat(
        title,
        rows=tuple(rows),
        top=top,
        across=say("channels of the layer, farthest first"),
        up=say("distance of a channel, source sd"),
        note=say(
            "One strip for each site, with its distance; one shade for each channel, farthest on the left. A strip coloured "
            "all along is a layer that moved as a whole; one coloured at its left end, a few channels. Full colour from "
            "{top:.2g} source sd on.",
            top=top,
        ),
    )


def _finite(values: list[float]) -> list[float]:
    """Largest first; what is no number counts as 0, what is infinite as the largest that is not."""
    known = [value for value in values if isfinite(value)]
    most = max(known, default=0.0)
    return sorted((v if isfinite(v) else most * (v == inf) for v in values), reverse=True)
