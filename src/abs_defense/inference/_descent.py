"""Latent descent: Adam on the energy over the latents (Schott et al. 2018, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abs_defense.inference._decoder import PIXELS, ClassDecoder

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


def project_to_ball(latents: Tensor, radius: float) -> Tensor:
    """The nearest point of the ball ||z|| <= radius: ``(..., L) -> (..., L)``.

    The authors' ``clip_to_sphere`` also drops the signs of the latents it moves; this does not.
    """
    norms = latents.norm(dim=-1, keepdim=True)
    return torch.where(norms > radius, latents * (radius / norms.clamp_min(radius)), latents)


def descend(
    decoders: Sequence[ClassDecoder],
    images: Tensor,
    latents: Tensor,
    *,
    steps: int,
    lr: float,
    radius: float,
    beta: float,
) -> Tensor:
    """Minimise E / 784 over the latents by ``steps`` updates of Adam, each followed by a projection to the ball.

    Every operation is differentiable with respect to ``images``; no graph is built unless they require one.

    Args:
        decoders: the C classes.
        images: x, ``(N, 784)``.
        latents: starting points, ``(C, N, L)``.
        steps: number of updates; 0 returns the starting points.
        lr: Adam's step size.
        radius: of the ball.
        beta: weight of the KL term.

    Returns:
        ``(C, N, L)``.
    """

    def gradient(z: Tensor) -> Tensor:
        errors = [decoder.squared_error_gradient(part, images) for decoder, part in zip(decoders, z, strict=True)]
        return (torch.stack(errors) + beta * z) / PIXELS

    return adam_in_ball(gradient, latents, steps=steps, lr=lr, radius=radius)


def adam_in_ball(
    gradient: Callable[[Tensor], Tensor], latents: Tensor, *, steps: int, lr: float, radius: float
) -> Tensor:
    """``steps`` updates of Adam on ``(..., L)`` latents, each followed by a projection to the ball."""
    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    decay_first, decay_second = ADAM_BETAS
    for step in range(1, steps + 1):
        slope = gradient(latents)
        first = decay_first * first + (1.0 - decay_first) * slope
        second = decay_second * second + (1.0 - decay_second) * slope.square()
        mean = first / (1.0 - decay_first**step)
        # The floor keeps the derivative of the root finite where a gradient is exactly zero.
        scale = (second / (1.0 - decay_second**step)).clamp_min(1e-36).sqrt() + ADAM_EPSILON
        latents = project_to_ball(latents - lr * mean / scale, radius)
    return latents
