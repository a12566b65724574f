"""The command line: every exit code, every message, nothing left behind."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from renorm.cli import main
from renorm.cli.base import catalogue, settings
from renorm.cli.main import unexpected
from renorm.cli.parse import parse
from renorm.cli.screen import Screen
from renorm.errors import RenormError, UnknownName, UsageError

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )
    model[1].momentum = model[4].momentum = None
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    model.train()(torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return model.eval()

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.LayerNorm(2))

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        raise RuntimeError("shapes do not fit")

def broken():
    return Broken()

class Slow(Broken):
    def forward(self, x):
        import time
        print("running", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's file, data like the source's (near), and data far from it."""
    (tmp_path / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    near = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "near.npz", images=near, labels=rng.integers(0, 2, 60))
    np.savez(tmp_path / "far.npz", images=near // 16, labels=rng.integers(0, 2, 60))
    np.savez(tmp_path / "unlabelled.npz", images=near)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Ran:
    """What one run of the command line left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def renorm(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Ran]:
    def run(words: str) -> Ran:
        code = main(words.split())
        return Ran(code, *capsys.readouterr())

    return run


def refused(ran: Ran, *parts: str) -> None:
    """One message of one screen on stderr, nothing on stdout, exit code 2, no traceback."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("renorm: ")
    assert ran.err.count("\n") <= 12
    assert "Traceback" not in ran.err
    for part in parts:
        assert part in ran.err


# ── help ──


def test_help_names_every_command_and_fits_80_columns(renorm: Callable[[str], Ran]) -> None:
    for words in ("", "--help", "-h", "help"):
        ran = renorm(words)
        assert ran.code == 0
        assert all(f"\n  {name} " in ran.out for name in catalogue())
        assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_help_of_a_command_names_every_option(name: str, renorm: Callable[[str], Ran]) -> None:
    ran = renorm(f"{name} --help")
    assert ran.code == 0
    assert ran.out.startswith(f"renorm {name}")
    kind = catalogue()[name]
    for setting in settings(kind):
        assert setting.help or setting.key == "options", f"{name} {setting.key} has no help"
        assert (setting.key.upper() if setting.positional else setting.flag) in ran.out
    assert "--config" in ran.out
    assert f"example\n  {kind.example}" in ran.out
    assert max(map(len, ran.out.splitlines()[:-1])) <= 80


def test_help_with_a_method_shows_its_options(renorm: Callable[[str], Ran]) -> None:
    assert "--options.tolerance" not in renorm("recalibrate --help").out
    assert "--options.tolerance" in renorm("recalibrate --method pooled --help").out


def test_version(renorm: Callable[[str], Ran]) -> None:
    assert renorm("--version").out.startswith("renorm ")


def test_help_imports_nothing_heavy() -> None:
    """No torch, no face, no data library, no parser."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "from renorm.cli import main; code = main(['doctor', '--help'])\n"
        "heavy = {'torch', 'rich', 'sklearn', 'torchmetrics', 'timm', 'jinja2'}\n"
        "loaded = heavy & {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "sys.exit(str(loaded) if loaded or code else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# ── wrong use ──


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("doktor", ["there is no command 'doktor'", "did you mean 'doctor'?"]),
        ("doctor", ["renorm doctor needs MODEL", "For example", "--help"]),
        ("recalibrate nets.py:net near.npz", ["renorm recalibrate needs -o OUT"]),
        ("recalibrate nets.py:net -o x.pt", ["needs DATA"]),
        ("doctor nets.py:net near.npz more.npz", ["renorm doctor takes MODEL DATA; 'more.npz' is more than that"]),
        ("doctor nets.py:net --chekpoint x", ["no option of renorm doctor '--chekpoint'", "'--checkpoint'"]),
        ("doctor nets.py:net -x", ["no option of renorm doctor '-x'"]),
        ("doctor nets.py:net --format xml", ["--format takes table|json|html|sarif; got xml"]),
        ("doctor nets.py:net --batch-size many", ["--batch-size takes N; got many"]),
        ("recalibrate nets.py:net near.npz -o x.pt --prior few", ["--prior takes N|auto; got few"]),
        ("doctor nets.py:net --limit", ["--limit"]),
        ("recalibrate nets.py:net near.npz -o x.pt --method pold", ["no method 'pold'", "did you mean 'pooled'?"]),
        ("recalibrate nets.py:net near.npz -o x.pt --options.prior 3", ["--options.prior belongs to a method"]),
        (
            "recalibrate nets.py:net near.npz -o x.pt --method pooled --options.tolerence 1",
            ["no option of the method '--options.tolerence'", "'--options.tolerance'"],
        ),
        ("doctor nets.py:nett", ["nett", "did you mean 'net'?"]),
        ("doctor nets.py:net nowhere.npz", ["nowhere.npz"]),
        ("doctor nowhere.py:net", ["there is no file nowhere.py"]),
        ("evaluate nets.py:net near.npz --metric acuracy", ["no metric 'acuracy'", "did you mean 'accuracy'?"]),
        ("evaluate nets.py:net unlabelled.npz", ["needs labels"]),
        ("recalibrate nets.py:net near.npz -o x.bin", ["x.bin", ".safetensors"]),
        ("recalibrate nets.py:net near.npz -o no/such/x.pt", ["there is no folder"]),
        ("recalibrate nets.py:plain near.npz -o x.pt", ["batch norm"]),
        ("recalibrate nets.py:net near.npz -o x.pt --limit 1", ["one image"]),
        ("doctor nets.py:net --checkpoint none.pt", ["none.pt"]),
        ("doctor nets.py:net near.npz --source near.npz", ["profile"]),
        ("bench nosuch --data .", ["no suite 'nosuch'"]),
        ("doctor --config nowhere.yaml", ["nowhere.yaml"]),
    ],
)
def test_wrong_use_says_what_was_found_and_what_to_do(
    words: str, parts: list[str], folder: Path, renorm: Callable[[str], Ran]
) -> None:
    before = sorted(folder.iterdir())
    refused(renorm(words), *parts)
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_an_error_in_the_users_model_is_said_in_one_message(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("doctor nets.py:broken near.npz")
    refused(ran, "RuntimeError: shapes do not fit", "nets.py, line", "in forward", "--debug", "batch 0")
    shown = renorm("doctor nets.py:broken near.npz --debug")
    assert shown.code == 2
    assert "Traceback" in shown.err


def test_an_error_of_nobodys_file_says_so() -> None:
    assert "inside renorm or a library" in unexpected(ValueError())
    assert unexpected(ValueError()).startswith("ValueError\n")
    long = unexpected(ValueError("could not run it " + "word " * 200 + "\n\nand every backend that there is"))
    assert "word word …\n" in long
    assert len(long) < 700


def test_the_exit_code_is_the_errors_own(monkeypatch: pytest.MonkeyPatch, renorm: Callable[[str], Ran]) -> None:
    class SpecialError(RenormError):
        exit_code = 7

    def fail(*_: object) -> None:
        raise SpecialError("a special case")

    monkeypatch.setattr("renorm.cli.demo.Demo.run", fail)
    ran = renorm("demo")
    assert ran.code == 7
    assert ran.err == "renorm: a special case\n"


# ── commands ──


def test_the_doctor_finds_far_data_and_lets_near_data_pass(folder: Path, renorm: Callable[[str], Ran]) -> None:
    near = renorm("doctor nets.py:net near.npz")
    assert near.code == 0, near.err
    assert "values in these data are as the model expects" in near.out
    far = renorm("doctor nets.py:net far.npz")
    assert far.code == 1
    assert far.out.index("Data shift [BN302]") < far.out.index("█")
    assert "To do: " in far.out
    assert renorm("doctor nets.py:net").code == 0


def test_a_model_without_batch_norm_is_a_healthy_answer(folder: Path, renorm: Callable[[str], Ran]) -> None:
    for words in ("doctor nets.py:plain", "doctor nets.py:plain near.npz"):
        ran = renorm(words)
        assert ran.code == 0, ran.err
        assert "This model has no batch norm" in ran.out
        assert "1 layer norm" in ran.out


def test_the_doctors_json(folder: Path, renorm: Callable[[str], Ran]) -> None:
    envelope = renorm("doctor nets.py:net far.npz --format json").json
    assert list(envelope) == ["schema", "version", "command", "model", "data", "result"]
    assert (envelope["command"], envelope["model"], envelope["data"]) == ("doctor", "nets.py:net", "far.npz")
    result = envelope["result"]
    keys = ["healthy", "worst", "findings", "shifts", "unvisited", "samples"]
    keys += ["skipped", "kind", "estimate", "sites", "notes"]
    assert list(result) == keys
    finding = ["rule", "site", "severity", "value", "unit", "limit", "message", "advice"]
    assert list(result["worst"]) == finding
    assert result["worst"] == result["findings"][0]
    distances = [shift["distance"] for shift in result["shifts"].values()]
    assert distances == sorted(distances, reverse=True)
    assert result["samples"] == 60
    assert result["sites"][0] == {"name": "1", "kind": "batch", "channels": 4}


def test_only_the_worst_sites_are_listed(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("doctor nets.py:net far.npz --top 1")
    assert "1 site nearer than these" in ran.out


def test_recalibrate_writes_weights_that_load_and_fit(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("recalibrate nets.py:net far.npz -o new.safetensors --prior 0 --batch-size 30")
    assert ran.code == 0, ran.err
    assert "Written to new.safetensors" in ran.out
    assert renorm("doctor nets.py:net far.npz --checkpoint new.safetensors").code == 0
    from renorm.checkpoints import read_weights

    made = read_weights(folder / "new.safetensors").provenance
    assert made is not None
    assert made["command"] == ("renorm recalibrate nets.py:net far.npz -o new.safetensors --prior 0 --batch-size 30")
    assert made["data"].startswith("sha256:")


def test_recalibrates_json(folder: Path, renorm: Callable[[str], Ran]) -> None:
    result = renorm("recalibrate nets.py:net far.npz -o new.pt --check far.npz --format json").json["result"]
    keys = "accepted why method samples passes unvisited shifts source_weights trust before after output notes"
    assert list(result) == keys.split()
    assert result["samples"] == 60
    assert list(result["before"]) == ["metric", "value", "interval", "count", "nll", "ece"]
    assert (result["output"] == "new.pt") == result["accepted"] == (folder / "new.pt").exists()


def test_a_change_that_does_not_hold_up_is_not_written(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("renorm.recalibrate._judge", lambda *_: (False, "accuracy went from 90% to 10%", None))
    ran = renorm("recalibrate nets.py:net far.npz -o new.pt --check near.npz")
    assert ran.code == 1
    assert "Not kept" in ran.out
    assert "Accuracy went from 90% to 10%. The statistics of the source stand again" in ran.out
    assert not (folder / "new.pt").exists()


def test_no_file_is_overwritten_without_force(folder: Path, renorm: Callable[[str], Ran]) -> None:
    for words in ("recalibrate nets.py:net far.npz -o old.pt", "profile nets.py:net near.npz -o old.pt"):
        (folder / "old.pt").write_bytes(b"mine")
        refused(renorm(words), "old.pt stands there already", "--force")
        assert (folder / "old.pt").read_bytes() == b"mine"
        assert renorm(words + " --force").code == 0
        assert (folder / "old.pt").read_bytes() != b"mine"


def test_a_method_has_its_options(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = "recalibrate nets.py:net far.npz --format json"
    forgotten = renorm(f"{words} -o a.pt --method pooled --options.prior 0").json["result"]
    assert forgotten["method"] == "pooled"
    assert set(forgotten["source_weights"].values()) == {0.0}
    (folder / "run.yaml").write_text("method: pooled\noptions:\n  prior: 60\n")
    kept = renorm(f"{words} -o b.pt --config run.yaml").json["result"]
    assert set(kept["source_weights"].values()) == {0.5}


def test_evaluate_gives_the_number_with_its_interval(folder: Path, renorm: Callable[[str], Ran]) -> None:
    result = renorm("evaluate nets.py:net near.npz --format json").json["result"]
    assert list(result) == ["metric", "value", "interval", "count", "nll", "ece", "notes"]
    assert result["interval"][0] <= result["value"] <= result["interval"][1]
    assert f"Accuracy: {100 * result['value']:.1f} %" in renorm("evaluate nets.py:net near.npz").out


def test_a_profile_is_written_and_used(folder: Path, renorm: Callable[[str], Ran]) -> None:
    made = renorm("profile nets.py:net near.npz -o net.profile --format json")
    assert made.code == 0, made.err
    assert made.json["result"]["bytes"] == (folder / "net.profile").stat().st_size
    ran = renorm("recalibrate nets.py:net far.npz --source net.profile -o new.pt --format json")
    assert ran.json["result"]["method"] == "equal_mix"
    assert renorm("doctor nets.py:net far.npz --source net.profile").code == 1


def test_bf16_and_channels_last_are_options(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("recalibrate nets.py:net far.npz -o a.pt --precision bf16 --channels-last --device cpu")
    assert ran.code == 0, ran.err
    assert torch.load(folder / "a.pt", weights_only=True)["state_dict"]["1.running_mean"].dtype == torch.float32


# ── configuration ──


@pytest.mark.parametrize(
    "words",
    [
        "doctor nets.py:net far.npz --top 3 --quiet",
        "recalibrate nets.py:net far.npz -o new.pt --prior 5 --force",
        "recalibrate nets.py:net far.npz -o new.pt --method pooled --options.tolerance 0.5",
        "evaluate nets.py:net --metric nll",
        "demo",
    ],
)
def test_a_printed_configuration_gives_the_same_command(words: str, folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm(f"{words} --print-config")
    assert ran.code == 0, ran.err
    (folder / "run.yaml").write_text(ran.out)
    again = renorm(f"{words.split()[0]} --config run.yaml --print-config")
    assert yaml.safe_load(again.out) == yaml.safe_load(ran.out)
    name, *rest = words.split()
    if "--metric" not in rest:  # that one has no DATA, which only its configuration may lack
        kind = catalogue()[name]
        assert parse(kind, ["--config", "run.yaml"]) == parse(kind, rest)


def test_words_win_over_the_file(folder: Path, renorm: Callable[[str], Ran]) -> None:
    (folder / "run.yaml").write_text("model: nets.py:net\ndata: far.npz\nformat: json\n")
    assert renorm("doctor --config run.yaml").json["data"] == "far.npz"
    assert renorm("doctor --config run.yaml nets.py:net near.npz").json["data"] == "near.npz"
    assert renorm("doctor --config=run.yaml --data near.npz").json["data"] == "near.npz"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modl: nets.py:net", ["no setting of renorm doctor 'modl'", "did you mean 'model'?"]),
        ("- a\n- b", ["renorm doctor"]),
        ("{", ["renorm doctor"]),
        ("top: many", ["--top takes N; got many"]),
        ("", ["cannot be read", "--print-config"]),
        ("\xff\xfe", ["cannot be read", "--print-config"]),
        ("a: &x [*x]", ["cannot be read"]),
        ("!!python/object/apply:os.system ['true']", ["renorm doctor"]),
    ],
)
def test_a_configuration_that_cannot_be_read(
    text: str, parts: list[str], folder: Path, renorm: Callable[[str], Ran]
) -> None:
    (folder / "run.yaml").write_bytes(text.encode("latin-1"))
    refused(renorm("doctor nets.py:net --config run.yaml"), *parts)


@pytest.mark.parametrize("text", ["method: [pooled]", "method: 3", "[" * 5000, "a: &x [*x]"])
def test_a_method_that_cannot_be_read_from_the_file(text: str, folder: Path, renorm: Callable[[str], Ran]) -> None:
    (folder / "run.yaml").write_text(text)
    refused(renorm("recalibrate nets.py:net far.npz -o new.pt --config run.yaml"), "renorm")


def test_the_parser_names_what_is_wrong_in_python_too() -> None:
    with pytest.raises(UnknownName, match="no option of renorm doctor '--nope'"):
        parse(catalogue()["doctor"], ["--nope"])
    with pytest.raises(UsageError, match="'c' is more than that"):
        parse(catalogue()["doctor"], ["a", "b", "c"])
    with pytest.raises(UsageError, match="belongs to a method"):
        parse(catalogue()["recalibrate"], ["--options.x", "1"])


# ── progress ──


class Terminal:
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_for_a_person_only(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [1, 2, 3]
    assert Screen().watched(batches, "reading") is batches  # pytest's stderr is no terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert Screen(quiet=True).watched(batches, "reading") is batches
    assert Screen().watched(batches, "reading") is not batches


def test_watched_batches_are_the_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Drawn(Terminal):
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None: ...

    class Batches(list[int]):
        fingerprint = "abc"

    drawn = Drawn()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("TERM", "xterm")
    watched: Any = Screen().watched(Batches([1, 2, 3]), "reading")
    assert len(watched) == 3
    assert watched.fingerprint == "abc"
    assert iter(watched) is not watched
    assert [list(watched), list(watched)] == [[1, 2, 3]] * 2
    assert "reading" in drawn.text
    assert "(pass 2)" in drawn.text
    endless: Any = Screen().watched(iter([1]), "reading")
    with pytest.raises(TypeError, match="length of list_iterator is not known"):
        len(endless)
    assert list(Screen().steps(iter("ab"), "stepping", total=2)) == ["a", "b"]


# ── interruption ──


def test_ctrl_c_is_one_line_and_leaves_nothing(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt

    before = sorted(folder.iterdir())
    monkeypatch.setattr("renorm.recalibrate._write", interrupted)
    ran = renorm("recalibrate nets.py:net far.npz -o new.pt")
    assert (ran.code, ran.out, ran.err) == (130, "", "renorm: interrupted; nothing was written.\n")
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_ctrl_c_in_the_middle_of_a_forward(folder: Path) -> None:
    words = [sys.executable, "-m", "renorm", "recalibrate", "nets.py:Slow", "far.npz", "-o", "new.pt"]
    # a test run in the background of a shell has SIGINT ignored, and children inherit that
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=folder, preexec_fn=heed) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "running\n"
            time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 130
    assert err == "renorm: interrupted; nothing was written.\n"
    assert not list(folder.glob("*new*"))


def test_a_reader_that_stops_reading_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m renorm --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True, cwd=folder)
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
