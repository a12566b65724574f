"""Columns of a table: remembered by the checkpoint, matched by name, and found out where they hold something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_wine
from torch import Tensor, nn

import renorm
from renorm.checkpoints import read_weights
from renorm.cli import main
from renorm.columns import Columns, rows_of
from renorm.datasets import load_data
from renorm.errors import BatchError, CheckpointError, DataError, UsageError
from renorm.facts import Facts
from renorm.units import UNITS, Mistake, apart, mistakes_in, renamed
from tests.data import shared
from tests.reference import columns as slowly

pandas = pytest.importorskip("pandas")

WINE = load_wine()
NAMES = [name.replace("/", " ") for name in WINE.feature_names]
ROWS = torch.from_numpy(WINE.data)[torch.randperm(178, generator=torch.Generator().manual_seed(0))]
KNOWN, NEW = Columns.measure([ROWS[:100]], NAMES), ROWS[100:]


def found(rows: Tensor, known: Columns = KNOWN) -> tuple[Mistake, ...]:
    return mistakes_in(known, Columns.measure([rows]))


def changed(column: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    rows = NEW.clone()
    rows[:, column] = change(rows[:, column])
    return rows


def test_what_is_measured_is_what_is_there_in_any_split() -> None:
    """Moments and the places of columns equal the slow ones, whichever way the rows come."""
    whole, parts = Columns.measure([ROWS], NAMES), Columns.measure([(ROWS[:50], None), {"x": ROWS[50:]}], NAMES)
    mean, var = slowly.moments(ROWS.numpy())
    for each in (whole, parts):
        assert torch.allclose(each.moments.mean, torch.tensor(mean, dtype=torch.float64), rtol=1e-9)
        assert torch.allclose(each.moments.var, torch.tensor(var, dtype=torch.float64), rtol=1e-9)
        for k, column in enumerate(ROWS.T):
            slow = slowly.lie(column.tolist())
            assert (float(each.lie()[0][k]), float(each.lie()[1][k])) == pytest.approx(slow, rel=1e-6)
    assert whole.alone().lie()[0].equal(whole.moments.mean)


@given(
    st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)),
    st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
)
def test_a_distance_is_symmetric_and_knows_no_unit(
    one: tuple[float, float], other: tuple[float, float], scale: float, offset: float
) -> None:
    """Swapping the two, and measuring both in another unit, leaves the distance as it is; it is 0 to itself."""

    def far(a: tuple[float, float], b: tuple[float, float]) -> float:
        pairs = [tuple(torch.tensor([v], dtype=torch.float64) for v in each) for each in (a, b)]
        return float(apart(*pairs))  # type: ignore[arg-type]

    def moved(a: tuple[float, float]) -> tuple[float, float]:
        return scale * a[0] + offset, scale * a[1]

    assert far(one, other) == pytest.approx(slowly.apart(one, other), rel=1e-9, abs=1e-9)
    assert far(one, other) == pytest.approx(far(other, one), rel=1e-9)
    assert far(moved(one), moved(other)) == pytest.approx(far(one, other), rel=1e-3, abs=1e-3)
    assert far(one, one) == 0


def test_plain_values_come_back(tmp_path: Path) -> None:
    back = Columns.of_plain(json.loads(json.dumps(KNOWN.plain())))
    assert back.names == KNOWN.names
    assert back.quantiles is not None
    assert torch.allclose(back.lie()[1], KNOWN.lie()[1], rtol=1e-7)
    alone = Columns.of_plain(KNOWN.alone().plain())
    assert alone.quantiles is None
    assert Columns.recorded(None) is None
    assert Columns.recorded({"columns": KNOWN.plain()}) is not None
    for wrong in ({}, {**KNOWN.plain(), "names": ["a"]}, {**KNOWN.plain(), "quantiles": [[1.0]]}, [1]):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Columns.of_plain(wrong)  # type: ignore[arg-type]


def test_what_is_no_table_is_refused() -> None:
    assert rows_of(torch.zeros(2, 3, 4)) is None
    assert rows_of({"ids": torch.zeros(2, 3, dtype=torch.long)}) is None
    for batches in ([torch.zeros(2, 3, 4)], [torch.zeros(2, 3), torch.zeros(2, 4)]):
        with pytest.raises(BatchError, match=r"columns are measured on tables, one tensor \(N, [C3]\) a batch; batch"):
            Columns.measure(batches)
    with pytest.raises(BatchError, match=r"one tensor \(N, 2\) a batch; batch 0"):
        Columns.measure([torch.zeros(2, 3)], ["a", "b"])
    with pytest.raises(UsageError, match="'a' stands 2 times"):
        Columns.measure([torch.zeros(2, 2)], ["a", "a"])


@pytest.mark.parametrize(
    "unit", ["x10", "/10", "x1000", "/1000", "x1000000", "°F for °C", "K for °C", "x2.54", "/2.54"]
)
def test_a_unit_is_named_in_every_column(unit: str) -> None:
    """Wine's 13 columns, one after the other in another unit: no other is blamed, and but for small steps it is named."""
    scale, offset = UNITS[unit].scale, UNITS[unit].offset
    missed = 0
    for k, name in enumerate(NAMES):
        mistakes = found(changed(k, lambda column: scale * column + offset))
        assert {column for mistake in mistakes for column in mistake.columns} <= {name}
        missed += [(each.columns, each.unit) for each in mistakes] != [((name,), unit)]
    assert missed <= (0 if abs(np.log(scale)) > 2 else 4)


