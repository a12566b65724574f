"""The table of suite `breadth`: one line per family, and above it whether any is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from renorm.bench.base import Row
from renorm.bench.markdown import table as markdown

__all__ = ["MEASURED", "NORMALISED", "table", "wrong"]

# Largest difference from the float64 twin, in standard deviations: what `observe.measure` promises.
MEASURED = {"running": 1e-6, "by batch": 1e-5}
NORMALISED = 2e-4  # largest relative difference of a layer's output: float32 arithmetic where a channel hardly varies

ABOUT = """\
One line per family of timm: the letters that its models' names begin with, in the file that defines them. The member is the
one with the fewest parameters, the image the smallest square of 64 pixels or more that it takes; its weights are random. Five
random images in two batches.

- **sites**: batch norms are compared with the modules that hold a running mean, their channels too; other norm layers with the
  names of the classes. **No kind** counts modules with parameters whose class is called a norm and that is none of batch,
  layer, group, instance or rms norm, such as ConvNeXt's global response norm; renorm leaves them alone.
- **observe**: the largest difference from float64 moments of the inputs that plain forward hooks kept, in standard deviations
  of the values, for `under="running"` (hooks in a run of their own) and `under="batch"`; and for the latter the largest
  relative difference of any layer's output from float64 batch norm in training mode.
- **undo**: tensors, modes and hooks that differ after `recalibrate_(prior=0)` and `restore_()`, and after a loader that fails
  midway; every batch norm that was reached must have been changed in between. A model without batch norm must be refused.
"""


def wrong(row: Row) -> list[str]:
    """What is wrong with a family, in words; empty where nothing is."""
    v = row.values
    found = [name for name in ("missed", "invented", "unseen", "not undone", "not kept") if v[name]]
    found += [f"observe {under}" for under, most in MEASURED.items() if v[under] > most]
    found += ["normalisation"] if v["output"] > NORMALISED else []
    found += ["not changed"] if v["changed"] != v["batch"] - v["unvisited"] else []
    return found + (["refused"] if bool(v["refused"]) != (v["batch"] == 0) else [])


def table(rows: Sequence[Row], *, left_out: int) -> str:
    """How many are wrong, then every family."""
    bad = [row for row in rows if wrong(row)]
    sites = sum(int(row.values["batch"] + row.values["other"]) for row in rows)
    verdict = (
        f"**{len(rows)} families, {len(bad)} wrong**: {sites:,} norm layers, of which "
        f"{sum(int(row.values['batch']) for row in rows):,} are batch norms. {left_out} families whose smallest member is "
        "larger than this size of the suite runs were left out.\n"
    )
    head = ["family", "member", "million", "side", "batch", "other", "no kind", "unreached", "running", "by batch"]
    head += ["output", "wrong"]
    lines = [
        (
            row.cell["family"],
            row.cell["member"],
            f"{row.values['millions']:.1f}",
            f"{row.values['side']:.0f}",
            *(f"{row.values[name]:.0f}" for name in ("batch", "other", "of no kind", "unvisited")),
            *(_shown(row.values[name], row) for name in ("running", "by batch", "output")),
            ", ".join(wrong(row)) or "–",
        )
        for row in rows
    ]
    return "\n".join([verdict, ABOUT, markdown(head, lines, words=2)])


def _shown(number: float, row: Row) -> str:
    return f"{number:.0e}" if row.values["batch"] else ""
