"""A name, a path or a callable → a model in eval mode, with its checkpoint loaded.

    timm:NAME                  torchvision:NAME
    hf:ORG/NAME                hf:FOLDER
    file.py:factory            package.module:factory

A factory is a module, or something that returns one when called without arguments (or with `num_classes=`). A module with
a method `tokenize` takes texts (`texts.tokenizer_of`).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from renorm.checkpoints import Loaded, load_
from renorm.conventions import foreign_conventions
from renorm.errors import CheckpointError, ModelError, RenormError, UnknownName, UsageError, require
from renorm.fold import load_folded_, was_folded
from renorm.hub import HubModel, open_hub_model
from renorm.log import LOGGER
from renorm.preprocessing import Preprocessing, preprocessing_of
from renorm.said import say
from renorm.texts import Tokenize, tokenizer_of

__all__ = ["Model", "load_model", "open_model"]

FORMS = "timm:NAME, torchvision:NAME, hf:ORG/NAME, file.py:factory or package.module:factory"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as the command line opens it; `notes` say in words what a reader should know of its weights and input."""

    module: nn.Module
    spec: str
    preprocessing: Preprocessing | None  # None: it does not say, pixels are divided by 255 and no more
    classes: tuple[str, ...] | None  # the names of its outputs, where it carries them
    checkpoint: Loaded | None
    notes: tuple[str, ...]
    doubts: tuple[str, ...] = ()  # those of the notes that are about the module itself
    tokenize: Tokenize | None = None  # texts → its inputs, where it takes texts


def load_model(
    spec: str | nn.Module | Callable[..., nn.Module],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """The module of `open_model`, which also tells its preprocessing and what was loaded.

    What is to be known of its weights goes to the logger `renorm` as warnings: random ones, those that a checkpoint left
    out, batch norms with another library's conventions.
    """
    opened = open_model(spec, checkpoint=checkpoint, num_classes=num_classes, pretrained=pretrained)
    for note in opened.doubts:
        LOGGER.warning("%s: %s", opened.spec, note)
    return opened.module


def open_model(
    spec: str | nn.Module | Callable[..., nn.Module],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
) -> Model:
    """Build what `spec` names, load `checkpoint` into it, and put it in eval mode.

    `pretrained` fetches the weights that timm or torchvision publish, or finds them in their cache. Without it and
    without a checkpoint their weights are random (of seed 0), and a note says so. An `hf:` model comes with its weights,
    from the folder or the cache, and is fetched only with `pretrained`. The global RNG is left as it was for these three;
    a factory may use it.

    Raises:
        UsageError: no such form of name, or options that do not go together.
        UnknownName: no such model or factory; offers the nearest.
        ModelError: the file cannot be imported, or the factory fails or returns something else.
        CheckpointError: as `checkpoints.load_`.
        MissingExtra: timm or torchvision is not installed.
    """
    if pretrained and checkpoint is not None:
        raise UsageError("pretrained weights and a checkpoint were both asked for. Give one of them.")
    name = spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)
    source, _, rest = name.partition(":") if isinstance(spec, str) else ("", "", "")
    zoo = source in ("timm", "torchvision")
    if pretrained and not zoo and source != "hf":
        raise UsageError(f"{name} has no published weights that renorm could fetch. Give its weights as a checkpoint.")
    hub: HubModel | None = None
    if source == "timm":
        module = _from_timm(rest, num_classes, pretrained)
    elif source == "torchvision":
        module = _from_torchvision(rest, num_classes, pretrained)
    elif source == "hf":
        hub = open_hub_model(rest, num_classes=num_classes, weights=checkpoint is None, fetch=pretrained)
        module = hub.module
    elif isinstance(spec, str):
        module = _from_factory(spec, num_classes)
    else:
        module = _call(spec, name, num_classes)
    loaded = _loaded(module, checkpoint) if checkpoint is not None else None
    preprocessing = preprocessing_of(module)
    doubts = (loaded.notes if loaded else ()) + (hub.notes if hub else ())
    if zoo and not pretrained and loaded is None:
        doubts += (say("weights are random (seed 0): give a checkpoint, or ask for the pretrained ones"),)
    doubts += foreign_conventions(module)
    notes = doubts
    tokenize = hub.tokenize if hub else tokenizer_of(module)
    if preprocessing is None and tokenize is None and not (hub and hub.is_text):
        notes += (
            say("the model does not say how pixels become its input (no `pretrained_cfg`): they are divided by 255"),
        )
    return Model(
        module=module.eval(),
        spec=name,
        preprocessing=preprocessing,
        classes=_class_names(module),
        checkpoint=loaded,
        notes=notes,
        doubts=doubts,
        tokenize=tokenize,
    )


