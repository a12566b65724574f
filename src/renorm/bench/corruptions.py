"""Covariate shifts made from clean images, seeded: the constants of CIFAR-10-C, and the package `imagecorruptions`.

Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019.
`small` makes the corruptions of images of 32 x 32 pixels at severity 5, written here for whole stacks of images;
`photographs` makes those of larger images through the package, whose constants were chosen for them.
Images are uint8 `(N, H, W, 3)` on both sides.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from renorm.errors import UnknownName, UsageError, require

__all__ = ["CLEAN", "PHOTOGRAPHS", "SMALL", "photographs", "small"]

Pixels = NDArray[np.uint8]
Unit = NDArray[np.float32]  # (N, H, W, 3) in [0, 1]

CLEAN = "as_it_is"
CHUNK = 500  # images at a time: bounds memory


def small(images: Pixels, kind: str, *, seed: int = 0) -> Pixels:
    """`images` under the corruption `kind` of CIFAR-10-C at severity 5; the same seed gives the same bytes.

    Raises:
        UnknownName: `kind` is none of `SMALL`.
        UsageError: the images are not uint8 `(N, H, W, 3)`.
    """
    _check(images, kind, SMALL)
    if kind == CLEAN:
        return images
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    done = [
        SMALL[kind](np.divide(chunk, 255, dtype=np.float32), np.random.default_rng([seed, index]))
        for index, chunk in enumerate(chunks)
    ]
    # The data set's authors cut off the fraction instead of rounding; so do we.
    return (np.concatenate(done).clip(0, 1) * 255).astype(np.uint8)


def photographs(images: Pixels, kind: str, *, severity: int = 3, seed: int = 0) -> Pixels:
    """`images` under the corruption `kind` of the package `imagecorruptions`; image i is drawn from `(seed, i)`.

    Raises:
        UnknownName: `kind` is none of `PHOTOGRAPHS`.
        UsageError: the images are not uint8 `(N, H, W, 3)`, or the severity is not 1 to 5.
        MissingExtra: the package is not installed.
    """
    _check(images, kind, PHOTOGRAPHS)
    if severity not in range(1, 6):
        raise UsageError(f"the severity of a corruption is 1 to 5, and {severity} was asked for")
    if kind == CLEAN:
        return images
    package = _imagecorruptions()
    before = np.random.get_state()  # the package draws from numpy's global generator
    done = []
    try:
        for index, image in enumerate(images):
            np.random.seed([seed, index])
            done.append(package.corrupt(image, severity=severity, corruption_name=kind))
    finally:
        np.random.set_state(before)
    return np.stack(done)


def _check(images: Pixels, kind: str, known: Any) -> None:
    if kind not in known:
        raise UnknownName("corruption", kind, known)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UsageError(f"corruptions want uint8 images (N, H, W, 3), and got {images.dtype} {tuple(images.shape)}")


# ── severity 5 at 32 x 32 pixels ──


def _as_it_is(x: Unit, rng: Generator) -> Unit:
    return x


def _gaussian_noise(x: Unit, rng: Generator) -> Unit:
    return x + 0.10 * rng.standard_normal(x.shape, dtype=np.float32)


def _shot_noise(x: Unit, rng: Generator) -> Unit:
    return (rng.poisson(x * 50.0) / 50.0).astype(np.float32)


def _impulse_noise(x: Unit, rng: Generator) -> Unit:
    hit, white = rng.random(x.shape) < 0.07, rng.random(x.shape) < 0.5
    return np.where(hit, white.astype(np.float32), x)


def _speckle_noise(x: Unit, rng: Generator) -> Unit:
    return x + 0.2 * x * rng.standard_normal(x.shape, dtype=np.float32)


def _gaussian_blur(x: Unit, rng: Generator) -> Unit:
    from scipy import ndimage

    blurred: Unit = ndimage.gaussian_filter(x, sigma=(0, 1, 1, 0), mode="nearest")
    return blurred


def _defocus_blur(x: Unit, rng: Generator) -> Unit:
    from scipy import ndimage

    # A disk of radius 1.5 covers 3 x 3 pixels evenly; its antialiasing (sd 0.1 pixel) is lost in eight bits.
    blurred: Unit = ndimage.uniform_filter(x, size=(1, 3, 3, 1), mode="mirror")
    return blurred


def _fog(x: Unit, rng: Generator) -> Unit:
    thickness, decay = 1.5, 1.75
    brightest: Unit = x.max(axis=(1, 2, 3), keepdims=True)
    side = 1 << (max(x.shape[1:3]) - 1).bit_length()
    heights = _plasma(len(x), side, decay, rng)[:, : x.shape[1], : x.shape[2], None]
    return ((x + thickness * heights) * brightest / (brightest + thickness)).astype(np.float32)


def _brightness(x: Unit, rng: Generator) -> Unit:
    # To raise V of HSV at the same hue and saturation is to scale R, G and B alike; black becomes grey.
    value: Unit = x.max(axis=-1, keepdims=True)
    raised = np.minimum(value + 0.3, 1)
    brighter: Unit = np.where(value > 0, x / np.maximum(value, 1e-12) * raised, raised)
    return brighter.astype(np.float32)


def _contrast(x: Unit, rng: Generator) -> Unit:
    mean = x.mean(axis=(1, 2), keepdims=True)
    flat: Unit = (x - mean) * 0.15 + mean
    return flat


def _saturate(x: Unit, rng: Generator) -> Unit:
    # To scale S of HSV at the same hue and value is to scale each channel's distance below the largest one.
    value: Unit = x.max(axis=-1, keepdims=True)
    least: Unit = x.min(axis=-1, keepdims=True)
    saturation = (value - least) / np.maximum(value, 1e-12)
    raised = np.clip(2.5 * saturation + 0.2, 0, 1)
    coloured = value - (value - x) * raised / np.maximum(saturation, 1e-12)
    reddened = value * (1 - raised * np.array([0, 1, 1], dtype=np.float32))  # grey has hue 0, which is red
    return np.where(saturation > 0, coloured, reddened).astype(np.float32)


def _jpeg_compression(x: Unit, rng: Generator) -> Unit:
    image = require("PIL.Image", extra="bench", purpose="JPEG compression")

    def squeezed(pixels: Pixels) -> Any:
        file = BytesIO()
        image.fromarray(pixels).save(file, "JPEG", quality=40)
        return np.asarray(image.open(file))

    return _each(x, squeezed)


def _pixelate(x: Unit, rng: Generator) -> Unit:
    image = require("PIL.Image", extra="bench", purpose="pixelation")
    height, width = x.shape[1:3]
    coarse = int(width * 0.65), int(height * 0.65)

    def coarsened(pixels: Pixels) -> Any:
        return np.asarray(image.fromarray(pixels).resize(coarse, image.BOX).resize((width, height), image.BOX))

    return _each(x, coarsened)


def _each(x: Unit, change: Callable[[Pixels], Any]) -> Unit:
    pixels = (x * 255).round().astype(np.uint8)
    # Half a level up, so that the caller's cutting off gives back the very level.
    changed = np.stack([change(image) for image in pixels]).astype(np.float32)
    return (changed + np.float32(0.5)) / np.float32(255)


def _plasma(count: int, side: int, decay: float, rng: Generator) -> NDArray[np.float64]:
    """`count` random cloud heights in [0, 1] on a torus, (count, side, side): midpoint displacement (Fournier 1982)."""
    heights = np.zeros((count, side, side))
    step, rough = side, 100.0

    def jitter(grid: NDArray[np.float64]) -> NDArray[np.float64]:
        return grid / 4 + rng.uniform(-(rough**2), rough**2, grid.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step].copy()
        below = corners + np.roll(corners, -1, axis=1)
        centres = jitter(below + np.roll(below, -1, axis=2))
        heights[:, half::step, half::step] = centres
        right = corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = jitter(right + centres + np.roll(centres, 1, axis=1))
        heights[:, half::step, ::step] = jitter(below + centres + np.roll(centres, 1, axis=2))
        step, rough = half, rough / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return np.asarray(heights / heights.max(axis=(1, 2), keepdims=True))


SMALL: dict[str, Callable[[Unit, Generator], Unit]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _as_it_is,
        _gaussian_noise,
        _shot_noise,
        _impulse_noise,
        _speckle_noise,
        _gaussian_blur,
        _defocus_blur,
        _fog,
        _brightness,
        _contrast,
        _saturate,
        _jpeg_compression,
        _pixelate,
    )
}

# ── the package, for photographs ──

# Left out of its 19 kinds: fog, gaussian_blur and glass_blur call names that numpy 2 and scikit-image 0.19 dropped;
# impulse_noise draws from a generator of its own, which cannot be seeded from outside.
PHOTOGRAPHS = (
    CLEAN,
    "gaussian_noise",
    "shot_noise",
    "speckle_noise",
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "spatter",
    "brightness",
    "contrast",
    "saturate",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)


def _imagecorruptions() -> ModuleType:
    if "imagecorruptions" in sys.modules:
        return sys.modules["imagecorruptions"]
    with warnings.catch_warnings(), _resource_names():
        warnings.simplefilter("ignore")  # names that scipy deprecates, in a package that no longer changes
        return require("imagecorruptions", extra="bench", purpose="corrupting photographs")


@contextmanager
def _resource_names() -> Iterator[None]:
    """Lend the one function of `pkg_resources` that the package imports: setuptools 81 dropped it, and warns before."""
    from importlib.resources import files

    lent = ModuleType("pkg_resources")
    lent.__dict__["resource_filename"] = lambda module, name: str(files(module.partition(".")[0]).joinpath(name))
    before = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = lent
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = before
