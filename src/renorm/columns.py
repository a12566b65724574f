"""The columns of a table as a model was trained on them: their names, and how the values in each of them lay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from renorm.calls import nonempty, read
from renorm.errors import BatchError, CheckpointError, UsageError
from renorm.moments import Moments

__all__ = ["Columns", "rows_of"]

KEPT = 4096  # rows that quantiles are taken of: a tenth is then known to half a hundredth
LEVELS = tuple(k / 10 for k in range(11))
NORMAL = 0.7794  # standard deviation of the nine inner tenths of a normal distribution of sd 1


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of a table's columns: names, moments, and the least value, the nine tenths and the most of each.

    `quantiles` are None where only moments are known, as of a batch norm that reads the table. `named` is whether the names
    are the table's own: else they count from 0, and nothing can be matched by them.
    Shapes: moments of C columns, quantiles (11, C), float64 on the CPU.
    """

    names: tuple[str, ...]
    moments: Moments
    quantiles: Tensor | None = None
    named: bool = True

    @classmethod
    def measure(cls, batches: Iterable[Any], names: Sequence[str] | None = None) -> Columns:
        """What one pass over `batches`, inputs (N, C), tells of their columns; quantiles are those of the first rows.

        Raises:
            BatchError: inputs that are no table, or whose width is not that of `names`.
            UsageError: names that stand twice.
        """
        moments: Moments | None = None
        first: list[Tensor] = []
        for index, batch in nonempty(batches, asked="measuring columns"):
            rows = rows_of(batch)
            width = len(moments.mean) if moments else len(names) if names is not None else None
            if rows is None or (width is not None and rows.shape[1] != width):
                raise BatchError(
                    f"columns are measured on tables, one tensor (N, {width or 'C'}) a batch; batch {index} is none."
                )
            rows = rows.detach().to("cpu", torch.float64)
            new = Moments.of(rows)
            moments = new if moments is None else moments.merge(new)
            if sum(map(len, first)) < KEPT:
                first.append(rows)
        assert moments is not None  # there was a batch
        kept = torch.cat(first)[:KEPT]
        quantiles = torch.quantile(kept, torch.tensor(LEVELS, dtype=torch.float64), dim=0)
        return cls(_checked(names, len(moments.mean)), moments, quantiles, names is not None)

    def plain(self) -> dict[str, Any]:
        """As a mapping of plain values, for the metadata of a file."""
        found: dict[str, Any] = {"names": list(self.names), "named": self.named, "count": self.moments.count}
        found |= {"mean": _short(self.moments.mean), "var": _short(self.moments.var)}
        return found if self.quantiles is None else found | {"quantiles": [_short(row) for row in self.quantiles]}

    @classmethod
    def of_plain(cls, found: Mapping[str, Any]) -> Columns:
        """The value that `plain` wrote. Raises CheckpointError for anything else."""
        try:
            mean, var = (torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "var"))
            names = tuple(map(str, found["names"]))
            quantiles = torch.tensor(found["quantiles"], dtype=torch.float64) if "quantiles" in found else None
            fits = mean.shape == var.shape == (len(names),)
            if not fits or (quantiles is not None and quantiles.shape != (len(LEVELS), len(names))):
                raise ValueError("sizes differ")
            return cls(names, Moments(float(found["count"]), mean, var), quantiles, bool(found["named"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the columns that the checkpoint says it was trained on cannot be read ({type(error).__name__}: {error}). "
                "Train and save it again, or take the columns as they are: --columns as-is."
            ) from error

    @classmethod
    def recorded(cls, provenance: Mapping[str, Any] | None) -> Columns | None:
        """The columns that a checkpoint's `provenance` says it was trained on; None where it says nothing of them.

        Raises CheckpointError for what `plain` did not write.
        """
        found = (provenance or {}).get("columns")
        return None if found is None else cls.of_plain(found)

    def alone(self) -> Columns:
        """The same without quantiles."""
        return Columns(self.names, self.moments, None, self.named)

    def lie(self) -> tuple[Tensor, Tensor]:
        """Middle and width of each column: mean and sd of its inner tenths, which few far values do not move.

        Mean and sd of all values where no quantiles are known, or where the tenths are the same. Shapes: (C,) twice.
        """
        middle, width = self.moments.mean, self.moments.sd
        if self.quantiles is None:
            return middle, width
        inner = self.quantiles[1:-1]
        robust = inner.std(0, correction=0) / NORMAL
        wide = robust > 0
        return torch.where(wide, inner.mean(0), middle), torch.where(wide, robust, width)


def rows_of(batch: Any) -> Tensor | None:
    """The table in a batch, (N, C); None where its inputs are something else."""
    call = read(batch)
    inputs = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    is_table = len(inputs) == 1 and inputs[0].dim() == 2 and inputs[0].is_floating_point() and inputs[0].numel()
    return inputs[0] if is_table else None


def _checked(names: Sequence[str] | None, width: int) -> tuple[str, ...]:
    found = tuple(f"column {k}" for k in range(width)) if names is None else tuple(names)
    twice = [name for name in found if found.count(name) > 1] if len(set(found)) < len(found) else []
    if twice:
        raise UsageError(f"each column needs a name of its own, and {twice[0]!r} stands {found.count(twice[0])} times.")
    return found


def _short(values: Tensor) -> list[float]:
    """Numbers in nine digits, which a file has room for."""
    return [float(f"{value:.9g}") if math.isfinite(value) else value for value in values.tolist()]
