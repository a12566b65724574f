"""hub: classifiers of images and texts as transformers saves them, from a local folder, without the network."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import renorm
from renorm.checkpoints import write
from renorm.cli import main
from renorm.errors import MissingExtra, ModelError, UsageError
from renorm.models import open_model
from renorm.preprocessing import Preprocessing
from renorm.provenance import fingerprint
from tests.contracts.photograph import differences, photograph

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "very"]


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A tiny ResNet of transformers with random weights and the files that come with a published one."""
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label={0: "cat", 1: "dog", 2: "eel"},
    )
    torch.manual_seed(3)
    folder = tmp_path / "resnet"
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    said = {
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.3],
        "do_normalize": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT that sorts texts, with a tokenizer of nine words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path / "bert"
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        id2label={0: "no", 1: "yes"},
    )
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── images ──


def test_an_image_classifier_opens_with_its_weights_classes_and_preprocessing(resnet: Path) -> None:
    state = torch.get_rng_state()
    model = open_model(f"hf:{resnet}")
    assert torch.equal(torch.get_rng_state(), state)
    published = transformers.ResNetForImageClassification.from_pretrained(resnet)
    assert fingerprint(model.module) == fingerprint(published)
    assert not any(module.training for module in model.module.modules())
    assert model.classes == ("cat", "dog", "eel")
    assert model.preprocessing == Preprocessing(
        input_size=(3, 28, 28), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), interpolation="bicubic", crop=0.875
    )
    assert model.notes == ()
    assert model.tokenize is None


def test_every_verb_takes_it(resnet: Path) -> None:
    module = open_model(f"hf:{resnet}").module
    batches = [torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(k)) * 3 + 1 for k in range(3)]
    labelled = [{"pixel_values": x, "labels": torch.arange(6) % 3} for x in batches]
    before = photograph(module)
    adaptation = renorm.recalibrate_(module, batches, check=labelled)
    assert len(adaptation.shifts) == len(renorm.find_sites(module)) == 6
    adaptation.restore_()
    assert differences(before, photograph(module)) == []
    score = renorm.evaluate(module, labelled)
    with torch.no_grad():
        right = sum(int((module(x).logits.argmax(1) == torch.arange(6) % 3).sum()) for x in batches)
    assert score.value == right / 18
    assert renorm.verify(module, open_model(f"hf:{resnet}").module, batches).max_abs == 0
    assert renorm.diagnose(module, labelled).samples == 18


def test_other_classes_a_checkpoint_or_no_weights(resnet: Path, tmp_path: Path) -> None:
    five = open_model(f"hf:{resnet}", num_classes=5)
    assert five.module(torch.zeros(1, 3, 28, 28)).logits.shape == (1, 5)
    assert five.classes is None
    assert five.notes == (
        "2 tensors are not in its weights, and random (seed 0): classifier.1.bias, classifier.1.weight",
    )
    source = open_model(f"hf:{resnet}").module
    nn.init.constant_(source.classifier[1].bias, 7.0)
    write(source, tmp_path / "mine.safetensors", provenance={})
    given = open_model(f"hf:{resnet}", checkpoint=tmp_path / "mine.safetensors")
    assert fingerprint(given.module) == fingerprint(source)
    (resnet / "model.safetensors").unlink()
    bare = open_model(f"hf:{resnet}")
    assert bare.notes == ("the folder holds no weights: they are random (seed 0)",)
    assert fingerprint(bare.module) == fingerprint(open_model(f"hf:{resnet}").module)
    edit(resnet, architectures=None)
    assert type(open_model(f"hf:{resnet}").module).__name__ == "ResNetForImageClassification"


@pytest.mark.parametrize(
    ("said", "size", "crop", "note"),
    [
        ({"size": {"height": 20, "width": 24}}, (3, 20, 24), 1.0, "squashes images"),
        ({"size": {"shortest_edge": 24}, "crop_pct": 0.9}, (3, 24, 24), 0.9, ""),
        ({"size": 18, "do_normalize": False}, (3, 18, 18), 1.0, ""),
        ({"size": [18, 20]}, (3, 18, 20), 1.0, ""),
        ({"do_center_crop": False, "crop_size": 9, "size": 18}, (3, 18, 18), 1.0, ""),
    ],
)
def test_sizes_are_read_in_every_way_they_are_written(
    said: dict[str, Any], size: Any, crop: float, note: str, resnet: Path
) -> None:
    (resnet / "preprocessor_config.json").write_text(json.dumps(said))
    model = open_model(f"hf:{resnet}")
    assert model.preprocessing is not None
    assert (model.preprocessing.input_size, model.preprocessing.crop) == (size, crop)
    assert note in " ".join(model.notes)
    assert model.preprocessing.mean == (0.0,) * 3


