"""split on nets of transformers, built from random configurations, and what goes by it: rates by depth, stages in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import renorm
from renorm.events import Epoch, Finished
from renorm.finetune import finetune_, training
from renorm.groups import check_groups, parameter_groups
from renorm.recipe import Recipe
from renorm.sites import parameters_of
from renorm.split import split

transformers: Any = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 5,
}
WORDS: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0}
PATCHES = {"image_size": 16, "patch_size": 8}


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **PATCHES))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **WORDS))


def distilbert() -> Any:
    sizes = {"dim": 16, "n_layers": 5, "n_heads": 2, "hidden_dim": 32, "num_labels": 5}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes, **WORDS))


def roberta() -> Any:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, **WORDS))


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 5, "n_head": 2, "num_labels": 5, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **WORDS))


def llama() -> Any:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, **WORDS))


def clip() -> Any:
    vision = {name: value for name, value in SMALL.items() if name != "num_labels"}
    return transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config={**vision, **PATCHES}))


def swin() -> Any:
    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "image_size": 32, "patch_size": 2}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, window_size=2))


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "num_layers": 4, "num_heads": 2, "d_ff": 32, "num_labels": 5}
    return transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, **WORDS))


def bart() -> Any:
    sizes = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in LAYERS.items()}
    config = transformers.BartConfig(d_model=16, vocab_size=40, max_position_embeddings=20, num_labels=5, **sizes)
    return transformers.BartForSequenceClassification(config)


def wav2vec2() -> Any:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    return transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(**SMALL, **convolutions, **positions)
    )


def whisper() -> Any:
    sizes = {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in LAYERS.items()}
    words = {name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10, "classifier_proj_size": 8}
    config = transformers.WhisperConfig(d_model=16, vocab_size=40, num_labels=5, **sizes, **words, **lengths)
    return transformers.WhisperForAudioClassification(config)


LAYERS = {"layers": 3, "attention_heads": 2, "ffn_dim": 16}
NETS: dict[Callable[[], Any], tuple[tuple[str, ...], str, str, int]] = {
    # net: head, a weight of the first stage, one of the last, stages
    vit: (("classifier",), "vit.embeddings.cls_token", "vit.layernorm.weight", 6),
    bert: (("classifier",), "bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", 7),
    distilbert: (
        ("pre_classifier", "classifier"),
        "distilbert.embeddings.LayerNorm.bias",
        "distilbert.transformer.layer.4.ffn.lin1.weight",
        6,
    ),
    roberta: (
        ("classifier",),
        "roberta.embeddings.word_embeddings.weight",
        "roberta.encoder.layer.4.output.dense.bias",
        6,
    ),
    gpt2: (("score",), "transformer.wte.weight", "transformer.ln_f.weight", 7),
    llama: (("score",), "model.embed_tokens.weight", "model.norm.weight", 6),
    clip: (("classifier",), "vision_model.embeddings.class_embedding", "vision_model.post_layernorm.bias", 6),
    swin: (("classifier",), "swin.embeddings.patch_embeddings.projection.weight", "swin.layernorm.weight", 5),
    t5: (("classification_head",), "transformer.shared.weight", "transformer.decoder.final_layer_norm.weight", 9),
    bart: (("classification_head",), "model.shared.weight", "model.decoder.layers.2.final_layer_norm.bias", 9),
    wav2vec2: (
        ("projector", "classifier"),
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight",
        "wav2vec2.encoder.layers.4.final_layer_norm.bias",
        8,
    ),
    whisper: (("classifier",), "encoder.conv1.weight", "projector.bias", 7),
}


@pytest.mark.parametrize("make", NETS)
def test_embeddings_come_first_the_last_norm_last_and_the_classifier_is_the_head(make: Callable[[], Any]) -> None:
    head, first, last, stages = NETS[make]
    model = make()
    found = split(model)
    names = parameters_of(model)
    assert found.head == head
    assert len(found.stages) == stages
    assert first in names
    assert last in names
    assert (found.stage_of(first), found.stage_of(last)) == (0, stages - 1)
    for stage in range(stages + 1):
        assert any(found.stage_of(name) == stage for name in names), f"stage {stage} holds no weight of its own"


def test_a_base_model_has_no_head() -> None:
    assert split(bert().bert).head == ()
    assert split(clip().vision_model).head == ()


@pytest.mark.parametrize("make", NETS)
def test_rates_fall_from_stage_to_stage_towards_the_embeddings(make: Callable[[], Any]) -> None:
    model, parts = make(), split(make())
    groups = parameter_groups(model, 1e-3, head_lr=3e-3, depth_decay=0.5, weight_decay=0.01)
    check_groups(model, groups)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in parameters_of(model).items():
        stage = parts.stage_of(name)
        wanted = 3e-3 if stage == len(parts.stages) else 1e-3 * 0.5 ** (len(parts.stages) - 1 - stage)
        if parameter.requires_grad:  # whisper's positions never do
            assert rates[id(parameter)] == pytest.approx(wanted), name


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    pixels = torch.randn(24, 3, 16, 16, generator=generator) + 2 * nn.functional.one_hot(labels, 3)[:, :, None, None]
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(8), labels.split(8), strict=True)]


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    tokens = torch.randint(10, 40, (24, 6), generator=generator)
    tokens[:, 0] = 1 + labels
    mask = torch.ones_like(tokens)
    return [
        {"input_ids": x, "attention_mask": m, "labels": y}
        for x, m, y in zip(tokens.split(8), mask.split(8), labels.split(8), strict=True)
    ]


@pytest.mark.parametrize(("make", "batches"), [(vit, images), (bert, texts)], ids=["vit", "bert"])
def test_stages_thaw_in_turn_from_the_head(make: Callable[[], Any], batches: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, moved = make(), []
    parts, before = split(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    for event in training(model, batches(), None, Recipe(epochs=4, lr=0.01, gradual=True, policy="all", head="keep")):
        if isinstance(event, Epoch):
            moved.append({parts.stage_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])})
    assert isinstance(event, Finished)
    stages = len(parts.stages)
    assert moved[0] == {stages}, "the head alone"
    assert min(moved[1]) == stages // 2, "then the later half of the stages"
    assert moved[2] == set(range(stages + 1))


@pytest.mark.parametrize(("make", "batches"), [(vit, images), (bert, texts)], ids=["vit", "bert"])
def test_a_new_head_learns_on_them_and_everything_is_given_back(
    make: Callable[[], Any], batches: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    model, train = make(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = {"epochs": 12, "lr": 0.02, "depth_decay": 0.8, "policy": "all", "average": "ema"}
    result = finetune_(model, train, train, classes=["a", "b", "c"], head="new", **plan)
    assert result.value is not None
    assert result.value > 0.9
    assert model.config.num_labels == 3
    assert renorm.evaluate(model, train).value == result.value
    result.restore_()
    assert model.config.num_labels == 5
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_norm_layers_of_a_transformer_train_alone() -> None:
    torch.manual_seed(0)
    model = vit()
    result = finetune_(model, images(), policy="affine-and-head", epochs=2, lr=0.01, head="keep")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in result.moved} <= {
        "layernorm_before",
        "layernorm_after",
        "layernorm",
        "classifier",
    }
    assert len(result.moved) == 2 * (5 * 2 + 1) + 2
