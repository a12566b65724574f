"""Suite `architectures`: batch norm beyond images: recurrent, variational, tables, signals and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from renorm.bench import architectures_table, mislabelled, reviews, sequences, signals, variational
from renorm.bench.base import Cell, Row, Suite

__all__ = ["Architectures"]

EPOCHS = {"rows": 30, "pixels": 60, "mnist rows": 12, "digits": 40}
SHIFTS = ("as they are", "low contrast", "fog", "blur")  # of the digits that a recurrent network meets


class Architectures(Suite):
    """Sequences of digits, digits written from a latent variable, gas sensors in time, heart beats, reviews; wrong columns."""

    name: ClassVar[str] = "architectures"
    revision: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("gas_drift.npz", "ecg_ds1.npz", "mnist15k.npz", reviews.FILE)

    def cells(self) -> Iterator[Cell]:
        """Cells of both sizes measure the same, so that rows of one may be copied to the other's file."""
        for seed in range(self.seeds):
            yield from (cell for cell in _cells(seed) if self.size == "full" or _quick(cell))

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        way, seed, where, epochs = cell["way"], cell["seed"], cell["case"], EPOCHS.get(cell["case"], 0)
        match cell["part"]:
            case "sequence":
                found = sequences.race(way, where, seed=seed, epochs=epochs, data=self.data)
            case "recurrent":
                model, source, digits = sequences.trained("bnlstm", seed=seed, epochs=EPOCHS["rows"])
                met = digits.shifted(where)
                found = signals.adapted(way, model, source, (sequences.rows_of(met.images), met.labels))
            case "vae":
                found = variational.trained(way, seed=seed, epochs=epochs)
            case "encoder":
                found = variational.encoded(way, where, seed=seed, epochs=EPOCHS["digits"])
            case "columns":
                recorded = cell["known"] == "tenths"
                found = mislabelled.planted(way, where, seed=seed, data=self.data, recorded=recorded)
            case "text":
                network = cell["network"]
                reader, _, goods = reviews.reviews(self.data, network, seed)
                found = reviews.adapted(way, reader, lambda: reviews.known(self.data, network, seed), goods[where])
            case "gas":
                model, source, parts = signals.gas(self.data, seed)
                found = signals.adapted(way, model, source, parts[where])
            case _:
                model, source, parts = signals.beats(self.data, seed)
                found = signals.adapted(way, model, source, list(parts.values())[int(where)])
        return found

    def table(self, rows: Sequence[Row]) -> str:
        return architectures_table.table(rows)


def _cells(seed: int) -> Iterator[Cell]:
    """Every cell of one seed."""
    for group in ("3", "4", "5", "6"):
        for way in (*signals.WAYS, "affine"):
            yield Cell.of(part="gas", case=group, seed=seed, way=way)
    for patient in range(signals.LEFT_OUT):
        for way in signals.WAYS:
            yield Cell.of(part="ecg", case=str(patient), seed=seed, way=way)
    for network in reviews.NETWORKS:
        for group in reviews.TARGETS:
            for way in reviews.ways_of(network):
                yield Cell.of(part="text", network=network, case=group, seed=seed, way=way)
    for case in sequences.READINGS:
        for way in ("lstm", "bnlstm"):
            yield Cell.of(part="sequence", case=case, seed=seed, way=way)
    for case in SHIFTS:
        for way in (*signals.WAYS, "stream"):
            yield Cell.of(part="recurrent", case=case, seed=seed, way=way)
    for way in variational.WAYS:
        yield Cell.of(part="vae", case="digits", seed=seed, way=way)
    for case in variational.SHIFTED:
        for way in variational.ENCODED:
            yield Cell.of(part="encoder", case=case, seed=seed, way=way)
    for case in mislabelled.MET:
        for way in mislabelled.PLANTED:
            yield Cell.of(part="columns", case=case, known="tenths", seed=seed, way=way)
        for way in mislabelled.BY_SD:
            yield Cell.of(part="columns", case=case, known="mean and sd", seed=seed, way=way)


def _quick(cell: Cell) -> bool:
    """Whether a cell is of the quick size too: of each table what trains in seconds, cases of gain and of harm."""
    case = str(cell["case"])
    match cell["part"]:
        case "sequence":
            return case == "rows"
        case "gas":
            return case in ("4", "6")
        case "ecg":
            return int(case) < 3
        case "text":
            return (cell["network"], case) in (("cnn", "electronics"), ("cnn", "kitchen"), ("transformer", "kitchen"))
        case "columns":
            return (cell["known"], case) in (("tenths", "3"), ("tenths", "6"))
        case _:
            return True
