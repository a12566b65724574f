"""Suite `architectures`: batch norm beyond images: recurrent, variational, tables, signals and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from renorm.bench import architectures_table, reviews, sequences, signals, variational
from renorm.bench.base import Cell, Row, Suite

__all__ = ["Architectures"]

EPOCHS = {
    ("rows", "quick"): 30,
    ("rows", "full"): 100,
    ("pixels", "full"): 100,
    ("digits", "quick"): 40,
    ("digits", "full"): 200,
}
RATE = 3e-3


class Architectures(Suite):
    """Sequences of digits, digits written from a latent variable, gas sensors in time, heart beats, reviews."""

    name: ClassVar[str] = "architectures"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("gas_drift.npz", "ecg_ds1.npz", reviews.FILE)
    timed: ClassVar[bool] = True

    def cells(self) -> Iterator[Cell]:
        for seed in range(self.seeds):
            for group in ("3", "4", "5", "6"):
                for way in signals.WAYS:
                    yield Cell.of(part="gas", case=group, seed=seed, way=way)
            for patient in range(signals.LEFT_OUT):
                for way in signals.WAYS:
                    yield Cell.of(part="ecg", case=str(patient), seed=seed, way=way)
            for network in reviews.NETWORKS:
                for group in reviews.TARGETS:
                    for way in reviews.ways_of(network):
                        yield Cell.of(part="text", network=network, case=group, seed=seed, way=way)
        for reading in (
            sequences.READINGS if self.size == "full" else ("rows",)
        ):  # 64 steps take a quarter of an hour more
            for seed in range(self.seeds):
                for way in ("lstm", "bnlstm"):
                    yield Cell.of(part="sequence", case=reading, seed=seed, way=way)
        for seed in range(self.seeds):
            for way in variational.WAYS:
                yield Cell.of(part="vae", case="digits", seed=seed, way=way)

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        way, seed, epochs = cell["way"], cell["seed"], EPOCHS.get((cell["case"], self.size), 0)
        if cell["part"] == "sequence":
            return sequences.race(way, cell["case"], seed=seed, epochs=epochs, rate=RATE)
        if cell["part"] == "vae":
            return variational.trained(way, seed=seed, epochs=epochs)
        if cell["part"] == "gas":
            model, source, parts = signals.gas(self.data, seed)
            return signals.adapted(way, model, source, parts[cell["case"]])
        if cell["part"] == "text":
            reader, read, goods = reviews.reviews(self.data, cell["network"], seed)
            return reviews.adapted(way, reader, read, goods[cell["case"]])
        model, source, parts = signals.beats(self.data, seed)
        return signals.adapted(way, model, source, list(parts.values())[int(cell["case"])])

    def table(self, rows: Sequence[Row]) -> str:
        return architectures_table.table(rows)
