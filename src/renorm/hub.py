"""`hf:ORG/NAME` → a transformers classifier of images or texts, from a local folder, the cache, or, when asked, the hub.

Code that a model brings along is never run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from renorm.errors import ModelError, UsageError, require
from renorm.said import say, some
from renorm.texts import Tokenize, tokenizer_of

__all__ = ["HubModel", "Tokenize", "open_hub_model"]

# what PIL's numbers for resampling are called; nearest and the rest are rare, and bicubic is what renorm falls back to
RESAMPLING = {2: "bilinear", 3: "bicubic"}
TASKS = {  # what the classes of transformers end in → the automatic class that builds them
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
LONGEST = 512  # tokens, where neither the tokenizer nor the model says how many it takes


@dataclass(frozen=True)
class HubModel:
    """A model of the hub: `tokenize` turns texts into its inputs (None for images), `notes` say what was found missing."""

    module: nn.Module
    tokenize: Tokenize | None
    is_text: bool
    notes: tuple[str, ...]


def open_hub_model(name: str, *, num_classes: int | None = None, weights: bool = True, fetch: bool = False) -> HubModel:
    """Build the classifier that `name`, a local folder or ORG/NAME, describes, with its weights unless told otherwise.

    What is not in the folder or the cache is fetched only with `fetch`. The class names and the way from pixels to inputs
    are read from its files and lie in `module.pretrained_cfg`, as timm's do. Weights that the files lack are random (of
    seed 0), and a note names them. The global RNG is left as it was.

    Raises:
        ModelError: there is no such model here, it is no classifier of images or texts, or it brings its own code.
        MissingExtra: transformers is not installed.
    """
    transformers = require("transformers", extra="text", purpose=f"hf:{name}")
    if not name:
        raise UsageError("hf: names no model. Use hf:ORG/NAME, or hf:FOLDER with a config.json in it.")
    where: dict[str, Any] = {"local_files_only": not fetch, "trust_remote_code": False}
    with _silent(transformers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = _found(name, fetch, lambda: transformers.AutoConfig.from_pretrained(name, **where))
        builder = getattr(transformers, _task(name, config, transformers))
        is_text = "Sequence" in builder.__name__
        if num_classes is not None and num_classes != config.num_labels:
            config.num_labels = num_classes
        module, notes = _built(name, builder, config, where, weights=weights)
        tokenize, said = _tokenizer(name, transformers, config, where) if is_text else (None, ())
    about: dict[str, Any] = {"num_classes": config.num_labels}
    names = [str(config.id2label[k]) for k in range(config.num_labels)] if config.id2label else []
    if names and not all(label == f"LABEL_{k}" for k, label in enumerate(names)):
        about["label_names"] = tuple(names)
    if not is_text:
        pixels, more = _preprocessing(name, transformers, config, where)
        about |= pixels
        said += more
    module.pretrained_cfg = about  # type: ignore[assignment]  # timm's way of carrying it, so that it travels along
    return HubModel(module, tokenizer_of(module, tokenize), is_text, notes + said)


def _task(name: str, config: Any, transformers: Any) -> str:
    made = [str(each) for each in getattr(config, "architectures", None) or ()]
    for architecture in made:
        for ending, builder in TASKS.items():
            if architecture.endswith(ending):
                return builder
    if not made:  # a bare configuration says its family only
        for kind in ("Image", "Sequence"):
            if type(config) in getattr(transformers, f"MODEL_FOR_{kind.upper()}_CLASSIFICATION_MAPPING"):
                return f"AutoModelFor{kind}Classification"
    raise ModelError(
        f"hf:{name} is a {', '.join(made) or type(config).__name__}, and renorm opens classifiers of images or texts. Build "
        "others in a file of your own: file.py:factory, with forward= and output= in Python."
    )


def _built(
    name: str, builder: Any, config: Any, where: Mapping[str, Any], *, weights: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    folder = Path(name)
    if os.path.isdir(folder):
        held = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        if weights and not held:
            made = _found(name, False, lambda: builder.from_config(config))
            return made, (say("the folder holds no weights: they are random (seed 0)"),)
    if not weights:
        return _found(name, False, lambda: builder.from_config(config)), ()
    fetch = not where["local_files_only"]
    loaded, info = _found(
        name,
        fetch,
        lambda: builder.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **where
        ),
    )
    absent = sorted({*map(str, info["missing_keys"]), *(str(each[0]) for each in info["mismatched_keys"])})
    if not absent:
        return loaded, ()
    return loaded, (
        say(
            "{count} tensors are not in its weights, and random (seed 0): {some}", count=len(absent), some=some(absent)
        ),
    )


def _found(name: str, fetch: bool, get: Callable[[], Any]) -> Any:
    """What `get` gives; whatever transformers raises instead becomes one sentence."""
    try:
        return get()
    except Exception as error:
        said = " ".join(str(error).split())
        if "trust_remote_code" in said or "custom code" in said:
            raise ModelError(
                f"hf:{name} brings code of its own, which renorm does not run. Where you trust it, build it in a file of "
                "your own: file.py:factory."
            ) from error
        if os.path.isdir(name):  # unlike Path's, no error for a name that is too long
            raise ModelError(f"the folder {name} holds no model that transformers can build: {said[:200]}.") from error
        if isinstance(error, OSError) and not fetch:
            raise ModelError(
                f"hf:{name} is neither a folder nor in the cache of the hub. --pretrained (pretrained=True) fetches it; "
                "or give hf:FOLDER, as save_pretrained writes it."
            ) from error
        raise ModelError(f"hf:{name} could not be fetched or built: {type(error).__name__}: {said[:200]}.") from error


def _tokenizer(
    name: str, transformers: Any, config: Any, where: Mapping[str, Any]
) -> tuple[Tokenize | None, tuple[str, ...]]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:  # a tokenizer may be missing, half there, or need a package of its own
        said = " ".join(str(error).split())[:120]
        return None, (say("it has no tokenizer that can be opened, so texts cannot be read for it ({why})", why=said),)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers where the files are missing
        return None, (say("it has no tokenizer, so texts cannot be read for it"),)
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST)
    longest = int(min(limits))

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {key: value for key, value in found.items() if isinstance(value, Tensor)}

    return tokenize, (say("texts are cut after {longest} tokens", longest=longest),)


def _preprocessing(
    name: str, transformers: Any, config: Any, where: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """timm's description of a model's image processor, and what in it renorm does otherwise."""
    mixin = require("transformers.image_processing_base", extra="text", purpose=f"hf:{name}").ImageProcessingMixin
    try:
        said, _ = mixin.get_image_processor_dict(name, local_files_only=where["local_files_only"])
    except (OSError, ValueError):
        return {}, ()
    cut = _side(said.get("crop_size")) if said.get("do_center_crop") else None
    resized = _side(said.get("size"))
    final = cut or resized or _side(getattr(config, "image_size", None))
    if final is None:
        return {}, (say("its image processor states no size"),)
    share = min(1.0, min(final) / min(resized)) if cut and resized else float(said.get("crop_pct") or 1.0)
    normalised = said.get("do_normalize", True)
    notes: tuple[str, ...] = ()
    if not cut and isinstance(said.get("size"), Mapping) and "height" in said["size"]:
        notes = (
            say("its image processor squashes images to its size; renorm keeps their proportions and cuts the edges"),
        )
    return {
        "input_size": (int(getattr(config, "num_channels", 3)), *final),
        "mean": tuple(said["image_mean"]) if normalised and said.get("image_mean") else 0.0,
        "std": tuple(said["image_std"]) if normalised and said.get("image_std") else 1.0,
        "interpolation": RESAMPLING.get(said.get("resample", 2), "bicubic"),
        "crop_pct": share,
    }, notes


def _side(size: Any) -> tuple[int, int] | None:
    """(height, width) from the three ways in which image processors write a size."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and "height" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Inside, transformers neither logs nor draws: what it says of the weights comes back as notes."""
    said = transformers.utils.logging
    before, drawn = said.get_verbosity(), said.is_progress_bar_enabled()
    said.set_verbosity(said.CRITICAL)
    said.disable_progress_bar()
    try:
        yield
    finally:
        said.set_verbosity(before)
        if drawn:
            said.enable_progress_bar()
