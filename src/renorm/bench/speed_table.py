"""The tables of suite `speed`: ratios of times with their spread, and the targets beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from renorm.bench.base import Row
from renorm.bench.intervals import paired
from renorm.bench.markdown import table as markdown

__all__ = ["table"]

ABOUT = """\
Times are ratios within one cell, whose ways take turns on the same images; a ratio is given as its median over the
cells with the smallest and the largest. ResNets have random weights and see 96 random images of 224² in batches of
32. Ours off is `prior=0`, where certainty decides nothing; on is the same with a tolerance that is never reached, so
that certainty is judged after every batch; auto is the default. A miss is left standing.
"""
HEAD = ("target", "measured", "verdict")


def table(rows: Sequence[Row]) -> str:
    """Targets, times at equal images, stopping when tight, cheaper arithmetic."""
    targets = [*_equal_targets(rows), *_stopping_targets(rows), *_stream_targets(rows), *_recurrent_targets(rows)]
    parts = [ABOUT, "## Targets\n", markdown(HEAD, targets, words=3)]
    parts += ["## Equal images: time as a multiple of the faster peer's\n", _equal(rows)]
    parts += ["## 4,000 CIFAR images: stopping when tight, ResNet-20, mean over shifts and seeds\n", _stopping(rows)]
    parts += ["## A stream: time as a multiple of plain inference's, ResNet-20\n", _streams(rows)]
    parts += [
        "## A training step of a recurrent network with batch norm: the loop's time over ours\n",
        _recurrent(rows),
    ]
    parts += ["## Cheaper arithmetic\n", _cheaper(rows)]
    return "\n".join(parts)


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row.cell["part"] == part]


def _on(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell["on"], []).append(row)
    return groups


def _faster_peer(rows: Sequence[Row]) -> str:
    return min(("update_bn", "fvcore"), key=lambda peer: float(np.median([row.values[peer] for row in rows])))


def _ratios(rows: Sequence[Row], way: str, other: str) -> list[float]:
    return [row.values[way] / row.values[other] for row in rows]


def _spread(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _verdict(holds: bool) -> str:
    return "pass" if holds else "**miss**"


def _equal_targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    lines = []
    for network, group in _on(_of(rows, "equal images")).items():
        peer = _faster_peer(group)
        for way, name, most in (("ours_off", "off", 1.0), ("ours_on", "on", 1.1)):
            ratios = _ratios(group, way, peer)
            target = f"{network}, certainty {name}: at most {most} times the faster peer"
            holds = bool(np.median(ratios) <= most)
            lines.append((target, f"{_spread(ratios)} against {peer}, {len(ratios)} turns", _verdict(holds)))
    return lines


def _equal(rows: Sequence[Row]) -> str:
    lines = []
    for network, group in _on(_of(rows, "equal images")).items():
        peer = _faster_peer(group)
        lines.append([network, *(_spread(_ratios(group, way, peer)) for way in group[0].values if way in WAYS)])
    return markdown(["network", *WAYS.values()], lines)


WAYS = {
    "update_bn": "torch `update_bn`",
    "fvcore": "fvcore `update_bn_stats`",
    "ours_off": "ours off",
    "ours_on": "ours on",
    "ours_auto": "ours auto",
}


def _stopping_targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    group = _of(rows, "equal error")
    lines = []
    for name in _tolerances(group):
        faster = _ratios_named(group, "update_bn seconds", f"{name} seconds")
        gap = paired([row.values[f"{name} error"] - row.values["update_bn error"] for row in group])
        target = f"tolerance {name}: 8 times as fast as update_bn on all, error at most 0.3 points higher"
        holds = bool(np.median(faster) >= 8 and gap.mean <= 0.3)
        lines.append((target, f"{_spread(faster)} times; {gap.text(2)} points", _verdict(holds)))
    return lines


def _stopping(rows: Sequence[Row]) -> str:
    group = _of(rows, "equal error")
    lines = []
    for name in ("update_bn", *_tolerances(group)) if group else ():
        label = WAYS.get(name, f"ours, `tolerance={name}`")
        images = [row.values[f"{name} images"] for row in group]
        error = np.mean([row.values[f"{name} error"] for row in group])
        faster = _ratios_named(group, "update_bn seconds", f"{name} seconds")
        lines.append(
            [label, f"{np.mean(images):.0f} ({min(images):.0f}–{max(images):.0f})", _spread(faster), f"{error:.2f}"]
        )
    return markdown(["way", "images read", "times as fast", "error in %"], lines)


def _tolerances(rows: Sequence[Row]) -> list[str]:
    names = [name.removesuffix(" error") for name in rows[0].values if name.endswith(" error")] if rows else []
    return [name for name in names if name != "update_bn"]


def _ratios_named(rows: Sequence[Row], top: str, bottom: str) -> list[float]:
    return [row.values[top] / row.values[bottom] for row in rows]


STREAMS = {"shrink": ("`shrink` alone", 1.15), "guarded": ("`shrink` under its guard", 1.3)}
SINGLE = 1.3  # at most, of `shrink` alone on single images


def _stream_targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """After the 2,048 images of a stream that are all measured."""
    lines = []
    for size, group in _on(_of(rows, "stream")).items():
        for way, (name, most) in STREAMS.items():
            single = size.endswith(" 1")
            if single and way == "guarded":
                continue
            most = SINGLE if single else most
            ratios = _ratios_named(group, f"{way} later", "plain later")
            holds = bool(np.median(ratios) <= most)
            lines.append((f"{name}, {size}: at most {most} times plain inference", _spread(ratios), _verdict(holds)))
    return lines


def _streams(rows: Sequence[Row]) -> str:
    lines = []
    for size, group in _on(_of(rows, "stream")).items():
        for way, (name, _) in STREAMS.items():
            ratios = (_ratios_named(group, f"{way} {when}", f"plain {when}") for when in ("first", "later"))
            lines.append([size, name, *map(_spread, ratios)])
    return markdown(["stream", "way", "first 2,048 images", "1,024 more"], lines, words=2)


EAGER, COMPILED = 1.4, 3.0  # times as fast as a loop of modules, at least


def _recurrent_targets(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    lines = []
    for part, way, least in (("recurrent", "ours", EAGER), ("recurrent, compiled", "compiled", COMPILED)):
        for shape, group in _on(_of(rows, part)).items():
            ratios = _ratios_named(group, "loop", way)
            name = "`BNLSTM`" if way == "ours" else "`BNLSTM` under torch.compile"
            target = f"{name}, {shape}: at least {least} times as fast as a loop of modules"
            lines.append((target, f"{_spread(ratios)}{_warm_up(group)}", _verdict(bool(np.median(ratios) >= least))))
    return lines


def _warm_up(rows: Sequence[Row]) -> str:
    seconds = [row.values["warm_up"] for row in rows if "warm_up" in row.values]
    return f", after {np.median(seconds):.0f} s" if seconds else ""


def _recurrent(rows: Sequence[Row]) -> str:
    lines = []
    for shape, group in _on(_of(rows, "recurrent")).items():
        taken = np.median([1000 * row.values["loop"] for row in group])
        ratios = (_spread(_ratios_named(group, "loop", way)) for way in ("ours", "lstm"))
        lines.append([shape, f"{taken:.0f}", *ratios])
    said = (
        "Forward and backward, processor time, one thread. The loop has two linear layers and three batch norms of torch's at "
        "every step, as published implementations do; 50 samples and 64 hidden units where nothing else is said. nn.LSTM has "
        "no batch norm.\n"
    )
    return f"{said}\n{markdown(['sequence', 'loop, ms', '`BNLSTM`', 'nn.LSTM'], lines)}"


def _cheaper(rows: Sequence[Row]) -> str:
    times, errors = _on(_of(rows, "cheaper")), _of(rows, "cheaper error")
    names = [*next(iter(times.values()))[0].values] if times else []
    lines = []
    for name in sorted(names, key=["float32", "channels_last", "bfloat16", "both"].index):
        gaps = [row.values[name] - row.values["float32"] for row in errors]
        cost = paired(gaps).text(2) if gaps else "–"
        lines.append([name, *(_spread(_ratios(group, "float32", name)) for group in times.values()), cost])
    head = ["arithmetic", *(f"{network}: times as fast" for network in times)]
    return markdown([*head, "ResNet-20: error against float32, points"], lines)
