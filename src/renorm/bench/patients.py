"""Networks for the doctor's suite: healthy ones, and the ways to make one sick whose rule is known."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from renorm.errors import require
from renorm.sites import find_sites

__all__ = ["DISEASES", "HEALTHY", "SICK", "Disease", "calibrated", "images"]

# Two of each family of timm with batch norm at most, the smallest; then torchvision's, then transformers' by their configs.
TIMM = """
resnet10t resnet18 resnet26t seresnet18 skresnet18 lcnet_035 mobilenetv2_035 mobilenetv3_small_050 mnasnet_small
semnasnet_075 fbnetc_100 efficientnet_lite0 tinynet_e ghostnet_050 ghostnetv2_100 hardcorenas_a spnasnet_100
mobilenetv4_conv_small_035 regnetx_002 regnety_002 dla46_c efficientvit_b0 repghostnet_050 ese_vovnet19b_slim_dw
rexnetr_200 starnet_s050 mobileone_s0 repvit_m0_9 hgnetv2_b0 shvit_s1 fasternet_t0 mobilevit_xxs mobilevitv2_050
cs3darknet_focus_s densenet121 test_efficientnet test_byobnet
""".split()
VISION = "resnet18 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 regnet_x_400mf googlenet".split()
HUB: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("ResNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "RegNet": ("RegNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 16}),
    "MobileNetV2": ("MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 64}),
    "MobileNetV1": ("MobileNetV1Config", {"depth_multiplier": 0.25, "image_size": 64}),
}
HEALTHY = (
    *(f"timm:{name}" for name in TIMM),
    *(f"torchvision:{name}" for name in VISION),
    *(f"hf:{name}" for name in HUB),
)
SICK = ("timm:lcnet_035", "torchvision:resnet18", "hf:ResNet")
SIDE = 64  # pixels
CALIBRATED = 128  # images: by 32 the statistics of a last layer of 2 × 2 places are off by a tenth of their sd


def images(count: int, *, seed: int = 0) -> Tensor:
    """Normal noise as images: what the networks' statistics are estimated on, and data that fit."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def calibrated(name: str) -> nn.Module:
    """The network by that name with random weights, an affine that differs between channels, and the statistics of noise."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = _made(name).eval()
        held: dict[nn.Module, float | None] = {}
        for site in find_sites(model):
            if site.kind == "batch" and site.tensors is not None:
                for parameter, middle in zip(site.affine.values(), (1.0, 0.0), strict=False):
                    nn.init.uniform_(parameter, middle - 0.2, middle + 0.2)
                held[site.module], site.module.training = site.momentum, True
                vars(site.module)["momentum"] = 1.0
        with torch.no_grad():
            model(images(CALIBRATED))
    for site in find_sites(model):
        if site.module in held and not bool(
            site.module.num_batches_tracked
        ):  # a head for training alone: as it was created
            for parameter, value in zip(site.affine.values(), (1.0, 0.0), strict=False):
                nn.init.constant_(parameter, value)
    for module, momentum in held.items():
        module.training, vars(module)["momentum"] = False, momentum
    return model


def _made(name: str) -> nn.Module:
    library, _, name = name.partition(":")
    made: nn.Module
    if library == "timm":
        made = require("timm", extra="bench", purpose="timm's networks").create_model(name, num_classes=10)
    elif library == "torchvision":
        models = require("torchvision.models", extra="bench", purpose="torchvision's networks")
        made = getattr(models, name)(num_classes=10)
    else:
        hub = require("transformers", extra="text", purpose="transformers' networks")
        config, options = HUB[name]
        made = getattr(hub, f"{name}ForImageClassification")(getattr(hub, config)(**options, num_labels=10))
    return made


@dataclass(frozen=True)
class Disease:
    """A change that makes a model sick, the rule that should find it, and what the doctor is given besides the model."""

    rule: str
    make: Callable[[nn.Module], Any]
    data: bool = False
    given: Callable[[nn.Module], dict[str, Any]] = field(default=lambda model: {})


def _norms(model: nn.Module) -> list[Any]:
    return [site.module for site in find_sites(model) if site.kind == "batch"]


def _set(**values: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(_norms(model)[-1], name, value)

    return change


def _fill(name: str, value: float) -> Callable[[nn.Module], None]:
    return lambda model: getattr(_norms(model)[-1], name).data[:1].fill_(value)


def _half_frozen(model: nn.Module) -> None:
    model.train()
    for norm in _norms(model):
        norm.requires_grad_(False)


def _stopped(model: nn.Module) -> None:
    model.train()
    _norms(model)[-1].eval()


def _counts_by_halves(model: nn.Module) -> None:
    _norms(model)[-1].num_batches_tracked = torch.tensor(12.5)


def _lazy(model: nn.Module) -> None:
    parent = next(m for m in model.modules() if any(c is _norms(model)[-1] for c in m.children()))
    name = next(n for n, c in parent.named_children() if c is _norms(model)[-1])
    setattr(parent, name, nn.LazyBatchNorm2d())


def _decay(model: nn.Module) -> dict[str, Any]:
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)}


def _half_an_optimiser(model: nn.Module) -> dict[str, Any]:
    norms = {id(p) for norm in _norms(model) for p in norm.parameters()}
    return {"optimizer": torch.optim.SGD([p for p in model.parameters() if id(p) not in norms], lr=0.1)}


def _without_statistics(model: nn.Module) -> dict[str, Any]:
    return {"checkpoint": {n: t for n, t in model.state_dict().items() if "running" not in n}}


def _old_weights(model: nn.Module) -> dict[str, Any]:
    return {"checkpoint": {n: t if "running" in n else t * 2 for n, t in model.state_dict().items()}}


def _old_statistics(model: nn.Module) -> dict[str, Any]:
    return {"checkpoint": {n: t + 1 if "running" in n else t for n, t in model.state_dict().items()}}


def _two_ranks(model: nn.Module) -> dict[str, Any]:
    other = {n: t + 1 if n.endswith("running_mean") else t for n, t in model.state_dict().items()}
    return {"ranks": [other]}


def _compiled(model: nn.Module) -> None:
    model.compile()
    _norms(model)[-1].momentum = None


DISEASES: Mapping[str, Disease] = {
    "affine frozen alone": Disease("BN101", _half_frozen),
    "one layer in eval()": Disease("BN102", _stopped),
    "statistics not tracked": Disease("BN103", _set(track_running_stats=False)),
    "no statistics": Disease("BN104", _set(running_mean=None, running_var=None)),
    "statistics reset": Disease("BN105", lambda model: _norms(model)[-1].reset_running_stats()),
    "momentum 0.99": Disease("BN106", _set(momentum=0.99)),
    "momentum 0": Disease("BN106", _set(momentum=0.0)),
    "eps 0": Disease("BN107", _set(eps=0.0)),
    "variance NaN": Disease("BN108", _fill("running_var", math.nan)),
    "mean infinite": Disease("BN108", _fill("running_mean", math.inf)),
    "variance negative": Disease("BN108", _fill("running_var", -1.0)),
    "variance 0": Disease("BN109", _fill("running_var", 0.0)),
    "bfloat16 statistics": Disease("BN110", lambda model: _norms(model)[-1].to(torch.bfloat16)),
    "half the channels 0": Disease("BN111", lambda model: _norms(model)[-1].weight.data[::2].zero_()),
    "lazy layer": Disease("BN114", _lazy),
    "file without statistics": Disease("BN201", lambda model: None, given=_without_statistics),
    "fractional counter": Disease("BN202", _counts_by_halves),
    "weights merged, statistics not": Disease("BN203", lambda model: None, given=_old_weights),
    "another rank on other data": Disease("BN204", lambda model: None, given=_two_ranks),
    "frozen, yet moved": Disease(
        "BN205", lambda m: [n.requires_grad_(False) for n in _norms(m)], given=_old_statistics
    ),
    "weight decay on norms": Disease("BN401", lambda model: None, given=_decay),
    "norms in no group": Disease("BN402", lambda model: None, given=_half_an_optimiser),
    "layer in train()": Disease("BN501", lambda model: _norms(model)[-1].train()),
    "momentum None, compiled": Disease("BN506", _compiled),
}
