"""One tiny model of every kind that renorm must find its way in, with the sites it should find there.

A test over `CASES` covers them all. `case.build()` gives the same weights and non-trivial statistics each time, in
evaluation mode; `case.batch(samples, seed)` gives something to call it with.
"""

from __future__ import annotations

import copy
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from renorm.layers import BNGRU, BNLSTM
from tests import animals
from tests.animals import convs

Place = tuple[str, str, int]  # name, kind, channels
SIZES = (6, 6, 2)  # samples in the batches of a case
WITHOUT = ("no-norm", "tokens")  # cases in which no batch norm stands


def itself(x: Tensor) -> Any:
    return x


@dataclass(frozen=True)
class Case:
    """A model, what to feed it, and the sites to be found in it.

    silent   sites of kind "batch" that hold no statistics
    idle     sites with statistics that no batch reaches
    needs    a package without which the case is skipped
    tags     what is special: "wrapped" "compiled" "group" "keras" "lazy" "slots" "functional" "narrow" "modes" "many"
    """

    name: str
    make: Callable[[], nn.Module]
    sites: tuple[Place, ...] | Callable[[nn.Module], tuple[Place, ...]] = ()
    shape: tuple[int, ...] = (3, 6, 6)
    pack: Callable[[Tensor], Any] = itself
    forward: Callable[[nn.Module, Any], Any] | None = None
    output: Callable[[Any], Tensor] | None = None
    silent: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    needs: str = ""
    tags: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """The model with seeded weights, affine parameters and running statistics, in evaluation mode."""
        if self.needs:
            os.environ.setdefault("KERAS_BACKEND", "torch")
            pytest.importorskip(self.needs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.make()

    def batch(self, samples: int = 8, seed: int = 0) -> Any:
        """What a loader would give: `samples` images of standard deviation 2 around 0.5."""
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(samples, *self.shape, generator=generator) * 2 + 0.5
        return self.pack(x.to(self.dtype))

    def batches(self) -> list[Any]:
        """A loader's worth: two batches, and a ragged last one."""
        return [self.batch(samples, seed) for seed, samples in enumerate(SIZES)]

    def settled(self) -> nn.Module:
        """The model after whatever Keras does to itself when it is first called or copied."""
        model = self.build()
        if "keras" in self.tags:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # its arrays, under numpy 2
                self.call(model, self.batch())
                copy.deepcopy(model)
        return model

    def call(self, model: nn.Module, batch: Any) -> Any:
        """The model's output, as a user would get it."""
        return model(batch) if self.forward is None else self.forward(model, batch)

    def places(self, model: nn.Module) -> tuple[Place, ...]:
        """The expected sites, in order."""
        return self.sites if isinstance(self.sites, tuple) else self.sites(model)

    def reached(self, model: nn.Module) -> list[str]:
        """Names of the batch norm sites that a batch reaches."""
        return [n for n, kind, _ in self.places(model) if kind == "batch" and n not in self.idle]

    def __str__(self) -> str:
        return self.name


def lived(model: nn.Module) -> nn.Module:
    """`model` as training leaves it, in evaluation mode: statistics, counters and affine off their defaults."""
    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor) and not isinstance(mean, nn.UninitializedBuffer):
                mean.normal_(0.1, 0.4)
                var.uniform_(0.5, 2.0)
                counter = getattr(module, "num_batches_tracked", None)
                if counter is not None:
                    counter.fill_(7)
                for name, middle in (("weight", 1.0), ("bias", 0.0)):
                    if isinstance(tensor := getattr(module, name, None), Tensor):
                        tensor.uniform_(middle - 0.4, middle + 0.4)
    return model.eval()


def torch_batch_norms(model: nn.Module) -> tuple[Place, ...]:
    """The expectation for library nets whose batch norms all descend from torch's, from their own list of modules."""
    return tuple(
        (n, "batch", m.num_features) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)
    )


def _one(name: str = "1", channels: int = 4) -> tuple[Place, ...]:
    return ((name, "batch", channels),)


def _plain() -> nn.Module:
    return lived(convs(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))


PLAIN: tuple[Place, ...] = (("1", "batch", 4), ("4", "batch", 4))


def _features(*norms: nn.Module) -> nn.Module:
    parts: list[nn.Module] = []
    for norm in norms:
        parts += [nn.Linear(5, 5), norm, nn.ReLU()]
    return lived(nn.Sequential(*parts, nn.Linear(5, 3)))


def _half(dtype: torch.dtype) -> nn.Module:
    return _plain().to(dtype)


def _mixed_modes() -> nn.Module:
    model = _plain()
    model[1].train()
    model[2].train()
    return model


