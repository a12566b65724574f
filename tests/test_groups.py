"""groups: every parameter that trains is in exactly one optimiser group, with the rate and decay that fit it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from renorm.errors import UsageError
from renorm.freeze import freeze_
from renorm.groups import check_groups, parameter_groups
from renorm.sites import find_sites
from tests import zoo


@pytest.mark.parametrize("case", zoo.cases(without=("lazy",)))
def test_nothing_that_trains_is_outside_and_nothing_frozen_inside(case: zoo.Case) -> None:
    model = case.build()
    if find_sites(model):
        freeze_(model, statistics=False, include=find_sites(model)[0].name.partition("@")[0] + "*")
    if not any(p.requires_grad for p in model.parameters()):
        return
    groups = parameter_groups(model, 0.1, weight_decay=0.01, depth_decay=0.5)
    inside = [id(p) for group in groups for p in group["params"]]
    assert len(inside) == len(set(inside))
    assert set(inside) == {id(p) for p in model.parameters() if p.requires_grad}
    check_groups(model, groups)
    norms = {id(p) for site in find_sites(model) for p in site.affine.values()}
    for group in groups:
        assert group["weight_decay"] == 0 or not norms & {id(p) for p in group["params"]}
    check_groups(model, torch.optim.SGD(groups, lr=1.0))


@given(
    lr=st.floats(1e-6, 10),
    depth_decay=st.floats(0.01, 1),
    head_lr=st.none() | st.floats(0, 10),
    norm_lr=st.none() | st.floats(0, 10),
    decay=st.floats(0, 1),
)
def test_rates_fall_with_depth_and_the_head_has_its_own(
    lr: float, depth_decay: float, head_lr: float | None, norm_lr: float | None, decay: float
) -> None:
    model = zoo.named("bn2d").build()
    groups = parameter_groups(model, lr, depth_decay=depth_decay, head_lr=head_lr, norm_lr=norm_lr, weight_decay=decay)
    rates = {group["name"]: group["lr"] for group in groups}
    decays = {group["name"]: group["weight_decay"] for group in groups}
    norm = lr if norm_lr is None else norm_lr
    head = lr if head_lr is None else head_lr
    assert rates == {
        "stage 0, norm": norm * depth_decay,
        "stage 0, weights": lr * depth_decay,
        "stage 0, no decay": lr * depth_decay,
        "stage 1, norm": norm,
        "stage 1, weights": lr,
        "stage 1, no decay": lr,
        "head, weights": head,
        "head, no decay": head,
    }
    assert {name for name in decays if decays[name] == decay} >= {"stage 0, weights", "head, weights"}
    assert decays["stage 0, norm"] == decays["head, no decay"] == 0


def test_what_the_model_names_is_not_decayed() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 12, "depth": 4, "num_heads": 2, "img_size": 32, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    groups = parameter_groups(model, 0.1, weight_decay=0.1, depth_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert decay[id(model.pos_embed)] == decay[id(model.cls_token)] == 0
    assert decay[id(model.blocks[0].attn.qkv.weight)] == 0.1
    assert rate[id(model.pos_embed)] == rate[id(model.patch_embed.proj.weight)] == 0.1 * 0.5**4
    assert rate[id(model.norm.weight)] == rate[id(model.blocks[3].attn.qkv.weight)] == 0.1


def test_an_optimiser_that_does_not_fit_is_told_by_name() -> None:
    model = zoo.named("bn2d").build()
    optimiser = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
    handle = freeze_(model)
    with pytest.raises(UsageError, match=r"4 that do not are in one, '1\.weight' first.*Make it anew"):
        check_groups(model, optimiser)
    optimiser = torch.optim.SGD(parameter_groups(model, 0.1), lr=0.1)
    handle.restore_()
    with pytest.raises(UsageError, match=r"4 that ask for a gradient are in no group, '1\.weight' first"):
        check_groups(model, optimiser)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is a number of at least 0; got -0.1"),
        ({"lr": 0.1, "weight_decay": float("nan")}, "weight_decay is a number of at least 0; got nan"),
        ({"lr": 0.1, "depth_decay": 1.5}, r"depth_decay is the factor .* in \(0, 1\]; got 1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parameter_groups(zoo.named("bn2d").build(), **options)


def test_a_model_in_which_nothing_trains_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter of the model asks for a gradient"):
        parameter_groups(model, 0.1)
