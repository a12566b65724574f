"""The tables of the suite `architectures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from renorm.bench import markdown
from renorm.bench.base import Row

__all__ = ["table"]

Parts = Mapping[str, Sequence[Row]]
Goal = tuple[bool, str]


def table(rows: Sequence[Row]) -> str:
    """What was to be reached, then each part that has rows: means over the seeds, and the least and most in brackets."""
    parts = {"sequence": _sequence, "vae": _vae, "gas": _adapted, "ecg": _adapted, "text": _texts}
    chosen = {part: [row for row in rows if row.cell["part"] == part] for part in parts}
    goals = [goal for goal in (_reading(chosen), _kept_apart(chosen), _written(chosen), *_harmless(chosen)) if goal]
    judged = "\n".join(f"- {'reached' if met else 'missed'}: {words}" for met, words in goals)
    tables = [f"## {TITLES[part]}\n\n{parts[part](found)}" for part, found in chosen.items() if found]
    return "\n".join([f"## What was to be reached\n\n{judged}\n", *tables] if goals else tables)


def _reading(rows: Parts) -> Goal | None:
    """Statistics for every step: no worse, and sooner."""
    ours, other = (
        [row.values for row in rows["sequence"] if row.cell["way"] == way and row.cell["case"] == "rows"]
        for way in ("bnlstm", "lstm")
    )
    if not ours or not other:
        return None
    error, theirs = (mean(values["error"] for values in found) for found in (ours, other))
    # a run that never got there counts as one that got there at its end
    steps, longer = (mean(v["steps_to_goal"] or v["steps"] for v in found) for found in (ours, other))
    words = f"error {error:.1f} and {theirs:.1f} %, {steps:.0f} and {longer:.0f} steps (digits by rows)"
    return error <= theirs and steps < longer, f"BNLSTM as good as nn.LSTM with fewer steps to 90 %: {words}"


def _kept_apart(rows: Parts) -> Goal | None:
    """The divergence above its bound."""
    gaps = [row.values["divergence"] - row.values["floor"] for row in rows["vae"] if row.cell["way"] == "bn"]
    if not gaps:
        return None
    # on images never seen the means have not quite the moments of the batches that the bound is about
    words = f"the least of {len(gaps)} runs lies {min(gaps):+.3f} nats from it"
    return min(gaps) >= -0.01, f"KL of the VAE with batch norm at its bound (to 0.01 nats) or above: {words}"


def _written(rows: Parts) -> Goal | None:
    """The likelihood near the best other way's that keeps the latent variable in use."""
    bounds = {way: [r.values["bound"] for r in rows["vae"] if r.cell["way"] == way] for way in OTHERS}
    if not all(bounds.values()):
        return None
    ours, best = mean(bounds["bn"]), min(mean(bounds["annealing"]), mean(bounds["free_bits"]))
    return (
        ours <= 1.02 * best,
        f"−ELBO within 2 % of the better of annealing and free bits: {100 * (ours / best - 1):+.1f} %",
    )


def _harmless(rows: Parts) -> Iterable[Goal]:
    """`check=` never more than half a point below the source; more where the sensors have moved."""
    for part, name in (("gas", "gas"), ("ecg", "heart beats"), ("text", "reviews")):
        gaps = _gaps(rows[part], "check")
        if gaps:
            lost = sum(gap < -0.5 for gap in gaps)
            words = f"with check= never more than 0.5 points below the source: {name}, {lost} of {len(gaps)} below, the worst"
            yield not lost, f"{words} {min(gaps):+.1f}"
    sixth = [r.values["accuracy"] for r in rows["gas"] if r.cell["way"] == "check" and r.cell["case"] == "6"]
    if sixth:
        yield mean(sixth) >= 75, f"gas batch 6 at 75 % or more: {mean(sixth):.1f} %"


def _gaps(rows: Sequence[Row], way: str) -> list[float]:
    """Accuracy of a way minus the source's, for every case and seed that both have."""
    known = {(_case(row), row.cell["seed"], row.cell["way"]): row.values["accuracy"] for row in rows}
    return [v - known[c, s, "source"] for (c, s, w), v in known.items() if w == way and (c, s, "source") in known]