def _no_statistics(*, keep_buffers: bool) -> nn.Module:
    model = lived(convs(nn.BatchNorm2d(4, track_running_stats=keep_buffers), nn.BatchNorm2d(4)))
    model[1].track_running_stats = False
    return model


def _lazy(*, seen: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        model = convs(nn.LazyBatchNorm2d(), nn.BatchNorm2d(4))
    if seen:
        model.eval()(torch.randn(2, 3, 6, 6))
    return lived(model)


def _timm_act() -> nn.Module:
    from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNorm2d

    return lived(convs(BatchNormAct2d(4), FrozenBatchNormAct2d(4), GroupNormAct(4, 2), LayerNorm2d(4)))


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return lived(timm.create_model(name, num_classes=3, **options))


def _torchvision_frozen() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return lived(convs(FrozenBatchNorm2d(4), nn.BatchNorm2d(4)))


def _quantisation_aware() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import torch.ao.nn.intrinsic.qat as qat
        from torch.ao.quantization import get_default_qat_qconfig

        config = get_default_qat_qconfig("fbgemm")
        first, second = qat.ConvBn2d(3, 4, 3, qconfig=config), qat.ConvBnReLU2d(4, 4, 3, qconfig=config)
        model = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        model(torch.randn(4, 3, 6, 6))  # the observers take their shapes from a first batch, and move with every other
    return lived(model)


def _keras_lived(model: Any) -> nn.Module:
    with torch.no_grad():
        for variable in model.trainable_variables:
            variable.value.normal_(0, 0.3)  # Keras draws its weights from Python's generator, which nobody seeded
        for layer in model._flatten_layers():
            if type(layer).__name__ == "BatchNormalization":
                layer.moving_mean.value.normal_(0.1, 0.4)
                layer.moving_variance.value.uniform_(0.5, 2.0)
                layer.gamma.value.uniform_(0.6, 1.4)
                layer.beta.value.uniform_(-0.4, 0.4)
    return model.eval()


@contextmanager
def _keras_building() -> Iterator[Any]:
    with warnings.catch_warnings():
        # Keras 3.15 calls numpy's __array__ without the keyword that numpy 2 asks for
        warnings.simplefilter("ignore", DeprecationWarning)
        import keras

        if keras.backend.backend() != "torch":
            pytest.skip("Keras runs on another backend here")
        yield keras


def _keras_sequential() -> nn.Module:
    with _keras_building() as k:
        inner = k.Sequential([k.Input((4, 4, 4)), k.layers.BatchNormalization(name="deep")], name="inner")
        parts = [k.Input((6, 6, 3)), k.layers.Conv2D(4, 3), k.layers.BatchNormalization(name="bn"), inner]
        parts += [k.layers.Dropout(0.5), k.layers.LayerNormalization(name="ln"), k.layers.GlobalAveragePooling2D()]
        return _keras_lived(k.Sequential([*parts, k.layers.Dense(3)]))


def _keras_functional() -> nn.Module:
    with _keras_building() as k:
        entry = k.Input((3, 6, 6))
        x = k.layers.BatchNormalization(axis=1, name="first")(entry)
        twice = k.layers.BatchNormalization(axis=1, name="twice")
        x = k.layers.GlobalAveragePooling2D(data_format="channels_first")(twice(twice(x) + 1))
        return _keras_lived(k.Model(entry, k.layers.Dense(3)(x)))


def _keras_within_torch() -> nn.Module:
    with _keras_building() as k:
        layer = k.layers.BatchNormalization(axis=1)
        layer.build((None, 4, 6, 6))
        model = convs(nn.BatchNorm2d(4), layer)
        _keras_lived(layer)
    return lived(model)


def _compiled(how: str, *, warm: bool) -> nn.Module:
    model: Any = _plain()
    # what is found and measured must not hang on the backend; "eager" needs no compiler on the machine
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "part":
        model = nn.Sequential(torch.compile(model[:5], backend="eager"), *model[5:]).eval()
    elif how == "in place":
        model.compile(backend="eager")
    else:
        for part in model[:2]:
            part.compile(backend="eager")
    if warm:
        with torch.no_grad():
            model(torch.randn(8, 3, 6, 6))
    return model


def join_group_of_one() -> None:
    """Initialise torch.distributed in this process alone, unless it is; `leave_group` undoes it."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _distributed() -> nn.Module:
    join_group_of_one()
    return nn.parallel.DistributedDataParallel(_plain()).eval()


def _timm_ema() -> nn.Module:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(_plain(), decay=0.9)


def _image_and_depth(x: Tensor) -> dict[str, Tensor]:
    return {"image": x, "depth": x[:, :1] * 2}


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output.logits


def _steps(name: str, channels: int) -> tuple[Place, ...]:
    return tuple((f"{name}@{step}", "batch", channels) for step in range(4))


_OTHERS: tuple[Place, ...] = (
    ("1", "group", 4),
    ("4", "instance", 4),
    ("7", "instance", 4),
    ("10", "batch", 4),
)

CASES: list[Case] = [
    # ── torch's own ──
    Case("bn2d", _plain, PLAIN),
    Case("bn1d", lambda: _features(nn.BatchNorm1d(5), nn.BatchNorm1d(5)), _one(channels=5) + _one("4", 5), shape=(5,)),
    Case(
        "bn1d-sequence",
        lambda: lived(nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU())),
        _one(),
        shape=(3, 7),
    ),
    Case(
        "bn3d",
        lambda: lived(nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.ReLU())),
        _one(),
        shape=(2, 3, 4, 4),
    ),
    Case("sync", lambda: lived(convs(nn.SyncBatchNorm(4), nn.BatchNorm2d(4))), PLAIN),
    Case("lazy", lambda: _lazy(seen=False), _one("1", 0) + _one("4"), tags=_tags("lazy")),
    Case("lazy-seen", lambda: _lazy(seen=True), PLAIN),
    Case("no-affine", lambda: lived(convs(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))), PLAIN),
    Case("momentum-none", lambda: lived(convs(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4))), PLAIN),
    Case("no-statistics", lambda: _no_statistics(keep_buffers=False), PLAIN, silent=("1",)),
    Case("untracked-statistics", lambda: _no_statistics(keep_buffers=True), PLAIN),
    Case("large-eps", lambda: lived(convs(nn.BatchNorm2d(4, eps=1e-1, momentum=0.01))), _one()),
    Case("mixed-modes", _mixed_modes, PLAIN, tags=_tags("modes")),
    Case("dropout", lambda: lived(nn.Sequential(nn.Dropout(0.5), *_plain())), (("2", "batch", 4), ("5", "batch", 4))),
    Case("root", lambda: lived(nn.BatchNorm2d(3)), (("", "batch", 3),)),
    Case("shared", lambda: lived(animals.SharedNorm()), _one("first")),
    Case("called-twice", lambda: lived(animals.CalledTwice()), _one("bn")),
    Case("never-called", lambda: lived(animals.NeverCalled()), _one("used") + _one("spare", 5), idle=("spare",)),
    # ── precision ──
    Case("float64", lambda: _half(torch.float64), PLAIN, dtype=torch.float64),
    Case("bfloat16", lambda: _half(torch.bfloat16), PLAIN, dtype=torch.bfloat16, tags=_tags("narrow")),
    Case("float16", lambda: _half(torch.float16), PLAIN, dtype=torch.float16, tags=_tags("narrow")),
    # ── other kinds ──
    Case(
        "other-kinds",
        lambda: lived(
            convs(
                nn.GroupNorm(2, 4),
                nn.InstanceNorm2d(4, affine=True),
                nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
                nn.BatchNorm2d(4),
            )
        ),
        _OTHERS,
    ),
    Case(
        "tokens",
        lambda: _features(nn.LayerNorm(5), nn.RMSNorm(5), animals.ToyRMSNorm(5)),
        (("1", "layer", 5), ("4", "rms", 5), ("7", "rms", 5)),
        shape=(6, 5),
    ),
    Case("no-norm", lambda: lived(convs(nn.Identity())), ()),
    Case("look-alike", lambda: lived(convs(animals.LookAlike(), nn.BatchNorm2d(4))), _one("4")),
    Case(
        "named-like-a-norm", lambda: lived(convs(animals.BatchNormReLU(4), nn.BatchNorm2d(4))), _one("1.bn") + _one("4")
    ),
    Case("functional", lambda: lived(animals.Functional()), _one("bn"), tags=_tags("functional")),
    # ── frozen copies, libraries ──
    Case("frozen-four", lambda: lived(convs(animals.FrozenInFour(4), nn.BatchNorm2d(4))), PLAIN),
    Case("frozen-hidden-eps", lambda: lived(convs(animals.FrozenWithHiddenEps(4), nn.BatchNorm2d(4))), PLAIN),
    Case("frozen-torchvision", _torchvision_frozen, PLAIN, needs="torchvision"),
    Case(
        "timm-norm-act",
        _timm_act,
        (("1", "batch", 4), ("4", "batch", 4), ("7", "group", 4), ("10", "layer", 4)),
        needs="timm",
    ),
    Case(
        "timm-resnet",
        lambda: _timm("resnet10t", channels=(4, 4, 8, 8), stem_width=4),
        torch_batch_norms,
        shape=(3, 32, 32),
        needs="timm",
        tags=_tags("many"),
    ),
    Case(
        "timm-efficientnet",
        lambda: _timm("test_efficientnet", bn_eps=1e-3),
        torch_batch_norms,
        shape=(3, 32, 32),
        needs="timm",
        tags=_tags("many"),
    ),
    Case("quantisation-aware", _quantisation_aware, _one("0.bn") + _one("1.bn")),
    Case(
        "keras-sequential",
        _keras_sequential,
        (("bn", "batch", 4), ("inner.deep", "batch", 4), ("ln", "layer", 4)),
        shape=(6, 6, 3),
        needs="keras",
        tags=_tags("keras"),
    ),
    Case(
        "keras-functional", _keras_functional, _one("first", 3) + _one("twice", 3), needs="keras", tags=_tags("keras")
    ),
    Case("keras-within-torch", _keras_within_torch, PLAIN, needs="keras", tags=_tags("keras")),
    # ── batches and outputs ──
    Case(
        "two-inputs-by-name",
        lambda: lived(animals.TwoInputs()),
        _one("bn"),
        pack=_image_and_depth,
        forward=lambda model, batch: model(**batch),
    ),
    Case(
        "two-inputs",
        lambda: lived(animals.TwoInputs()),
        _one("bn"),
        pack=lambda x: (x, x[:, :1] * 2),
        forward=lambda model, batch: model(*batch),
    ),
    Case(
        "takes-a-dict",
        lambda: lived(animals.TakesDict()),
        _one("net.1"),
        pack=_image_and_depth,
        forward=lambda model, batch: model(batch),
    ),
    Case("returns-dict", lambda: lived(animals.Returns(animals.as_dict)), _one("bn"), output=_logits),
    Case("returns-dataclass", lambda: lived(animals.Returns(animals.as_answer)), _one("bn"), output=_logits),
    Case("returns-tuple", lambda: lived(animals.Returns(animals.as_tuple)), _one("bn"), output=lambda out: out[0]),
    # ── wrapped ──
    Case("compiled", lambda: _compiled("whole", warm=False), PLAIN, tags=_tags("wrapped", "compiled")),
    Case("compiled-warm", lambda: _compiled("whole", warm=True), PLAIN, tags=_tags("wrapped", "compiled")),
    Case("compiled-part", lambda: _compiled("part", warm=True), _one("0.1") + _one("0.4"), tags=_tags("compiled")),
    Case("compiled-in-place", lambda: _compiled("in place", warm=True), PLAIN, tags=_tags("compiled")),
    Case("compiled-each", lambda: _compiled("each", warm=True), PLAIN, tags=_tags("compiled")),
    Case("data-parallel", lambda: nn.DataParallel(_plain()).eval(), PLAIN, tags=_tags("wrapped")),
    Case("distributed", _distributed, PLAIN, tags=_tags("wrapped", "group")),
    Case("averaged", lambda: torch.optim.swa_utils.AveragedModel(_plain()).eval(), PLAIN, tags=_tags("wrapped")),
    Case("timm-ema", _timm_ema, PLAIN, needs="timm", tags=_tags("wrapped")),
    Case(
        "ema-of-compiled",
        lambda: nn.DataParallel(_compiled("whole", warm=True)).eval(),
        PLAIN,
        tags=_tags("wrapped", "compiled"),
    ),
    Case("scaling-module", lambda: lived(animals.Scaling()), _one("module.1")),
    # ── slots ──
    Case(
        "slots",
        lambda: lived(convs(animals.TwoSets(4), nn.BatchNorm2d(4))),
        (("1@day", "batch", 4), ("1@night", "batch", 4), ("4", "batch", 4)),
        tags=_tags("slots"),
    ),
    Case(
        "bn-lstm",
        lambda: lived(animals.OverTime(BNLSTM)),
        (*_steps("rnn.input", 16), *_steps("rnn.hidden", 16), *_steps("rnn.cell", 4), ("bn", "batch", 4)),
        shape=(5, 3),  # a step more than there are statistics for
        tags=_tags("slots"),
    ),
    Case(
        "bn-gru",
        lambda: lived(animals.OverTime(BNGRU)),
        (*_steps("rnn.input", 12), *_steps("rnn.hidden", 12), ("bn", "batch", 4)),
        shape=(5, 3),
        tags=_tags("slots"),
    ),
]


def cases(*, without: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> list[Any]:
    """The cases as pytest parameters: those with a tag of `only` (all, if empty) and with none of `without`."""
    return [
        pytest.param(case, id=case.name)
        for case in CASES
        if not case.tags & set(without) and (not only or case.tags & set(only))
    ]


def with_batch_norm() -> list[Any]:
    """The cases, as pytest parameters, that have a batch norm with statistics as they come."""
    return [parameter for parameter in cases(without=("lazy",)) if parameter.id not in WITHOUT]


def named(name: str) -> Case:
    """The case of that name."""
    (case,) = [case for case in CASES if case.name == name]
    return case
