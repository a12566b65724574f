"""`renorm finetune` and `renorm pretrain`: what they write, say and refuse, and going on after a stop."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from renorm.cli.finetune import Finetune
from renorm.cli.parse import parse
from renorm.cli.screen import Screen
from renorm.errors import UsageError
from renorm.files import claimed
from renorm.regularisers import L2SP, Delta
from tests.test_cli import NETS, Ran, Terminal, refused, renorm

__all__ = ["renorm"]  # a fixture

WIDE = NETS.replace("def net():", "def net(num_classes=2):").replace("nn.Linear(4, 2)", "nn.Linear(4, num_classes)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's file and images of two, and of three, classes that differ in brightness."""
    (tmp_path / "nets.py").write_text(WIDE)
    rng = np.random.default_rng(0)
    for name, classes in (("two", 2), ("three", 3)):
        labels = rng.integers(0, classes, 48)
        images = rng.integers(0, 60, (48, 8, 8, 3)) + 90 * labels[:, None, None, None]
        names = np.array([f"{name}-{k}" for k in range(classes)])
        np.savez(tmp_path / f"{name}.npz", images=images.astype(np.uint8), labels=labels, classes=names)
    np.savez(tmp_path / "plain.npz", images=images.astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_finetune_writes_weights_with_their_origin(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = "finetune nets.py:net three.npz --val three.npz -o new.safetensors --epochs 4 --batch-size 16 --lr 0.05"
    ran = renorm(f"{words} --format json")
    assert (ran.code, ran.err) == (0, "")
    result = ran.json["result"]
    assert result["head"] == "new"
    assert result["policy"] == "all"
    assert result["steps"] == 12
    assert len(result["history"]) == 4
    assert result["value"] == result["score"]["value"] > 0.6
    assert set(result["why"]) == {"policy", "lr", "head"}
    with safe_open(folder / "new.safetensors", framework="pt") as opened:
        made = json.loads(opened.metadata()["provenance"])
        assert opened.get_tensor("8.weight").shape == (3, 4)
    assert made["classes"] == ["three-0", "three-1", "three-2"]
    assert made["command"].startswith("renorm finetune nets.py:net three.npz")
    again = renorm("evaluate nets.py:net --checkpoint new.safetensors --num-classes 3 three.npz --format json")
    assert again.json["result"]["value"] == result["value"]
    table = renorm(f"{words} --force")
    assert "Trained for 12 steps: accuracy" in table.out
    assert "Chosen" in table.out
    assert "What moved, farthest first" in table.out


def test_finetune_without_val_and_with_regularisers(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("finetune nets.py:net two.npz -o new.pt --epochs 1 --regularisers l2_sp,bss --policy affine-and-head")
    assert ran.code == 0, ran.err
    assert "give --val DATA" in " ".join(ran.out.split())
    assert (folder / "new.pt").exists()


def test_pretrain_builds_the_model_for_the_data(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("pretrain nets.py:net three.npz -o new.pt --epochs 2 --lr 0.02 --format json")
    assert ran.code == 0, ran.err
    assert (ran.json["result"]["head"], ran.json["result"]["policy"]) == ("keep", "all")
    assert torch.load(folder / "new.pt", weights_only=True)["state_dict"]["8.weight"].shape == (3, 4)
    refused(
        renorm("pretrain nets.py:plain three.npz -o p.pt --epochs 1"), "the labels run to 2, but there are 2 classes"
    )


def test_what_cannot_be_trained_is_refused(folder: Path, renorm: Callable[[str], Ran]) -> None:
    refused(renorm("finetune nets.py:net plain.npz -o new.pt"), "plain.npz has no labels to train on")
    refused(renorm("finetune nets.py:net two.npz -o new.pt --policy head_only"), "no policy 'head_only'", "'head-only'")
    refused(renorm("finetune nets.py:net two.npz -o new.pt --regularisers l3"), "no regulariser 'l3'")
    refused(renorm("finetune nets.py:net two.npz -o new.pt --metric acuracy"), "no metric 'acuracy'")
    refused(renorm("finetune nets.py:net two.npz -o new.pt --epochs 0"), "epochs is a whole number")
    refused(renorm("finetune nets.py:net two.npz"), "needs -o OUT")
    assert not (folder / "new.pt").exists()


def test_one_output_is_of_one_process_and_training_outlives_a_full_disk(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "finetune nets.py:net two.npz -o new.safetensors --epochs 1 --lr 0.02 --policy all"
    with claimed(folder / "new.safetensors"):
        refused(renorm(words), "another process is at work on new.safetensors")
    assert renorm(words.replace("-o new", "-o whole")).code == 0
    with monkeypatch.context() as patched:
        patched.setattr(
            "renorm.files._flush", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        refused(renorm(words), "No space left on device", "With --run-folder DIR the training would have been kept.")
    with monkeypatch.context() as patched:
        patched.setattr("renorm.checkpoints.writing", _full)
        refused(
            renorm(f"{words} --run-folder run"), "The training is kept in run: the same command goes on from there."
        )
    ran = renorm(f"{words} --run-folder run --format json")
    assert (ran.code, ran.err) == (0, "")
    with safe_open("whole.safetensors", "pt") as whole, safe_open("new.safetensors", "pt") as kept:
        assert all(torch.equal(whole.get_tensor(n), kept.get_tensor(n)) for n in whole.keys())
    assert not [path for path in folder.iterdir() if path.suffix == ".lock"]


def _full(path: Path, *, force: bool) -> object:
    raise UsageError(f"cannot write {path}: No space left on device.")


def test_the_same_command_goes_on_after_a_stop(
    folder: Path,
    renorm: Callable[[str], Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "finetune nets.py:net two.npz --epochs 2 --lr 0.02 --batch-size 8 --policy all"
    assert renorm(f"{words} -o whole.safetensors").code == 0
    from renorm.runs import Run

    saves = iter(range(100))
    save = Run.save

    def interrupted(self: Run, saved: object) -> None:
        if next(saves) == 4:
            raise KeyboardInterrupt
        save(self, saved)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "save", interrupted)
    stopped = renorm(f"{words} -o parts.safetensors --run-folder run --save-every 1")
    assert (stopped.code, (folder / "parts.safetensors").exists()) == (130, False)
    monkeypatch.setattr(Run, "save", save)
    ran = renorm(f"{words} -o parts.safetensors --run-folder run --save-every 1")
    assert ran.code == 0, ran.err
    with safe_open("whole.safetensors", "pt") as whole, safe_open("parts.safetensors", "pt") as parts:
        assert all(torch.equal(whole.get_tensor(n), parts.get_tensor(n)) for n in whole.keys())
    refused(renorm(f"{words} -o other.pt --run-folder run --seed 1"), "belongs to another run")


def test_a_configuration_reproduces_the_run(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = "finetune nets.py:net two.npz --epochs 1 --lr 0.02 --regularisers bss"
    (folder / "run.yaml").write_text(renorm(f"{words} -o a.safetensors --print-config").out)
    assert renorm(f"{words} -o a.safetensors").code == 0
    assert renorm("finetune --config run.yaml -o b.safetensors").code == 0
    with safe_open("a.safetensors", "pt") as a, safe_open("b.safetensors", "pt") as b:
        assert all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())


def test_progress_of_a_run_shows_steps_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(Terminal, io.StringIO):
        pass

    drawn = Drawn()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("TERM", "xterm")
    with Screen().progress("training", total=4, done=1) as draw:
        draw(2, "epoch 1, loss 0.5")
    assert "epoch 1, loss 0.5" in drawn.getvalue()
    assert "3/4" in drawn.getvalue()
    with Screen(quiet=True).progress("training", total=4) as draw:
        draw(1, "said")
    assert "said" not in drawn.getvalue()


def test_an_unlabelled_target_trains_along_and_is_scored(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = (
        "finetune nets.py:net three.npz --target three.npz -o joint.safetensors --epochs 2 --batch-size 16 --lr 0.05"
    )
    ran = renorm(f"{words} --head new --joint per_domain --format json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["result"]["policy"] == "all"
    assert ran.json["result"]["score"]["count"] == 48
    with safe_open(folder / "joint.safetensors", framework="pt") as opened:
        assert not any("extra" in name for name in opened.keys())


def test_a_few_labels_are_solved_and_said(folder: Path, renorm: Callable[[str], Ran]) -> None:
    ran = renorm("finetune nets.py:net three.npz --head new -o few.safetensors --batch-size 16")
    assert ran.code == 0
    assert "No step was taken: the head was solved." in ran.out
    assert "few-labels" in ran.out


def test_little_memory_writes_the_same_weights(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = "finetune nets.py:net two.npz --epochs 1 --lr 0.02 --policy all"
    assert renorm(f"{words} -o normal.safetensors").code == 0
    assert renorm(f"{words} -o lean.safetensors --memory lean").code == 0
    with safe_open("normal.safetensors", "pt") as normal, safe_open("lean.safetensors", "pt") as lean:
        assert all(torch.equal(normal.get_tensor(n), lean.get_tensor(n)) for n in normal.keys())
    refused(renorm(f"{words} -o tight.safetensors --memory tight"), "--memory")


def test_a_regulariser_has_options_of_its_own(folder: Path, renorm: Callable[[str], Ran]) -> None:
    words = "finetune nets.py:net two.npz -o new.pt --epochs 1 --lr 0.02 --policy all --regularisers l2_sp,delta"
    ran = renorm(f"{words} --options.l2_sp.alpha 0.5 --print-config")
    assert "  l2_sp:\n    alpha: 0.5\n    beta: 0.01\n" in ran.out
    assert "  delta:\n    weight: 0.01\n" in ran.out
    (folder / "run.yaml").write_text(ran.out)
    command = parse(Finetune, ["--config", "run.yaml", "--options.delta.probes", "2", '--options.delta.layers=["5"]'])
    assert isinstance(command, Finetune)
    assert command.recipe().regularisers == (L2SP(alpha=0.5), Delta(probes=2, layers=("5",)))
    assert command.written() == (
        "renorm finetune nets.py:net two.npz --policy all --regularisers l2_sp,delta --options.l2_sp.alpha 0.5 "
        "--options.delta.probes 2 --options.delta.layers '[\"5\"]' -o new.pt --epochs 1 --lr 0.02"
    )
    assert parse(Finetune, shlex.split(command.written())[2:]) == command
    assert renorm("finetune --config run.yaml").code == 0
    refused(renorm(f"{words} --options.l2_sp.alphaa 1"), "no option of the regulariser", "'--options.l2_sp.alpha'")
    refused(renorm(f"{words} --options.l2_sp.alpha -1 -o other.pt"), "alpha of l2_sp is a number of at least 0; got -1")
    refused(renorm("finetune nets.py:net two.npz -o x.pt --options.bss.k 2"), "belongs to a regulariser, and none was")
    assert "--options.delta.weight X" in renorm("finetune --regularisers delta --help").out


def test_of_several_processes_one_speaks_and_writes(
    folder: Path, renorm: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "finetune nets.py:net two.npz -o new.pt --epochs 1 --lr 0.02 --policy all --report page.html"
    monkeypatch.setenv("RANK", "1")
    second = renorm(words)
    assert (second.code, second.out, list(folder.glob("new.*")), list(folder.glob("page.*"))) == (0, "", [], [])
    monkeypatch.setenv("RANK", "0")
    assert "Trained for" in renorm(words).out
    assert (folder / "new.pt").exists()
    assert (folder / "page.html").exists()
