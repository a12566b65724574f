"""The tables of suite `fold`: what was folded, how far answers moved, and what it saves, beside the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from renorm.bench.base import Row
from renorm.bench.fold_models import NAMED
from renorm.bench.markdown import table as markdown

__all__ = ["kind", "table"]

ABOUT = """\
Networks of timm with random weights; statistics and affine parameters are drawn (mean N(0.1, 0.4), variance U(0.5,
2), weight U(0.6, 1.4), bias U(−0.4, 0.4)), so that a wrong fold shows. Error is the largest difference of the logits
from the model's, as a share of the largest, on one random image. mmcv is its rule, each norm into the convolution
registered before it, written anew; torch.fx is `torch.fx.experimental.optimization.fuse`. A dash is a way that
raised. Where an error is above 1e-4, the model's own rounding (float32 against float64) stands beside it, and the
folds were exact to 1e-9 in float64.
"""
RIGHT = 1e-4
KINDS = {
    "pads with zeros": "a padded convolution behind it",
    "is computed in the forward": "the weight is computed",
    "is also read by": "what it reads is read elsewhere too",
    "what it reads comes from": "no layer writes what it reads",
    "it reads the model's input": "it reads the input",
    "moved": "undone: the answer moved",
    "fails without it": "undone: the forward failed",
}


def kind(why: str) -> str:
    """The few words under which the table counts a reason."""
    return next((words for part, words in KINDS.items() if part in why), "other")


def table(rows: Sequence[Row]) -> str:
    """Targets, folding by network, reasons, times."""
    answers = [row for row in rows if row.cell["part"] == "answers"]
    times = [row for row in rows if row.cell["part"] == "time"]
    parts = [ABOUT, "## Targets\n", markdown(("target", "measured", "verdict"), _targets(answers, times), words=3)]
    parts += ["## Wrong or untouched, by way\n", _ways(answers)]
    parts += ["## By network\n", _networks(answers), "## Why the others stayed\n", _reasons(answers)]
    parts += ["## Named families below 90 %, and why\n", _below(answers)]
    parts += [f"## Time of a forward, as a multiple of eager's ({TIMING})\n", _times(times)]
    profiles = [row for row in rows if row.cell["part"] == "profile"]
    parts += ["## Where ResNet-50's time goes\n", PROFILE, _profiles(profiles)] if profiles else []
    return "\n".join(parts)


PROFILE = """\
One thread, channels last, 224², shares of the forward's own processor time by torch's profiler; "times eager" is
processor time, the best of the turns. With one thread and fewer than 16 images torch runs 1 × 1 convolutions without
oneDNN (`_slow_conv2d_forward`): they take longer, so that batch norm is less of the whole, and a bias there costs a copy
of its own, which takes back part of what folding saves. `torch.jit.optimize_for_inference` folds too, and gives all
convolutions to oneDNN with the ReLU fused.
"""


def _profiles(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        v = row.values
        cells = [
            f"{100 * v[key]:.0f} %"
            for key in ("eager native_batch_norm", "folded copy_", "folded _slow_conv2d_forward")
        ]
        cells.append(f"{v['folded _slow_conv2d_forward calls']:.0f}")
        lines.append(
            [str(row.cell["images"]), *cells, *(f"{v['eager'] / v[way]:.2f}" for way in ("folded", "optimised"))]
        )
    head = ["images", "batch norm, eager", "copies, folded", "convolutions without oneDNN, folded", "how many"]
    return markdown([*head, "folded: times eager", "optimize_for_inference: times eager"], lines)


def _below(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        v = row.values
        if row.cell["on"] in NAMED and v["folded"] < 0.9 * v["norms"]:
            why = ", ".join(f"{count:.0f}: {key[4:]}" for key, count in v.items() if key.startswith("why "))
            lines.append([row.cell["on"], why, f"{v['folded']:.0f} of {v['norms']:.0f}"])
    return markdown(["network", "why the others stayed", "folded"], lines, words=2)


TIMING = "channels last, 4 images of 224²; median over turns, with the smallest and largest"


def _right(row: Row) -> bool:
    error, own = row.values["error"], row.values["own rounding"]
    return error <= RIGHT or (not math.isnan(own) and error <= 8 * own)


def _targets(answers: Sequence[Row], times: Sequence[Row]) -> list[tuple[str, str, str]]:
    lines = []
    named = [row for row in answers if row.cell["on"] in NAMED]
    if named:
        folded, norms = (sum(row.values[key] for row in named) for key in ("folded", "norms"))
        text = f"{100 * folded / norms:.1f} % of {norms:.0f} in {len(named)} networks"
        lines.append(("≥ 90 % of the batch norms of the named families", text, _verdict(folded >= 0.9 * norms)))
    if answers:
        right = sum(map(_right, answers))
        lines.append(("right on ≥ 100 families", f"{right} of {len(answers)}", _verdict(right >= 100)))
    resnet = [row for row in times if row.cell["on"] == "resnet50"]
    if resnet:
        faster = [row.values["eager"] / row.values["folded"] for row in resnet]
        lines.append(
            ("ResNet-50, channels last: ≥ 1.2 times eager", _spread(faster), _verdict(np.median(faster) >= 1.2))
        )
    return lines


def _verdict(holds: bool | np.bool) -> str:
    return "pass" if holds else "**miss**"


def _ways(rows: Sequence[Row]) -> str:
    lines = []
    for name, prefix in (("renorm", ""), ("mmcv's rule", "mmcv "), ("torch.fx", "fx ")):
        wrong = [row for row in rows if row.values[f"{prefix}error"] > RIGHT and (prefix or not _right(row))]
        failed = sum(row.values.get(f"{prefix}failed", 0.0) for row in rows)
        folded, norms = sum(row.values[f"{prefix}folded"] for row in rows), sum(row.values["norms"] for row in rows)
        share = f"{100 * folded / norms:.1f} %" if norms else ""
        lines.append([name, share, str(len(wrong)), f"{failed:.0f}", f"{len(rows)}"])
    return markdown(["way", "norms removed", "networks with wrong answers", "networks it failed on", "networks"], lines)


def _networks(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        v = row.values
        error = f"{v['error']:.0e}" + ("" if math.isnan(v["own rounding"]) else f" (own {v['own rounding']:.0e})")
        peers = [
            "–" if v[f"{peer} failed"] else f"{v[f'{peer} folded']:.0f}, {_told(v[f'{peer} error'])}"
            for peer in ("mmcv", "fx")
        ]
        lines.append([row.cell["on"], f"{v['norms']:.0f}", f"{v['folded']:.0f}", error, f"{v['seconds']:.1f}", *peers])
    head = ["network", "norms", "folded", "error", "seconds", "mmcv's rule: removed, error", "torch.fx: removed, error"]
    return markdown(head, lines)


def _told(error: float) -> str:
    return f"**{error:.0e}**" if error > RIGHT else f"{error:.0e}"


def _reasons(rows: Sequence[Row]) -> str:
    counts: dict[str, float] = {}
    for row in rows:
        for key, value in row.values.items():
            if key.startswith("why "):
                counts[key[4:]] = counts.get(key[4:], 0.0) + value
    return markdown(["reason", "norms"], [[k, f"{n:.0f}"] for k, n in sorted(counts.items(), key=lambda c: -c[1])])


def _times(rows: Sequence[Row]) -> str:
    names = ("folded", "fx", "compiled", "folded, compiled")
    lines = []
    for network in dict.fromkeys(row.cell["on"] for row in rows):
        group = [row for row in rows if row.cell["on"] == network]
        cells = []
        for name in names:
            ratios = [row.values[name] / row.values["eager"] for row in group if name in row.values]
            cells.append(_spread(ratios) if ratios else "–")
        lines.append([network, *cells])
    return markdown(["network", "folded", "torch.fx", "compiled", "folded and compiled"], lines)


def _spread(ratios: Sequence[float]) -> str:
    return f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
