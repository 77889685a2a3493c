"""Latent descent: Adam on the energy over the latents (Schott et al. 2018, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._decoder import PIXELS, ClassDecoder, JointDecoder
from abs_defense.inference._pairs import Pairs

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
_CHUNK_CPU = 128  # what of one class's activations stays in the cache


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
    joint = JointDecoder.of(decoders) if JointDecoder.is_faster([len(images)] * len(decoders)) else None
    pieces = images.split(_CHUNK_CPU) if images.device.type == "cpu" else (images,)

    def errors(decoder: ClassDecoder, latents: Tensor) -> Tensor:
        pairs = zip(latents.split([len(piece) for piece in pieces]), pieces, strict=True)
        return torch.cat([decoder.squared_error_gradient(z, x) for z, x in pairs])

    def gradient(z: Tensor) -> Tensor:
        if joint is not None:
            slopes = joint.squared_error_and_gradient(z, images)[1]
        else:
            slopes = torch.stack([errors(*one) for one in zip(decoders, z, strict=True)])
        return (slopes + beta * z) / PIXELS

    return adam_in_ball(gradient, latents, steps=steps, lr=lr, radius=radius)


def adam_in_ball(
    gradient: Callable[[Tensor], Tensor], latents: Tensor, *, steps: int, lr: float, radius: float
) -> Tensor:
    """``steps`` updates of Adam on ``(..., L)`` latents, each followed by a projection to the ball."""
    state = AdamState.start(latents)
    for step in range(1, steps + 1):
        state = state.update(gradient(state.latents), step, lr, radius)
    return state.latents


@dataclass(frozen=True)
class AdamState:
    """Latents ``(..., L)`` with the running means of their gradients and of the squares of these."""

    latents: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def start(cls, latents: Tensor) -> AdamState:
        return cls(latents, torch.zeros_like(latents), torch.zeros_like(latents))

    def update(self, slope: Tensor, step: int, lr: float, radius: float) -> AdamState:
        """After the ``step``-th update (counted from 1) and a projection to the ball."""
        decay_first, decay_second = ADAM_BETAS
        first = decay_first * self.first + (1.0 - decay_first) * slope
        second = decay_second * self.second + (1.0 - decay_second) * slope.square()
        mean = first / (1.0 - decay_first**step)
        # The floor keeps the derivative of the root finite where a gradient is exactly zero.
        scale = (second / (1.0 - decay_second**step)).clamp_min(1e-36).sqrt() + ADAM_EPSILON
        return AdamState(project_to_ball(self.latents - lr * mean / scale, radius), first, second)


def descend_pairs(pairs: Pairs, latents: Tensor, *, steps: int, lr: float, radius: float) -> Tensor:
    """``descend`` for pairs of an image and a class, ``(P, L) -> (P, L)``."""
    every = torch.arange(len(latents), device=latents.device)
    return adam_in_ball(
        lambda z: pairs.energy_and_gradient(z, every)[1] / PIXELS, latents, steps=steps, lr=lr, radius=radius
    )