def _case(row: Row) -> str:
    """What stands in the first column of a table of accuracies: the case, of several networks with the network's name."""
    named = dict(row.cell.factors)
    return f"{named['network']}, {named['case']}" if "network" in named else str(named["case"])


OTHERS = ("bn", "annealing", "free_bits")
TITLES = {
    "sequence": "Digits (8 × 8) read as sequences",
    "vae": "Digits written pixel by pixel from a latent variable",
    "gas": "Gas sensors: trained on batches 1 and 2, accuracy on later ones (%)",
    "ecg": "Heart beats: patients that were left out, accuracy (%)",
    "text": "Reviews: trained on books and films, accuracy on other goods (%)",
}


def _sequence(rows: Sequence[Row]) -> str:
    lines = []
    for (reading, way), found in _grouped(rows, "case", "way"):
        reached = [row for row in found if row.values["steps_to_goal"]]
        steps = _spread([row.values["steps_to_goal"] for row in reached], 0)
        seconds = _spread([row.values["seconds_to_goal"] for row in reached], 1)
        pace = _spread([1000 * row.values["training_seconds"] / row.values["steps"] for row in found], 0)
        lines.append([reading, way, _values(found, "error", 1), f"{len(reached)}/{len(found)}", steps, seconds, pace])
    head = ["read by", "network", "error %", "runs at 90 %", "steps to 90 %", "processor s to 90 %", "ms a step"]
    said = "64 hidden units, the same learning rate, schedule and forget bias for both; error on 797 images never trained on.\n"
    return f"{said}\n{markdown.table(head, lines, words=2)}"


def _vae(rows: Sequence[Row]) -> str:
    names = ("reconstruction", "divergence", "floor", "bound", "information", "active")
    lines = [
        [way, *(_values(found, name, 0 if name == "active" else 2) for name in names)]
        for (way,), found in _grouped(rows, "way")
    ]
    said = (
        "Nats a digit, on 797 digits never trained on. 16 latent dimensions; active: posterior means with a variance "
        "above 0.01.\n"
    )
    head = ["way", "reconstruction", "KL", "its floor", "sum (−ELBO)", "mutual information", "active"]
    return f"{said}\n{markdown.table(head, lines)}"


def _adapted(rows: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(row.cell["way"] for row in rows))
    patients = rows[0].cell["part"] == "ecg"  # others at every seed
    cases = [""] if patients else dict.fromkeys(row.cell["case"] for row in rows)
    lines = []
    for case in cases:
        found = [
            [r.values["accuracy"] for r in rows if r.cell["way"] == way and r.cell["case"].startswith(case)]
            for way in ways
        ]
        lines.append([case or f"{max(map(len, found))} patients", *(_spread(values, 1) for values in found)])
    worst = [_gaps(rows, way) for way in ways]
    lines.append(["worst, against source", *(f"{min(gaps):+.1f}" if gaps else "–" for gaps in worst)])
    return markdown.table(["batch" if not patients else "mean of", *ways], lines)


def _texts(rows: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(row.cell["way"] for row in rows))
    lines = []
    for case in dict.fromkeys(map(_case, rows)):
        found = [[r.values["accuracy"] for r in rows if r.cell["way"] == way and _case(r) == case] for way in ways]
        lines.append([case, *(_spread(values, 1) for values in found)])
    worst = [_gaps(rows, way) for way in ways]
    lines.append(["worst, against source", *(f"{min(gaps):+.1f}" if gaps else "–" for gaps in worst)])
    said = (
        "1,500 reviews of each source, 500 measured. cnn: a batch norm that padding does not move; bilstm: batch norm at every "
        "step; transformer: layer norm, from random weights. affine: 64 labelled reviews train the norm layers alone.\n"
    )
    return f"{said}\n{markdown.table(['network and goods', *ways], lines)}"


def _grouped(rows: Sequence[Row], *factors: str) -> Iterable[tuple[tuple[str, ...], list[Row]]]:
    keys = dict.fromkeys(tuple(str(row.cell[factor]) for factor in factors) for row in rows)
    for key in keys:
        yield key, [row for row in rows if tuple(str(row.cell[factor]) for factor in factors) == key]


def _values(rows: Sequence[Row], name: str, digits: int) -> str:
    return _spread([row.values[name] for row in rows], digits)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"