def test_swapped_constant_and_strange_columns_are_found() -> None:
    swapped = NEW.clone()
    swapped[:, [0, 12]] = NEW[:, [12, 0]]
    (mistake,) = found(swapped)
    assert (mistake.kind, mistake.columns, mistake.sure) == ("swapped", (NAMES[0], NAMES[12]), True)
    (mistake,) = found(changed(3, torch.zeros_like))
    assert (mistake.kind, mistake.columns, mistake.sure, mistake.limit) == ("constant", (NAMES[3],), False, 0)
    (mistake,) = found(changed(3, lambda column: 30 * column.square() - 7))
    assert (mistake.kind, mistake.columns, mistake.sure) == ("elsewhere", (NAMES[3],), False)
    assert mistake.before > mistake.limit > 0
    assert str(mistake) == f"{NAMES[3]}: values lie far from where they lay in training, and other columns do not"


def test_the_same_mistake_in_several_or_all_columns_is_one() -> None:
    two = changed(0, lambda column: 1000 * column)
    two[:, 1] *= 1000
    (mistake,) = found(two)
    assert mistake.columns == (NAMES[0], NAMES[1])
    for unit, rows in {"x1000": 1000 * NEW, "/1000": NEW / 1000}.items():
        (mistake,) = found(rows)
        assert (mistake.unit, len(mistake.columns)) == (unit, 13)
        assert "and 7 more" in str(mistake)
    (mistake,) = found((NEW - NEW.mean(0)) / NEW.std(0))
    assert mistake.unit == "standardised"
    (mistake,) = found((NEW - NEW.amin(0)) / (NEW.amax(0) - NEW.amin(0)))
    assert mistake.unit == "between 0 and 1"


def test_nothing_is_found_where_nothing_is_wrong_or_nothing_can_be_told() -> None:
    """Other rows, few rows, one class of three alone, sex and other columns of two values."""
    assert not found(NEW)
    assert not found(1000 * NEW[:20])
    labels = WINE.target
    for name in range(3):
        assert not found(torch.from_numpy(WINE.data[labels == name]))
    coins = torch.randint(0, 2, (400, 6), generator=torch.Generator().manual_seed(0)).double()
    assert not mistakes_in(Columns.measure([coins[:200]]), Columns.measure([coins[200:]]))
    rare = torch.cat([coins[:, :5], (torch.arange(400) % 40 == 0)[:, None]], 1)
    assert not mistakes_in(
        Columns.measure([rare]), Columns.measure([torch.cat([coins[:, :5], torch.zeros(400, 1)], 1)])
    )
    same = torch.ones(64, 3)
    assert not mistakes_in(Columns.measure([same]), Columns.measure([same]))


def test_real_drift_of_sensors_is_no_mistake_and_planted_ones_are_found() -> None:
    """Gas sensors, years later as they are: nothing. A thousandfold value: found in every column that is tried."""
    with np.load(shared("gas_drift.npz")) as file:
        x, batch = torch.from_numpy(file["X"]).double(), torch.from_numpy(file["batch"])
    known = Columns.measure([x[batch <= 2]])
    for later in (3, 4, 5, 6):
        rows = x[batch == later]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:256]]
        assert not found(rows, known)
        assert not found(rows, known.alone())
        for column in range(0, 128, 32):
            wrong = rows.clone()
            wrong[:, column] *= 1000
            assert [mistake.columns for mistake in found(wrong, known)] == [(f"column {column}",)]


def test_another_name_is_guessed_by_letters_and_by_values() -> None:
    extra = Columns.measure([ROWS[100:, [0, 12]]], ["Alcohol", "x17"])
    assert renamed(KNOWN, [NAMES[0], NAMES[12]], extra) == {NAMES[0]: "Alcohol", NAMES[12]: "x17"}
    far = Columns.measure([1e6 + ROWS[100:, [0, 1]]], ["q", "w"])
    assert renamed(KNOWN, [NAMES[12]], far) == {}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def fitted() -> nn.Sequential:
    model = net()
    for module in (model[0], model[2]):
        module.momentum = None
    model.train()(ROWS[:100].float())
    return model.eval()


