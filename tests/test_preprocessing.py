"""preprocessing: what a model says of its input, read as timm reads it, and done to arrays as timm does it to images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from renorm.errors import DataError, ModelError
from renorm.preprocessing import Preprocessing, match_channels, preprocessing_of


def model(**said: Any) -> nn.Module:
    net = nn.Identity()
    net.pretrained_cfg = said  # type: ignore[assignment]
    return net


def test_what_a_timm_model_says_is_what_timm_resolves() -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t")
    config = timm.data.resolve_data_config(model=net)
    assert preprocessing_of(net) == Preprocessing(
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop=config["crop_pct"],
    )


def test_a_wrapped_model_says_the_same() -> None:
    net = model(input_size=(3, 8, 8))
    assert preprocessing_of(nn.DataParallel(net)) == preprocessing_of(net) is not None


def test_a_model_that_says_nothing_has_none() -> None:
    assert preprocessing_of(nn.Identity()) is None
    assert preprocessing_of(model(mean=(0.5,))) is None


def test_what_is_left_out_changes_nothing() -> None:
    said = preprocessing_of(model(input_size=(3, 4, 5)))
    assert said == Preprocessing(input_size=(3, 4, 5), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert str(said) == "3 × 4 × 5 (bicubic), pixels / 255 less (0, 0, 0) over (1, 1, 1)"
    x = torch.rand(2, 3, 4, 5)
    assert torch.equal(Preprocessing(input_size=(3, 4, 5), mean=(0.0,) * 3, std=(1.0,) * 3).tensor(x), x)


def test_one_value_stands_for_all_channels() -> None:
    for one in (0.25, (0.25,), [0.25]):
        said = preprocessing_of(model(input_size=(3, 8, 8), mean=one, std=one, crop_pct=0.9))
        assert said is not None
        assert said.mean == said.std == (0.25, 0.25, 0.25)
    assert "the centre 0.9 kept" in str(said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mean": (0.1, 0.2)}, r"input_size \(3, 8, 8\), but mean \(0\.1, 0\.2\) and std .*: give 3 of each"),
        ({"std": (1.0, 0.0, 1.0)}, r"makes no sense: .* std \(1\.0, 0\.0, 1\.0\)"),
        ({"crop_pct": 1.5}, r"makes no sense: .* crop 1\.5"),
        ({"input_size": (3, 0, 8)}, r"makes no sense: input_size \(3, 0, 8\)"),
    ],
)
def test_values_that_contradict_each_other_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        preprocessing_of(model(**{"input_size": (3, 8, 8), **said}))


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (9, 9), (16, 16), (64, 17)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_arrays_become_what_timm_makes_of_the_same_image(size: tuple[int, int], interpolation: str) -> None:
    pytest.importorskip("timm")
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    wants = Preprocessing(
        input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation, crop=0.8
    )
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    if size == (16, 16):  # the one difference, and it is said: what has the size already is not cut again
        assert torch.equal(wants.tensor(array), array)
    else:  # PIL rounds to whole grey levels, twice
        apart = (wants.tensor(array) - wants.transform()(image)).abs()
        assert apart.max() < 5 / 255
        assert apart.mean() < 1 / 255


def test_channels() -> None:
    grey = torch.rand(2, 1, 4)
    assert match_channels(grey, 1) == (grey, "")
    assert match_channels(grey, 5)[0].shape == (2, 5, 4)
    white = torch.ones(2, 3, 4, 4)
    assert torch.allclose(match_channels(white, 1)[0], torch.ones(2, 1, 4, 4))
    with pytest.raises(DataError, match=r"the model takes 3 channels, the images have 2\. Give images of 3 channels"):
        match_channels(torch.ones(1, 2, 4, 4), 3)
