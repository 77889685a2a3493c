"""The energy that ABS minimises over the latents."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(latents: Tensor) -> Tensor:
    """KL(N(z, 1) || N(0, 1)) = 0.5 ||z||^2, in nats: ``(..., L) -> (...)`` (paper, eq. 6)."""
    return 0.5 * latents.square().sum(-1)


def energy(images: Tensor, reconstructions: Tensor, latents: Tensor, beta: float) -> Tensor:
    """E = ||G(z) - x||^2 + beta KL(z), the negative lower bound of log p(x | y) (paper, eqs. 5 and 6).

    Args:
        images: x, ``(..., D)`` with values in [0, 1]; D = 784 pixels.
        reconstructions: G(z), ``(..., D)``.
        latents: z, ``(..., L)``.
        beta: weight of the KL term.

    Returns:
        ``(...)``, in nats up to a constant, summed over pixels; lower is better.
    """
    return (reconstructions - images).square().sum(-1) + beta * kl_divergence(latents)