def _loaded(module: nn.Module, checkpoint: str | os.PathLike[str]) -> Loaded:
    """Load a checkpoint; one that `renorm fold` wrote makes a folded model of the module."""
    try:
        return load_(module, checkpoint)
    except CheckpointError:
        if not was_folded(checkpoint):
            raise
    return load_folded_(module, checkpoint)


def _from_timm(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    timm = require("timm", extra="images", purpose=f"timm:{name}")
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UnknownName("timm model", name, timm.list_models())
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        raise UnknownName("timm model", name, tagged or [base])
    options = {} if num_classes is None else {"num_classes": num_classes}
    return _build(lambda: timm.create_model(name, pretrained=pretrained, **options), f"timm:{name}", pretrained)


def _from_torchvision(name: str, num_classes: int | None, pretrained: bool) -> nn.Module:
    models = require("torchvision.models", extra="images", purpose=f"torchvision:{name}")
    if name not in models.list_models():
        raise UnknownName("torchvision model", name, models.list_models())
    best = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters and not pretrained:
        options["weights_backbone"] = None  # detection and segmentation models fetch these by default
    weights = best if pretrained else None
    module = _build(lambda: models.get_model(name, weights=weights, **options), f"torchvision:{name}", pretrained)
    if said := _preset(best.transforms(), num_classes or len(best.meta["categories"])):
        module.pretrained_cfg = said  # type: ignore[assignment]  # timm's way of carrying it, so that it travels along
    return module


def _preset(transform: Any, classes: int) -> dict[str, Any] | None:
    """timm's description of a torchvision preset for classification; None for the presets of other tasks."""
    if not hasattr(transform, "crop_size"):
        return None
    cut, resized = transform.crop_size[0], transform.resize_size[0]
    return {
        "input_size": (len(transform.mean), cut, cut),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": min(1.0, cut / resized),
        "num_classes": classes,
    }


def _build(make: Callable[[], nn.Module], name: str, pretrained: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return make()
        except Exception as error:
            if pretrained and isinstance(error, OSError):  # hub, connection and missing-file errors alike
                raise ModelError(
                    f"the pretrained weights of {name} could not be fetched, nor are they in the cache "
                    f"({_short(error)}). Check the connection, or fetch them elsewhere and give them as a checkpoint."
                ) from error
            raise ModelError(f"{name} could not be built: {_short(error)}.") from error


def _from_factory(spec: str, num_classes: int | None) -> nn.Module:
    place, _, factory = spec.rpartition(":")
    if spec.endswith(".py"):
        place, factory = spec, ""
    if not place:
        raise UsageError(f"{spec!r} names no model{_perhaps(spec)} Use {FORMS}.")
    is_file = place.endswith(".py")
    module = _import_file(Path(place)) if is_file else _import_module(place)
    found = getattr(module, factory, None)
    if not callable(found):
        known = _factories(module)
        if not factory:
            raise UsageError(f"{spec} names no factory. Known: {', '.join(known) or 'none'}. Use {place}:NAME.")
        raise UnknownName(f"factory in {place}:", factory, known)
    with _importable(Path(place).parent if is_file else Path.cwd()):
        return _call(found, spec, num_classes)


def _perhaps(spec: str) -> str:
    """A hint for a bare name that timm knows, where timm is installed."""
    known = importlib.util.find_spec("timm") and require("timm", extra="images", purpose=spec).is_model(spec)
    return f"; did you mean 'timm:{spec}'?" if known else "."


def _import_file(file: Path) -> ModuleType:
    if not os.path.isfile(file):
        raise ModelError(f"there is no file {file}. Correct the path.")
    # A name of our own: the file's may be that of an installed package.
    name = f"renorm_model_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file.resolve())
    assert found is not None
    assert found.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles look their module up here
    try:
        with _importable(file.parent):
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{file} cannot be imported: {_short(error)}{_where(error, file)}.") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise ModelError(
                f"there is no module {error.name!r} in the current folder or among the installed packages. Use {FORMS}."
            ) from error
        raise ModelError(f"{name} cannot be imported: it needs {error.name}, which is not installed.") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} cannot be imported: {_short(error)}.") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a model's file import its neighbours, as it could when run, and write no bytecode beside them."""
    before, path = sys.dont_write_bytecode, str(folder.resolve())
    sys.path.insert(0, path)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        if path in sys.path:
            sys.path.remove(path)