def test_the_doctor_names_the_column_and_offers_no_recalibration() -> None:
    """With the columns given, and with nothing but a first batch norm that reads the table."""
    rows = changed(4, lambda column: 1000 * column).float()
    for columns in (KNOWN, None):
        diagnosis = renorm.diagnose(fitted(), [rows], columns=columns)
        (wrong,) = (finding for finding in diagnosis.findings if finding.rule == "BN313")
        assert wrong.severity == "error"
        assert (NAMES[4] if columns else "column 4") in wrong.message
        assert "1,000 times too large" in wrong.message
        shift = next(finding for finding in diagnosis.findings if finding.rule == "BN302")
        assert "BN313" in shift.advice
        assert all(
            finding.fix_ is None for finding in diagnosis.findings if finding.rule in ("BN301", "BN302", "BN313")
        )
        assert diagnosis.kind is diagnosis.estimate is None
    constant = renorm.diagnose(fitted(), [changed(4, torch.zeros_like).float()], columns=KNOWN)
    (wrong,) = (finding for finding in constant.findings if finding.rule == "BN313")
    assert (wrong.severity, wrong.unit, wrong.value) == ("warning", "columns", 1)
    assert not [f for f in renorm.diagnose(fitted(), [NEW.float()], columns=KNOWN).findings if f.rule == "BN313"]
    assert not Facts(net(), [rows]).mistakes  # a new batch norm knows nothing of the columns
    other = nn.Sequential(nn.Linear(13, 13), nn.BatchNorm1d(13)).eval()
    assert not Facts(other, [rows]).mistakes
    assert not Facts(nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(13)), [rows[:, :, None]]).mistakes


def test_recommend_tries_nothing_on_wrong_columns() -> None:
    rows = changed(4, lambda column: 1000 * column).float()
    plan = renorm.recommend(fitted(), [rows[:39], rows[39:]], budget=1)
    assert "BN313" in plan.why
    assert plan.best.verb == "leave"


NET = """
import torch
from torch import nn


def net(num_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wine as tables: what is trained on, and every way in which another can differ; a network trained on the first."""
    where = tmp_path_factory.mktemp("tables")
    (where / "nets.py").write_text(NET)
    order = np.random.default_rng(0).permutation(178)
    frame = pandas.DataFrame(WINE.data, columns=NAMES).iloc[order].reset_index(drop=True)
    frame["kind"] = WINE.target[order]
    first, later = frame.iloc[:100], frame.iloc[100:]
    tables = {
        "first": first,
        "later": later,
        "order": later[list(later.columns[::-1])].assign(cellar=1.5),
        "milli": later.assign(alcohol=1000 * later["alcohol"]),
        "swapped": later.rename(columns={"alcohol": "proline", "proline": "alcohol"}),
        "renamed": later.rename(columns={"alcohol": "Alcohol ", "proline": "p9"}),
        "one": later.rename(columns={"alcohol": "Alcohol "}),
        "missing": later.drop(columns=["proline"]),
        "text": later.assign(alcohol=later["alcohol"].map("{:.2f} %".format)),
        "constant": later.assign(alcohol=12.0),
        "dead": first.assign(alcohol=12.0),
    }
    for name, table in tables.items():
        table.to_csv(where / f"{name}.csv", index=False)
    later.to_parquet(where / "later.parquet")
    np.savez(where / "array.npz", x=later[NAMES].to_numpy(), y=later["kind"].to_numpy())
    code = main(
        f"pretrain {where}/nets.py:net {where}/first.csv --labels kind --epochs 2 -o {where}/net.safetensors --quiet".split()
    )
    assert code == 0
    return where


@pytest.fixture
def run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[int, str]]:
    monkeypatch.chdir(folder)
    capsys.readouterr()

    def go(words: str) -> tuple[int, str]:
        code = main(f"{words} --labels kind --checkpoint net.safetensors --quiet".split())
        out = capsys.readouterr()
        return code, " ".join((out.out + out.err).split())

    return go


