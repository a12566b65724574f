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
    parts = {
        "sequence": _sequence,
        "recurrent": _adapted,
        "vae": _vae,
        "encoder": _encoder,
        "gas": _adapted,
        "ecg": _adapted,
        "text": _texts,
        "columns": _columns,
    }
    chosen = {part: [row for row in rows if row.cell["part"] == part] for part in parts}
    readings = [_reading(chosen, reading) for reading in ("rows", "pixels", "mnist rows")]
    known = (*readings, _kept_apart(chosen), _written(chosen), *_harmless(chosen), _unblamed(chosen))
    goals = [goal for goal in known if goal]
    judged = "\n".join(f"- {'reached' if met else 'missed'}: {words}" for met, words in goals)
    tables = [f"## {TITLES[part]}\n\n{parts[part](found)}" for part, found in chosen.items() if found]
    return "\n".join([f"## What was to be reached\n\n{judged}\n", *tables] if goals else tables)


def _reading(rows: Parts, reading: str) -> Goal | None:
    """Statistics for every step: no worse, and sooner."""
    mine, others = (
        {r.cell["seed"]: r.values for r in rows["sequence"] if r.cell["way"] == way and r.cell["case"] == reading}
        for way in ("bnlstm", "lstm")
    )
    both = sorted(mine.keys() & others.keys())
    ours, other = ([found[seed] for seed in both] for found in (mine, others))
    if not ours or not other:
        return None
    error, theirs = (mean(values["error"] for values in found) for found in (ours, other))
    # a run that never got there counts as one that got there at its end
    steps, longer = (mean(v["steps_to_goal"] or v["steps"] for v in found) for found in (ours, other))
    words = f"error {error:.1f} and {theirs:.1f} %, {steps:.0f} and {longer:.0f} steps ({TASKS[reading]})"
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
    named = (("gas", "gas"), ("ecg", "heart beats"), ("text", "reviews"), ("recurrent", "digits by rows, shifted"))
    for part, name in named:
        gaps = _gaps(rows[part], "check")
        if gaps:
            lost = sum(gap < -0.5 for gap in gaps)
            words = f"with check= never more than 0.5 points below the source: {name}, {lost} of {len(gaps)} below, the worst"
            yield not lost, f"{words} {min(gaps):+.1f}"
    sixth = [r.values["accuracy"] for r in rows["gas"] if r.cell["way"] == "check" and r.cell["case"] == "6"]
    if sixth:
        yield mean(sixth) >= 75, f"gas batch 6 at 75 % or more: {mean(sixth):.1f} %"


def _unblamed(rows: Parts) -> Goal | None:
    """Sensors that have aged and no more: no column is said to be wrong."""
    later = [r.values for r in rows["columns"] if r.cell["way"] == "nothing" and r.cell["case"] != "2"]
    if not later:
        return None
    wrong = sum(values["errors"] for values in later)
    words = f"{wrong:.0f} of {sum(values['tried'] for values in later):.0f} tables with an error"
    return not wrong, f"no column of batches 3 to 6 as they are is called wrong: {words}"


def _gaps(rows: Sequence[Row], way: str) -> list[float]:
    """Accuracy of a way minus the source's, for every case and seed that both have."""
    known = {(_case(row), row.cell["seed"], row.cell["way"]): row.values["accuracy"] for row in rows}
    return [v - known[c, s, "source"] for (c, s, w), v in known.items() if w == way and (c, s, "source") in known]


def _case(row: Row) -> str:
    """What stands in the first column of a table of accuracies: the case, of several networks with the network's name."""
    named = dict(row.cell.factors)
    return f"{named['network']}, {named['case']}" if "network" in named else str(named["case"])


