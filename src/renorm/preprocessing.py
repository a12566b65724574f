"""How pixels become the input that a model was made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from renorm.errors import DataError, ModelError, require
from renorm.said import Said, listed, say
from renorm.sites import unwrap

__all__ = ["Preprocessing", "match_channels", "preprocessing_of"]

# ITU-R BT.601, as in PIL's conversion to "L"
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a model's input is: size (C, H, W); mean and sd, per channel, of pixels in [0, 1]; how images get that size.

    An image is scaled until `input_size` is the share `crop` of it and cut at its centre. One that has the size already
    is left as it is.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ModelError(
                f"the model's preprocessing has input_size {self.input_size}, but mean {self.mean} and std {self.std}: "
                f"give {channels} of each."
            )
        if min(self.input_size) < 1 or min(self.std) <= 0 or not 0 < self.crop <= 1:
            raise ModelError(
                f"the model's preprocessing makes no sense: input_size {self.input_size}, std {self.std}, "
                f"crop {self.crop}. Sizes and sd are above 0, crop is in (0, 1]."
            )

    def __str__(self) -> str:
        return str(self.said())

    def said(self) -> Said:
        """It in words."""
        channels, height, width = self.input_size
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        size = say("{channels} × {height} × {width}", channels=channels, height=height, width=width)
        values = {"size": size, "interpolation": self.interpolation, "mean": mean, "std": std}
        if self.crop == 1:
            return say("{size} ({interpolation}), pixels / 255 less ({mean}) over ({std})", **values)
        return say(
            "{size} ({interpolation}, the centre {crop:.3g} kept), pixels / 255 less ({mean}) over ({std})",
            crop=self.crop,
            **values,
        )

    def tensor(self, images: Tensor) -> Tensor:
        """The model's input from pixels in [0, 1], (N, C, H, W) with the model's channels; float32."""
        mean, std = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (self._sized(images) - mean) / std

    def transform(self) -> Callable[[Any], Tensor]:
        """The model's input (C, H, W) from a PIL image: timm's evaluation transform with these values.

        Raises:
            MissingExtra: timm or torchvision is not installed.
        """
        data = require("timm.data", extra="images", purpose="preprocessing images")
        made = data.create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop,
        )
        return cast("Callable[[Any], Tensor]", made)

    def _sized(self, images: Tensor) -> Tensor:
        high, wide = self.input_size[1:]
        height, width = images.shape[-2:]
        if (height, width) == (high, wide):
            return images
        scale = max(math.floor(high / self.crop) / height, math.floor(wide / self.crop) / width)
        # torchvision cuts a fraction of a pixel off, it does not round; the tiny addition is for 19.999…
        size = (max(high, int(height * scale + 1e-6)), max(wide, int(width * scale + 1e-6)))
        mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        resized = F.interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)  # bicubic overshoots at edges
        top, left = round((size[0] - high) / 2), round((size[1] - wide) / 2)
        return resized[..., top : top + high, left : left + wide]


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """What `model.pretrained_cfg` says, as timm's models carry it; None where there is none.

    Of its keys `input_size` is needed. Without `mean` and `std` pixels stay in [0, 1], without `crop_pct` nothing is
    cut away, without `interpolation` it is bicubic.

    Raises:
        ModelError: the values contradict each other.
    """
    given = getattr(unwrap(model), "pretrained_cfg", None)
    if not isinstance(given, Mapping) or given.get("input_size") is None:
        return None
    channels, height, width = (int(side) for side in given["input_size"])
    return Preprocessing(
        input_size=(channels, height, width),
        mean=_each(given.get("mean", 0.0), channels),
        std=_each(given.get("std", 1.0), channels),
        interpolation=str(given.get("interpolation", "bicubic")),
        crop=float(given.get("crop_pct", 1.0)),
    )


def match_channels(images: Tensor, channels: int) -> tuple[Tensor, str]:
    """Images (N, C, *) with the wanted number of channels, and in words what was done ("" where nothing).

    Raises:
        DataError: there is no agreed way from the one number to the other.
    """
    held = images.shape[1]
    if held == channels:
        return images, ""
    if held == 1:
        return images.expand(-1, channels, *images.shape[2:]), say(
            "grey repeated into {count} channels", count=channels
        )
    if held == 4 and channels in (1, 3):
        grey, done = match_channels(images[:, :3], channels)
        dropped = say("fourth channel (alpha) dropped")
        return grey, listed([dropped, done]) if done else dropped
    if held == 3 and channels == 1:
        weights = torch.tensor(LUMINANCE, dtype=images.dtype).reshape(1, 3, *[1] * (images.dim() - 2))
        return (images * weights).sum(1, keepdim=True), say("colours reduced to grey (their luminance)")
    raise DataError(
        f"the model takes {channels} channels, the images have {held}. Give images of {channels} channels, "
        "or a model made for these."
    )


def _each(values: float | Sequence[float], channels: int) -> tuple[float, ...]:
    if isinstance(values, int | float):
        return (float(values),) * channels
    found = tuple(float(v) for v in values)
    return found * channels if len(found) == 1 else found
