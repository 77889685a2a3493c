"""The class-conditional VAEs of ABS: one encoder and one decoder a class (Schott et al. 2018, appendix A)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

LATENT_DIM = 8

_ENCODER = {"kernels": (5, 4, 3, 5), "strides": (1, 2, 2, 1), "features": (32, 32, 64)}
_DECODER = {"kernels": (4, 5, 5, 4), "strides": (1, 2, 2, 1), "features": (32, 16, 16)}


def _convolutions(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    features: tuple[int, ...],
) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(kernels) - 1
    for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
        layers[f"conv_{i}"] = kind(features[i], features[i + 1], kernel, stride, dtype=torch.float32)
        if i < last:
            layers[f"bn_{i}"] = nn.BatchNorm2d(features[i + 1], dtype=torch.float32)
            layers[f"elu_{i}"] = nn.ELU()
    return layers


class Encoder(nn.Sequential):
    """q(z | x): ``(N, 1, 28, 28) -> (N, 2 L, 1, 1)``, the means and log variances of L latents."""

    def __init__(self, latent_dim: int = LATENT_DIM) -> None:
        features = (1, *_ENCODER["features"], 2 * latent_dim)
        super().__init__(_convolutions(nn.Conv2d, _ENCODER["kernels"], _ENCODER["strides"], features))


class Decoder(nn.Sequential):
    """G(z): ``(N, L, 1, 1) -> (N, 1, 28, 28)`` in (0, 1), the mean image of p(x | z)."""

    def __init__(self, latent_dim: int = LATENT_DIM) -> None:
        features = (latent_dim, *_DECODER["features"], 1)
        layers = _convolutions(nn.ConvTranspose2d, _DECODER["kernels"], _DECODER["strides"], features)
        layers["sigmoid"] = nn.Sigmoid()
        super().__init__(layers)


class VAE(nn.Module):
    """One class's VAE with L = ``latent_dim`` latents.

    ``forward(x, noise)`` returns the reconstruction ``G(mu + sigma * noise)`` with mu and log sigma^2, the three
    terms of the evidence lower bound (paper, eq. 4).
    """

    def __init__(self, latent_dim: int = LATENT_DIM) -> None:
        super().__init__()
        self.encoder = Encoder(latent_dim)
        self.decoder = Decoder(latent_dim)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).flatten(1).chunk(2, dim=1)
        latents = mean + noise * torch.exp(0.5 * log_variance)
        return self.decoder(latents[:, :, None, None]), mean, log_variance
