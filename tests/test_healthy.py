"""No error on healthy models: architectures of timm with random weights and statistics of the data that they are shown.

A few by default; with RENORM_SLOW=1 in the environment all of them, which takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from renorm.doctor import diagnose
from renorm.sites import find_sites

timm = pytest.importorskip("timm")

# One or two of each family with batch norm, the smallest; the `test_` models are timm's own for this.
NAMES = """
test_efficientnet test_efficientnet_gn test_efficientnet_ln test_byobnet test_nfnet
test_vit resnet10t resnet14t resnet18 resnet18d
resnet26t seresnet18 lcnet_035 lcnet_050 mobilenetv3_small_050 mobilenetv3_small_075 mobilenetv2_035 mobilenetv2_050
mnasnet_050 mnasnet_small semnasnet_075 fbnetc_100 efficientnet_lite0 tinynet_e tinynet_d ghostnet_050 hardcorenas_a
spnasnet_100 mobilenetv4_conv_small_035 mobilenetv4_conv_small_050 regnetx_002 regnety_002 dla46_c dla46x_c
efficientvit_b0 levit_128s repghostnet_050 ese_vovnet19b_slim_dw skresnet18 rexnetr_200 starnet_s050 starnet_s100
mobileone_s0 repvit_m0_9 ghostnetv2_100 hgnetv2_b0 shvit_s1 xcit_nano_12_p16_224 resnet18_cifar fasternet_t0 edgenext_xx_small
mobilevit_xxs mobilevitv2_050 convnext_atto squeezenext cs3darknet_focus_s vovnet39a
""".split()


def calibrated(name: str, x: Tensor) -> nn.Module:
    """The model with an affine that differs between channels and the statistics of `x`; dropout plays no part in them."""
    model = timm.create_model(name, num_classes=5)
    model.eval()
    held: dict[nn.Module, float | None] = {}
    for site in find_sites(model):
        if site.kind == "batch" and site.tensors is not None:
            for parameter, middle in zip(site.affine.values(), (1.0, 0.0), strict=False):
                nn.init.uniform_(parameter, middle - 0.2, middle + 0.2)
            if hasattr(site.module, "momentum"):
                held[site.module], site.module.momentum = site.module.momentum, 1.0
                site.module.training = True
    with torch.no_grad():
        model(x)
    for module, momentum in held.items():
        module.momentum, module.training = momentum, False
    return model


def names() -> Iterator[str]:
    known = set(timm.list_models())
    yield from (name for name in NAMES if name in known)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    names()
    if os.environ.get("RENORM_SLOW")
    else ["resnet10t", "lcnet_035", "fasternet_t0", "tinynet_e", "test_byobnet"],
)
def test_a_healthy_architecture_has_no_error_with_or_without_data_that_fit(name: str) -> None:
    torch.manual_seed(0)
    size = 224 if "xcit" in name or "levit" in name else 64
    x = torch.randn(16, 3, size, size)
    model = calibrated(name, x)
    for batches in (None, [x]):
        found = diagnose(model, batches).findings
        assert [f for f in found if f.severity == "error"] == [], name