def _factories(module: ModuleType) -> list[str]:
    """Public names in `module` that may make a model: modules, and callables that it or its package defines."""
    root = _root(module.__name__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, nn.Module) or (callable(value) and _root(getattr(value, "__module__", "")) == root))
    )


def _root(module: object) -> str:
    return str(module).partition(".")[0]


def _call(factory: Any, name: str, num_classes: int | None) -> nn.Module:
    if isinstance(factory, nn.Module):
        if num_classes is not None:
            raise UsageError(f"{name} is a model already, num_classes={num_classes} cannot be given to it.")
        return copy.deepcopy(factory)  # so that what is done to it does not reach the next one who asks
    options = {} if num_classes is None else {"num_classes": num_classes}
    if options and not _takes(factory, "num_classes"):
        raise UsageError(f"{name} takes no num_classes. Leave it away, or give a factory that takes it.")
    try:
        made = factory(**options)
    except RenormError:
        raise
    except (Exception, SystemExit) as error:
        file = Path(inspect.getsourcefile(factory) or "") if inspect.isfunction(factory) else None
        raise ModelError(f"{name} failed: {_short(error)}{_where(error, file)}.{_needs(error, factory)}") from error
    if not isinstance(made, nn.Module):
        hint = " A state goes into a checkpoint file instead." if isinstance(made, Mapping) else ""
        raise ModelError(f"{name} returned a {type(made).__name__}, not a torch.nn.Module.{hint}")
    return made


def _takes(factory: Any, option: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables of C have no signature
        return True
    return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)


def _needs(error: BaseException, factory: Any) -> str:
    if (
        isinstance(error, TypeError)
        and "argument" in str(error)
        and len(traceback.extract_tb(error.__traceback__)) == 1
    ):
        return " It is called without arguments: write a factory that needs none."
    return ""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _where(error: BaseException, file: Path | None) -> str:
    """ " (file.py, line 3)": the deepest line of the user's own file that the error passed through."""
    if isinstance(error, SyntaxError) or file is None:
        return ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file.resolve()]
    return f" ({file.name}, line {lines[-1]})" if lines else ""


def _class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the outputs: `pretrained_cfg["label_names"]`, or the WordNet ids of ImageNet's 1,000 classes."""
    given = getattr(model, "pretrained_cfg", None)
    if not isinstance(given, Mapping):
        return None
    if names := given.get("label_names"):
        return tuple(map(str, names))
    if given.get("num_classes") == getattr(model, "num_classes", 1000) == 1000 and importlib.util.find_spec("timm"):
        info = require("timm.data", extra="images", purpose="class names").ImageNetInfo("imagenet-1k")
        return tuple(info.label_names())
    return None
