"""texts: a model's own tokenizer, what it gives looked at; a text network through the verbs, straight from a table."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import renorm
from renorm import layers
from renorm.cli import main
from renorm.errors import DataError, ModelError
from renorm.models import open_model
from renorm.texts import tokenizer_of
from tests.contracts.photograph import differences, photograph

pytest.importorskip("pandas")

FACTORY = """
import torch
from torch import nn
from renorm import layers

WORDS = ["good", "fine", "bad", "poor", "book", "film", "pan"]

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(len(WORDS) + 1, 8, padding_idx=0)
        self.convolution, self.norm = nn.Conv1d(8, 8, 3, padding=1), layers.BatchNorm(8)
        self.head = nn.Linear(8, 2)

    def tokenize(self, texts):
        rows = [[WORDS.index(word) + 1 for word in text.split() if word in WORDS] for text in texts]
        ids = torch.zeros(len(texts), 6, dtype=torch.long)
        for row, found in zip(ids, rows):
            row[: len(found)] = torch.tensor(found)
        return {"input_ids": ids, "mask": ids > 0}

    def forward(self, input_ids, mask):
        x = self.norm(self.convolution(self.embedding(input_ids).transpose(1, 2)), mask=mask)
        return self.head((x.relu() * mask[:, None]).amax(2))

class Recurrent(Reader):
    def __init__(self):
        super().__init__()
        del self.convolution, self.norm
        self.rnn = layers.BNLSTM(8, 4, steps=6, batch_first=True, bidirectional=True)

    def forward(self, input_ids, mask):
        output, _ = self.rnn(self.embedding(input_ids), lengths=mask.sum(1))
        return self.head(output.sum(1) / mask.sum(1, keepdim=True))

class Encoder(Reader):
    def __init__(self):
        super().__init__()
        del self.convolution, self.norm
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, input_ids, mask):
        x = self.encoder(self.embedding(input_ids), src_key_padding_mask=~mask)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

reader = Reader
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A factory and a table of reviews, packed as such tables are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reader.py").write_text(FACTORY)
    kinds = (("good", 1), ("fine", 1), ("bad", 0), ("poor", 0))
    lines = [
        f"{domain},{label},a {word} {domain} {' '.join(['and'] * (k % 3))} {word}"
        for k in range(6)
        for word, label in kinds
        for domain in ("book", "film", "pan")
    ]
    with gzip.open(tmp_path / "reviews.csv.gz", "wt") as file:
        file.write("\n".join(["domain,label,text", *lines]) + "\n")
    return tmp_path


ABOUT = ("--inputs", "text", "--labels", "label", "--group", "domain")


def test_every_verb_reads_texts_from_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = (*ABOUT, "--batch-size", "16", "--quiet")
    for verb, out, more in (
        ("finetune", "tuned.safetensors", ("--epochs", "4")),
        ("evaluate", "", ("--checkpoint", "tuned.safetensors")),
        ("observe", "seen.safetensors", ("--checkpoint", "tuned.safetensors")),
        ("recalibrate", "mended.safetensors", ("--checkpoint", "tuned.safetensors")),
        ("doctor", "", ("--checkpoint", "tuned.safetensors", "--fail-on", "never")),
    ):
        output = ("-o", out) if out else ()
        code = main([verb, "reader.py:reader", "reviews.csv.gz", *about, *output, *more])
        said = capsys.readouterr()
        assert code == 0, (verb, said.out, said.err)
        assert "divided by 255" not in said.out
        assert not out or (folder / out).exists()
        if verb == "evaluate":
            assert all(name in said.out for name in ("book", "film", "pan"))