TASKS = {"rows": "digits by rows", "pixels": "digits pixel by pixel", "mnist rows": "MNIST by rows"}
OTHERS = ("bn", "annealing", "free_bits")
TITLES = {
    "sequence": "Digits read as sequences",
    "recurrent": "Digits by rows under a shift, BNLSTM trained without: accuracy (%)",
    "vae": "Digits written pixel by pixel from a latent variable",
    "encoder": "An image VAE with ordinary batch norm, its encoder recalibrated to other images",
    "gas": "Gas sensors: trained on batches 1 and 2, accuracy on later ones (%)",
    "ecg": "Heart beats: patients that were left out, accuracy (%)",
    "text": "Reviews: trained on books and films, accuracy on other goods (%)",
    "columns": "Mistakes in the columns of gas sensors, known from batches 1 and 2",
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
    said = (
        "64 hidden units, the same steps, schedule, clipping and forget bias for both; error on 797 digits (MNIST: 2,000) "
        "never trained on. By rows of 8 × 8 the rate is 0.003 for both. In the longer two each has the best of four settings "
        "by its error on seed 0, rates of 0.01 and 0.02, with and without identity and noise at the start: 0.01 (pixels) and "
        "0.02 (MNIST) without for nn.LSTM, 0.02 with for BNLSTM.\n"
    )
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
    head = {"ecg": "mean of", "gas": "batch"}.get(rows[0].cell["part"], "digits")
    said = {
        "gas": f"affine: the norm layers trained on 64 labelled rows, measured on the others{_through(rows)}\n\n",
        "recurrent": "stream: answered in batches of 50 while learning from them (shrink, with a profile and the guard).\n\n",
    }
    return said.get(rows[0].cell["part"], "") + markdown.table([head, *ways], lines)


def _through(rows: Sequence[Row]) -> str:
    """What an adapter's file of the trained norm layers takes, and whether it gave the same answers."""
    kept = [row.values for row in rows if "adapter_same" in row.values]
    if not kept:
        return "."
    same = sum(values["adapter_same"] for values in kept)
    sizes = _spread([values["adapter_bytes"] / 1000 for values in kept], 1)
    return f"; saved as an adapter ({sizes} kB) and loaded into the source: {same:.0f} of {len(kept)} answer the same."


def _encoder(rows: Sequence[Row]) -> str:
    lines = [
        [case, way, *(_values(found, name, 2) for name in ("reconstruction", "divergence", "bound"))]
        for (case, way), found in _grouped(rows, "case", "way")
    ]
    said = (
        "Nats a digit, of the digit as it is, on 797 digits never trained on; unshifted: the same digits without the shift. "
        "Only the encoder is recalibrated, without labels.\n"
    )
    head = ["shift", "way", "reconstruction", "KL", "sum (−ELBO)"]
    return f"{said}\n{markdown.table(head, lines, words=2)}"


def _columns(rows: Sequence[Row]) -> str:
    cases = list(dict.fromkeys(str(row.cell["case"]) for row in rows))
    lines = []
    for (known, way), found in _grouped(rows, "known", "way"):
        cells = []
        for case in cases:
            met = [row.values for row in found if row.cell["case"] == case]
            total = {
                name: sum(values.get(name, 0) for values in met)
                for name in ("tried", "found", "named", "errors", "warnings")
            }
            if not met:
                cells.append("–")
            elif way.startswith("nothing"):
                cells.append(f"{total['errors']:.0f} and {total['warnings']:.0f} of {total['tried']:.0f}")
            else:
                blamed = f", {total['errors'] + total['warnings']:.0f}" if total["errors"] + total["warnings"] else ""
                cells.append(f"{_share(total, 'found')} / {_share(total, 'named')}{blamed}")
        lines.append([known, way, *cells])
    said = (
        "256 rows of each batch; one column in four spoilt, one at a time: found / named (%), then how often another was "
        "blamed, where it was. Nothing planted: tables with an error and with a warning only, of all; one gas: the rows of a "
        "batch in which one gas alone was measured. Batch 2 was trained on, by other rows. Known by: tenths, as a checkpoint "
        "of renorm records them, or mean and sd, as a first batch norm holds them.\n"
    )
    return f"{said}\n{markdown.table(['known by', 'planted', *(f'batch {case}' for case in cases)], lines, words=2)}"


def _share(total: Mapping[str, float], name: str) -> str:
    return f"{100 * total[name] / total['tried']:.0f}"


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
        "step; transformer: layer norm, from random weights. affine: 64 labelled reviews train the norm layers alone"
    )
    return f"{said}{_through(rows)}\n\n{markdown.table(['network and goods', *ways], lines)}"


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