def test_without_an_image_processor_it_says_so(resnet: Path) -> None:
    (resnet / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert "its image processor states no size" in open_model(f"hf:{resnet}").notes
    (resnet / "preprocessor_config.json").unlink()
    model = open_model(f"hf:{resnet}")
    assert model.preprocessing is None
    assert "does not say how pixels become its input" in model.notes[-1]


# ── texts ──


def test_a_text_classifier_opens_with_its_tokenizer(bert: Path) -> None:
    model = open_model(f"hf:{bert}")
    assert model.classes == ("no", "yes")
    assert model.notes == ("texts are cut after 12 tokens",)
    assert model.tokenize is not None
    found = model.tokenize(["a good film", "bad"])
    assert found["input_ids"].tolist() == [[2, 7, 4, 6, 3], [2, 5, 3, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert model.tokenize(["very " * 50])["input_ids"].shape == (1, 12)
    batches = [found | {"labels": torch.tensor([1, 0])}]
    score = renorm.evaluate(model.module, batches)
    with torch.no_grad():
        assert score.value == float((model.module(**found).logits.argmax(1) == torch.tensor([1, 0])).double().mean())
    assert {site.kind for site in renorm.find_sites(model.module)} == {"layer"}
    assert renorm.diagnose(model.module, batches).healthy
    with pytest.raises(renorm.NoBatchNorm, match="recalibrate_ needs batch norm"):
        renorm.recalibrate_(model.module, batches)


def test_a_missing_tokenizer_is_a_note(bert: Path) -> None:
    for file in bert.glob("*token*"):
        file.unlink()
    model = open_model(f"hf:{bert}")
    assert model.tokenize is None
    assert model.notes == ("it has no tokenizer, so texts cannot be read for it",)
    (bert / "tokenizer.json").write_text("{")
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "no tokenizer that can be opened" in open_model(f"hf:{bert}").notes[0]


# ── refused ──


def test_what_is_no_classifier_or_not_here_is_refused(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"hf:org/nosuch is neither a folder nor in the cache.*--pretrained"):
        open_model("hf:org/nosuch")
    with pytest.raises(ModelError, match=r"hf:org/nosuch could not be fetched or built: OSError"):
        open_model("hf:org/nosuch", pretrained=True)
    with pytest.raises(ModelError, match=r"is neither a folder nor in the cache"):
        open_model("hf:" + "y" * 5000)
    with pytest.raises(UsageError, match=r"hf: names no model\. Use hf:ORG/NAME"):
        open_model("hf:")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"the folder .*empty holds no model that transformers can build: "):
        open_model(f"hf:{tmp_path / 'empty'}")
    edit(resnet, architectures=["ResNetModel"])
    with pytest.raises(ModelError, match=r"is a ResNetModel, and renorm opens classifiers of images or texts"):
        open_model(f"hf:{resnet}")


def test_code_that_a_model_brings_is_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "evil", tmp_path / "trace"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Config: pass\nclass Net: pass\n")
    said = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "code.Config"},
        "architectures": ["NetForImageClassification"],
    }
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=r"brings code of its own, which renorm does not run"):
        open_model(f"hf:{folder}")
    assert not trace.exists()


def test_damaged_weights_are_refused(resnet: Path) -> None:
    path = resnet / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"the folder .*resnet holds no model that transformers can build"):
        open_model(f"hf:{resnet}")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r'hf:org/name needs transformers, .*"renorm\[text\]"'):
        open_model("hf:org/name")


def test_transformers_keeps_its_voice_for_others(resnet: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    transformers.utils.logging.enable_progress_bar()
    open_model(f"hf:{resnet}", num_classes=5)
    assert (logger.level, transformers.utils.logging.is_progress_bar_enabled()) == (before, True)
    assert capfd.readouterr() == ("", "")


# ── the command line ──


def test_a_hub_model_is_recalibrated_on_the_command_line(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 30, 30, 3)).astype(np.uint8)
    np.savez("far.npz", images=images // 8, labels=np.arange(40) % 3)
    assert main("recalibrate hf:resnet far.npz -o new.safetensors --prior 0".split()) == 0
    assert main("evaluate hf:resnet far.npz --checkpoint new.safetensors --format json".split()) == 0
    assert main("doctor hf:resnet far.npz --checkpoint new.safetensors".split()) == 0
    capsys.readouterr()
    assert main("doctor hf:org/nosuch far.npz".split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "neither a folder nor in the cache" in said.err


def test_a_text_model_is_evaluated_on_a_table_by_clinic(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f"{'very ' * (k % 4)}{('good', 'bad')[k % 2]} film,{('yes', 'no')[k % 2]},c{k % 3}" for k in range(12)]
    Path("films.csv").write_text("\n".join(["text,label,clinic", *rows]))
    assert main("evaluate hf:bert films.csv --inputs text --group clinic --format json".split()) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    model = open_model("hf:bert")
    assert model.tokenize is not None
    with torch.no_grad():
        logits = model.module(**model.tokenize([row.partition(",")[0] for row in rows])).logits
    truth = torch.tensor([1, 0] * 6)  # the model's classes are no and yes
    assert result["value"] == pytest.approx(float((logits.argmax(1) == truth).double().mean()))
    assert {group["group"] for group in result["groups"]} == {"c0", "c1", "c2"}
    assert main("doctor hf:bert films.csv --inputs text --group clinic".split()) == 0
