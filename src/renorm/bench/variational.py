"""Variational auto-encoders: a decoder that could do without its latent variable, and an encoder that meets other images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from renorm.bench import digits
from renorm.layers.posterior import PosteriorNorm
from renorm.recalibrate import recalibrate_

__all__ = ["ENCODED", "SHIFTED", "WAYS", "Vae", "encoded", "trained"]

WAYS = ("plain", "annealing", "free_bits", "bn")
ENCODED = ("unshifted", "source", "plain", "auto")
SHIFTED = ("low contrast", "fog", "blur")
LATENT, HIDDEN, BATCH = 16, 64, 100
FREE = 0.125  # nats per dimension that cost nothing: γ² / 2, so that both ways aim at one divergence
ACTIVE = (
    0.01  # variance of a posterior mean over images, above which its dimension counts as active (Burda et al. 2016)
)


class Vae(nn.Module):
    """Encodes binary digits to a Gaussian in `LATENT` dimensions; an LSTM writes them pixel by pixel, seeing those before."""

    body: nn.Module
    mean: nn.Linear
    log_var: nn.Linear
    norm: nn.Module
    begin: nn.Linear
    rnn: nn.LSTM
    head: nn.Linear

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.mean, self.log_var = nn.Linear(128, LATENT), nn.Linear(128, LATENT)
        self.norm = PosteriorNorm(LATENT, gamma=0.5) if way == "bn" else nn.Identity()
        self.begin = nn.Linear(LATENT, HIDDEN)
        self.rnn = nn.LSTM(1 + LATENT, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior. Shapes: x (N, 64) → (N, LATENT)."""
        seen = self.body(x)
        return self.norm(self.mean(seen)), self.log_var(seen)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits of every pixel, given those before it. Shapes: (N, LATENT), (N, 64) → (N, 64)."""
        before = F.pad(x[:, :-1], (1, 0))[..., None]
        given = torch.cat([before, z[:, None].expand(-1, x.shape[1], -1)], 2)
        h = torch.tanh(self.begin(z))[None]
        logits: Tensor = self.head(self.rnn(given, (h, torch.zeros_like(h)))[0])[..., 0]
        return logits


def trained(way: str, *, seed: int, epochs: int) -> Mapping[str, float]:
    """Train one way; on digits never seen, in nats a digit: reconstruction, divergence, their sum, mutual information."""
    source, held_out = digits.load()
    x, unseen = ((part.images.flatten(1) > 0.5).float() for part in (source, held_out))
    torch.manual_seed(seed)
    model, shuffle = Vae(way), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    total = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    done = 0
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=shuffle), BATCH):
            optimizer.zero_grad()
            mean, log_var = model.encode(x[rows])
            z = mean + torch.randn_like(mean) * (log_var / 2).exp()
            by_dimension = _divergence(mean, log_var).mean(0)
            cost = by_dimension.clamp_min(FREE).sum() if way == "free_bits" else by_dimension.sum()
            share = min(1.0, 2 * done / total) if way == "annealing" else 1.0  # from 0 to 1 over the first half
            torch.autograd.backward(_misses(model.decode(z, x[rows]), x[rows]).mean() + share * cost)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
    return _measured(model.eval(), unseen, seed)


class ImageVae(nn.Module):
    """Encodes grey digits by convolutions with ordinary batch norm; all pixels of a digit are written at once."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32)):
            parts += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.encoder: nn.Module = nn.Sequential(*parts, nn.Flatten(), nn.Linear(128, 2 * LATENT))
        self.decoder: nn.Module = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Mean and log variance of the posterior side by side. Shapes: x (N, 1, 8, 8) → (N, 2 · LATENT)."""
        found: Tensor = self.encoder(x)
        return found


@lru_cache(maxsize=1)
def _image_vae(seed: int, epochs: int) -> ImageVae:
    source, _ = digits.load()
    torch.manual_seed(seed)
    model, shuffle = ImageVae(), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(source), generator=shuffle), BATCH):
            optimizer.zero_grad()
            x = source.images[rows]
            mean, log_var = model(x).chunk(2, 1)
            logits = model.decoder(mean + torch.randn_like(mean) * (log_var / 2).exp())
            cost = _misses(logits, x.flatten(1)).mean() + _divergence(mean, log_var).sum(1).mean()
            torch.autograd.backward(cost)
            optimizer.step()
    return model.eval()


def encoded(way: str, shift: str, *, seed: int, epochs: int) -> Mapping[str, float]:
    """An encoder that meets digits under a shift; in nats a digit, of the digit as it is: reconstruction, divergence, sum.

    "unshifted" meets none, "source" is as it was trained, the others are recalibrated to the shifted digits without labels.
    """
    model, (_, held_out) = deepcopy(_image_vae(seed, epochs)), digits.load()
    met = held_out.shifted("as they are" if way == "unshifted" else shift)
    if way in ("plain", "auto"):
        recalibrate_(model, digits.batches(met), prior=0 if way == "plain" else "auto", include="encoder.*")
    with torch.no_grad():
        mean, log_var = model(met.images).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=Generator().manual_seed(seed))
        logits = model.decoder(mean + noise * (log_var / 2).exp())
        misses = _misses(logits, held_out.images.flatten(1)).mean().item()
        divergence = _divergence(mean, log_var).sum(1).mean().item()
    return {"reconstruction": misses, "divergence": divergence, "bound": misses + divergence}


@torch.no_grad()
def _measured(model: Vae, x: Tensor, seed: int) -> Mapping[str, float]:
    mean, log_var = model.encode(x)
    noise = torch.randn(mean.shape, generator=Generator().manual_seed(seed))
    z = mean + noise * (log_var / 2).exp()
    misses, divergence = _misses(model.decode(z, x), x).mean().item(), _divergence(mean, log_var).sum(1).mean().item()
    inside = _log_density(z, mean, log_var)
    across = torch.logsumexp(_log_density(z[:, None], mean[None], log_var[None]), 1) - math.log(len(x))
    floor = model.norm.floor.item() if isinstance(model.norm, PosteriorNorm) else 0.0
    return {
        "reconstruction": misses,
        "divergence": divergence,
        "bound": misses + divergence,
        "information": (inside - across).mean().item(),
        "active": float((mean.var(0) > ACTIVE).sum()),
        "floor": floor,
    }


def _misses(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def _divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """From the standard normal prior, of each image and dimension, in nats."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1)


def _log_density(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    return -0.5 * (log_var + (z - mean).square() / log_var.exp() + math.log(2 * math.pi)).sum(-1)