def test_a_recurrent_reader_goes_through_every_verb_step_by_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of two to six words: a place for each step that was reached, and padding counts for none."""
    about = (*ABOUT, "--batch-size", "16", "--quiet")
    assert (
        main(["pretrain", "reader.py:Recurrent", "reviews.csv.gz", *about, "--epochs", "2", "-o", "a.safetensors"]) == 0
    )
    for verb, more in (
        ("evaluate", ()),
        ("observe", ("-o", "seen.safetensors")),
        ("recalibrate", ("-o", "mended.safetensors")),
        ("finetune", ("--epochs", "1", "-o", "tuned.safetensors")),
        ("doctor", ("--fail-on", "never")),
    ):
        code = main([verb, "reader.py:Recurrent", "reviews.csv.gz", *about, "--checkpoint", "a.safetensors", *more])
        said = capsys.readouterr()
        assert code == 0, (verb, said.out, said.err)
        assert "Shared between places" not in said.out
    seen = renorm.Observation.load(folder / "seen.safetensors")
    assert {name.split("@")[0] for name in seen} == {
        f"rnn.{norm}{end}" for norm in ("input", "hidden", "cell") for end in ("", "_reverse")
    }
    counts = [seen[f"rnn.input@{step}"].values.count for step in range(3)]
    assert counts[0] == counts[1] == counts[2] == seen.samples


def test_layer_norms_are_tuned_alone_and_kept_as_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = ("reader.py:Encoder", "reviews.csv.gz", *ABOUT, "--batch-size", "16", "--quiet")
    assert main(["pretrain", *about, "--epochs", "1", "-o", "base.safetensors"]) == 0
    kept = ("--checkpoint", "base.safetensors", "--policy", "affine-only", "--head", "keep", "--epochs", "2")
    assert main(["finetune", *about, *kept, "-o", "tuned.safetensors"]) == 0
    assert main(["recalibrate", *about, "--checkpoint", "base.safetensors", "-o", "no.safetensors"]) == 2
    assert "Encoder has none (it has 2 norm layers of kind layer)" in " ".join(capsys.readouterr().err.split())
    base, tuned = (
        open_model("reader.py:Encoder", checkpoint=f"{name}.safetensors").module for name in ("base", "tuned")
    )
    moved = {name for name, value in base.state_dict().items() if not torch.equal(value, tuned.state_dict()[name])}
    assert moved == {f"encoder.norm{k}.{part}" for k in (1, 2) for part in ("weight", "bias")}
    renorm.save_adapter(tuned, "kitchen.safetensors")
    renorm.load_adapter_(base, "kitchen.safetensors")
    inputs = base.tokenize(["good book", "bad pan pan"])  # type: ignore[operator]
    assert torch.equal(base(**inputs), tuned(**inputs))


def test_padding_moves_no_moments_where_a_mask_is_given(folder: Path) -> None:
    model = open_model("reader.py:reader").module
    norm: Any = model.norm
    texts = ["good book", "bad", "fine film pan good poor"]
    batch = model.tokenize(texts)  # type: ignore[operator]
    want = []
    hook = norm.register_forward_pre_hook(lambda module, args: want.append(args[0].movedim(1, -1)[batch["mask"]]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    before = photograph(model)
    seen = renorm.observe(model, [(batch, torch.zeros(3))], under="running")["norm"].values
    assert seen.count == 8
    torch.testing.assert_close(seen.mean, want[0].double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.var, want[0].double().var(0, correction=0), rtol=1e-4, atol=1e-6)
    assert not differences(before, photograph(model))
    renorm.recalibrate_(model, [batch], prior=0)
    torch.testing.assert_close(norm.running_mean.double(), want[0].double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_a_mask_fits_channels_anywhere(axis: int) -> None:
    norm = layers.BatchNorm(3, axis=axis).eval()
    x, mask = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3:] = False
    given = x.movedim(-1, axis)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.norm(x, mask)
            return y

    seen = renorm.observe(Masked().eval(), [{"x": given, "mask": mask}], under="running")["norm"].values
    torch.testing.assert_close(seen.mean, x[mask].double().mean(0), rtol=1e-5, atol=1e-6)


def read_by(make: Any, words: int = 5) -> Any:
    model = nn.Module()
    model.embedding = nn.Embedding(words, 2)
    return tokenizer_of(model, make)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (torch.zeros(2, 3), ModelError, "was given 2 texts and made Tensor .*one row for each text"),
        ({"ids": torch.zeros(3, 3)}, ModelError, r"made dict \[\(3, 3\)\] of them"),
        ({"ids": torch.tensor([[1], [9]])}, ModelError, "numbers words from 1 to 9, and the model's embedding has 5"),
        (
            {"ids": torch.zeros(2, 0).long()},
            DataError,
            "in 2 of 2 texts, 'one' first, the model's tokenizer finds no word",
        ),
        (
            {"ids": torch.zeros(2, 2).long(), "mask": torch.tensor([[1, 0], [0, 0]])},
            DataError,
            "in 1 of 2 texts, 'two and .*…' first",
        ),
    ],
)
def test_what_a_tokenizer_gives_is_looked_at(made: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        read_by(lambda texts: made)(["one", "two and " * 9])


def test_a_model_without_one_takes_no_texts() -> None:
    assert tokenizer_of(nn.Linear(1, 1)) is None
    assert read_by(lambda texts: {"ids": torch.tensor([[4]])})(["a"])["ids"].tolist() == [[4]]
