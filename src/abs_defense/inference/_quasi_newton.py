"""A faster solver of the descent's problem: BFGS in the few latent dimensions, from two starts (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._decide import Contest
from abs_defense.inference._decoder import ClassDecoder
from abs_defense.inference._descent import project_to_ball
from abs_defense.inference._pairs import Pairs

TRIAL_STEPS = 2
_LONGEST_STEP = 1.0
_LARGEST_TRUST = 2.0
_SHRINK = 0.35
_DAMPING = 0.2
_TOLERANCE = 1e-2
_AT_BOUNDARY = 1e-5


@dataclass(frozen=True)
class _Walk:
    """P descents side by side, sorted by class."""

    latents: Tensor
    energy: Tensor
    gradient: Tensor
    inverse_hessian: Tensor
    trust: Tensor

    def at(self, rows: Tensor) -> _Walk:
        return _Walk(*(value[rows] for value in vars(self).values()))

    def put(self, rows: Tensor, other: _Walk) -> None:
        for value, new in zip(vars(self).values(), vars(other).values(), strict=True):
            value[rows] = new


def average_curvature(decoders: Sequence[ClassDecoder], latents: Tensor, beta: float) -> Tensor:
    """The mean of the Gauss-Newton matrices 2 J^T J + beta I over latents of each class, with J = dG/dz.

    Args:
        decoders: the C classes.
        latents: ``(M, L)``, where to look.
        beta: weight of the KL term.

    Returns:
        ``(C, L, L)``, symmetric and positive definite.
    """
    step = 1e-2
    size = latents.shape[-1]
    shifts = step * torch.eye(size, dtype=latents.dtype, device=latents.device)
    curvature = []
    for decoder in decoders:
        base = decoder(latents)
        slopes = torch.stack([(decoder(latents + shift) - base) / step for shift in shifts], dim=1)
        curvature.append(2.0 * (slopes @ slopes.transpose(1, 2)).mean(0) + beta * torch.eye(size).to(slopes))
    return torch.stack(curvature)


def minimise(
    decoders: Sequence[ClassDecoder],
    images: Tensor,
    starts: Tensor,
    curvature: Tensor,
    *,
    steps: int,
    radius: float,
    beta: float,
    contest: Contest | None = None,
) -> Tensor:
    """Minimise E_c(x) over the latents by BFGS in the ball ||z|| <= radius.

    Each (image, class) makes ``TRIAL_STEPS`` steps from every start, goes on from the best, and stops when the model
    of its energy promises less than a hundredth of a nat. Steps that raise the energy are taken back and their
    length cut; the inverse Hessian starts from ``curvature`` and is updated with Powell's damping, so it stays
    positive definite.

    Args:
        decoders: the C classes.
        images: x, ``(N, 784)``.
        starts: S starting points, ``(S, C, N, L)``.
        curvature: ``(C, L, L)``, see ``average_curvature``.
        steps: the most steps of a descent, the trial ones included.
        radius: of the ball.
        beta: weight of the KL term.
        contest: if given, classes that it declares lost stay where they are.

    Returns:
        ``(C, N, L)``.
    """
    count, classes, number, size = starts.shape
    inverse = torch.linalg.inv(curvature.to(starts.dtype))
    latents = starts.transpose(0, 1).reshape(-1, size).clone()
    pairs = Pairs.of_all(decoders, images, beta, count)
    problem = _Problem(pairs, radius)
    every = torch.arange(len(latents), device=images.device)
    walk = _Walk(
        latents,
        *pairs.energy_and_gradient(latents, every),
        inverse[pairs.label],
        latents.new_full((len(latents),), _LONGEST_STEP),
    )
    trials = min(TRIAL_STEPS, steps) if count > 1 else 0
    for _ in range(trials):
        walk = problem.step(walk, every)
    best = walk.energy.view(classes, count, number).argmin(1)
    rows = (every.view(classes, count, number).gather(1, best[:, None])).flatten()
    final = walk.at(rows)
    active = torch.arange(len(rows), device=images.device)
    for step in range(trials, steps):
        active = active[problem.promise(final.at(active)) > _TOLERANCE]
        if contest is not None:
            active = active[contest.is_open(final.energy.view(classes, number), step).flatten()[active]]
        if not len(active):
            break
        final.put(active, problem.step(final.at(active), rows[active]))
    return final.latents.view(classes, number, size)


@dataclass(frozen=True)
class _Problem:
    pairs: Pairs
    radius: float

    def _move(self, walk: _Walk) -> Tensor:
        step = -_times(walk.inverse_hessian, walk.gradient)
        outside = (walk.latents + step).norm(dim=1) > self.radius
        held = outside & (walk.latents.norm(dim=1) > (1.0 - _AT_BOUNDARY) * self.radius)
        rows = held.nonzero()[:, 0]
        if len(rows):
            step[rows] = self._move_on_sphere(walk.at(rows))
        length = step.norm(dim=1).clamp_min(torch.finfo(step.dtype).tiny)
        step = step * (walk.trust / length).clamp_max(1.0)[:, None]
        return project_to_ball(walk.latents + step, self.radius) - walk.latents

    def _move_on_sphere(self, walk: _Walk) -> Tensor:
        """The Newton step of the Lagrangian E + m/2 (||z||^2 - R^2), along the sphere."""
        z, g, inverse = walk.latents, walk.gradient, walk.inverse_hessian
        multiplier = (-(g * z).sum(1) / z.square().sum(1)).clamp_min(0.0)
        identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve(identity + multiplier[:, None, None] * inverse, inverse)
        normal = _times(inverse, z)
        step = -_times(inverse, g)
        return step - normal * ((step * z).sum(1) / (normal * z).sum(1))[:, None]

    def promise(self, walk: _Walk) -> Tensor:
        """How much lower the next step may lead, by the quadratic model."""
        return -0.5 * (walk.gradient * self._move(walk)).sum(1)

    def step(self, walk: _Walk, rows: Tensor) -> _Walk:
        move = self._move(walk)
        latents = walk.latents + move
        energy, gradient = self.pairs.energy_and_gradient(latents, rows)
        inverse = _bfgs(walk.inverse_hessian, move, gradient - walk.gradient)
        length = move.norm(dim=1)
        lower = energy < walk.energy
        grown = torch.maximum(walk.trust, 2.0 * length).clamp_max(_LARGEST_TRUST)
        return _Walk(
            torch.where(lower[:, None], latents, walk.latents),
            torch.where(lower, energy, walk.energy),
            torch.where(lower[:, None], gradient, walk.gradient),
            inverse,
            torch.where(lower, grown, _SHRINK * length),
        )


def _bfgs(inverse: Tensor, move: Tensor, change: Tensor) -> Tensor:
    """The inverse Hessian after a ``move`` that changed the gradient by ``change``, damped in the inverse's metric."""
    tiny = torch.finfo(move.dtype).tiny
    weighted = _times(inverse, change)
    curved = (change * weighted).sum(1)
    along = (move * change).sum(1)
    damped = _flat(along < _DAMPING * curved, (1.0 - _DAMPING) * curved / (curved - along).clamp_min(tiny))
    move = damped * move + (1.0 - damped) * weighted
    rho = 1.0 / (move * change).sum(1).clamp_min(tiny)
    mixed = move[:, :, None] * weighted[:, None, :]
    outer = move[:, :, None] * move[:, None, :]
    updated = inverse + (
        ((1.0 + rho * curved) * rho)[:, None, None] * outer - rho[:, None, None] * (mixed + mixed.transpose(1, 2))
    )
    moved = curved > 1e-12 * (move * move).sum(1)
    return torch.where((moved & updated.isfinite().all(2).all(1))[:, None, None], updated, inverse)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[:, :, None])[:, :, 0]


def _flat(condition: Tensor, value: Tensor) -> Tensor:
    return torch.where(condition, value, torch.ones_like(value))[:, None]