def test_a_checkpoint_remembers_the_columns(folder: Path) -> None:
    kept = Columns.recorded(read_weights(folder / "net.safetensors").provenance)
    assert kept is not None
    assert list(kept.names) == NAMES
    assert kept.moments.count == 100


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("milli", "alcohol: values are 1,000 times too large"),
        ("swapped", "alcohol, proline: in each other's place"),
        (
            "renamed",
            "lacks 2 of the 13 columns that the model was trained on: alcohol, proline. 'alcohol' is probably called",
        ),
        (
            "one",
            "lacks 1 of the 13 columns that the model was trained on: alcohol. 'alcohol' is probably called 'Alcohol '",
        ),
        ("missing", "lacks 1 of the 13 columns that the model was trained on: proline. Give the columns"),
        ("text", "hold something else: 'alcohol' (text)"),
    ],
)
def test_wrong_tables_are_refused_before_anything_is_written(
    table: str, message: str, folder: Path, run: Callable[[str], tuple[int, str]]
) -> None:
    verbs = (
        ["recalibrate"]
        if table != "milli"
        else ["recalibrate", "adapt", "finetune", "auto", "profile", "observe", "recommend"]
    )
    for verb in verbs:
        output = "" if verb == "recommend" else f" -o {'out.csv' if verb == 'adapt' else 'out.safetensors'}"
        code, said = run(f"{verb} nets.py:net {table}.csv{output}")
        assert code == 2
        assert message in said
        assert not list(folder.glob("out.*"))


def test_every_verb_reads_csv_and_parquet(folder: Path, run: Callable[[str], tuple[int, str]]) -> None:
    """Trained on a table, then measured, mended and tuned on later ones, of either form; nothing is said of pixels."""
    for verb, output in (
        ("evaluate", ""),
        ("observe", "seen.safetensors"),
        ("recalibrate", "mended.safetensors"),
        ("finetune", "tuned.safetensors"),
        ("doctor", ""),
    ):
        said = []
        for form in ("csv", "parquet"):
            more = f" -o {form}-{output}" if output else " --fail-on never" if verb == "doctor" else ""
            code, words = run(f"{verb} nets.py:net later.{form}{more}{' --epochs 1' if verb == 'finetune' else ''}")
            assert code == 0, words
            assert "divided by 255" not in words
            said.append(words.replace(form, "F"))
        assert said[0] == said[1] or verb != "evaluate"  # the others meet the rows in another order
        if output:
            one, other = (read_weights(folder / f"{form}-{output}").state for form in ("csv", "parquet"))
            assert one.keys() == other.keys()
            for name, tensor in one.items() if verb != "finetune" else ():
                torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_order_and_more_columns_do_no_harm(run: Callable[[str], tuple[int, str]]) -> None:
    """Read by name, reversed and with one column more: the same accuracy as of the table as it was."""
    one, other = (run(f"evaluate nets.py:net {table}.csv --format json") for table in ("later", "order"))
    assert one[0] == other[0] == 0
    assert json.loads(one[1])["result"]["value"] == json.loads(other[1])["result"]["value"]
    assert "columns stand in another order than in training, and are read by their names" in other[1]
    assert "on which the model was not trained: cellar" in other[1]


def test_who_does_not_adapt_only_tells(run: Callable[[str], tuple[int, str]]) -> None:
    code, said = run("evaluate nets.py:net milli.csv")
    assert code == 0
    assert "look at alcohol: values are 1,000 times too large" in said
    code, said = run("doctor nets.py:net milli.csv")
    assert code == 1
    assert "BN313" in said
    code, said = run("recalibrate nets.py:net constant.csv -o constant.safetensors")
    assert code == 0
    assert "look at alcohol: one value in every row" in said


def test_as_is_takes_columns_as_they_are(folder: Path, run: Callable[[str], tuple[int, str]]) -> None:
    code, _ = run("recalibrate nets.py:net milli.csv --columns as-is -o anyway.safetensors")
    assert code == 0
    kept = Columns.recorded(read_weights(folder / "anyway.safetensors").provenance)
    assert kept is not None  # of the table that its statistics fit
    assert float(kept.moments.mean[NAMES.index("alcohol")]) > 10_000
    code, said = run("recalibrate nets.py:net missing.csv --columns as-is -o never.safetensors")
    assert code != 0
    assert "lacks" not in said
    code, said = run("doctor nets.py:net swapped.csv --columns as-is --format json")
    rules = [f["rule"] for f in json.loads(said)["result"]["findings"] if f["rule"] == "BN313"]
    assert rules == []  # their names alone were swapped: where they stand, they are right


def test_arrays_without_names_are_judged_by_place(folder: Path) -> None:
    data = load_data(folder / "array.npz")
    assert data.columns == ()
    assert load_data(folder / "later.csv", labels="kind").columns == tuple(NAMES)
    with pytest.raises(DataError, match="lacks 1 of the 13 columns"):
        load_data(folder / "missing.csv", labels="kind", columns=KNOWN)


def test_a_constant_column_is_named_in_training(run: Callable[[str], tuple[int, str]]) -> None:
    code, said = run("pretrain nets.py:net dead.csv --columns as-is --epochs 1 --batch-size 7 -o dead.safetensors")
    assert code == 0
    assert "columns with one value in all rows, which tells the model nothing: alcohol" in said
