"""A faster solver of the descent's problem: BFGS in the few latent dimensions, from two starts (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._decoder import ClassDecoder
from abs_defense.inference._descent import project_to_ball
from abs_defense.inference._pairs import Pairs

_PROMISING = 1.0
_LONGEST_STEP = 1.0
_LARGEST_TRUST = 2.0
_SHRINK = 0.35
_DAMPING = 0.2
_TOLERANCE = 0.03
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
    points = torch.cat([latents, *(latents + shift for shift in shifts)])
    curvature = []
    for decoder in decoders:
        base, *moved = decoder(points).split(len(latents))
        slopes = torch.stack([(image - base) / step for image in moved], dim=1)
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
) -> tuple[Tensor, Tensor]:
    """Minimise E_c(x) over the latents by BFGS in the ball ||z|| <= radius.

    Each (image, class) makes one step from every start whose model promises an energy within 1 nat of the lowest
    promised, goes on from the best of these, and stops when the model promises to gain less than 0.03 nats; that last
    step is still made, without a gradient at its end.
    Steps that raise the energy are taken back and their length cut; the inverse Hessian starts from ``curvature`` and
    is updated with Powell's damping, so it stays positive definite.

    Args:
        decoders: the C classes.
        images: x, ``(N, 784)``.
        starts: S starting points, ``(S, C, N, L)``.
        curvature: ``(C, L, L)``, see ``average_curvature``.
        steps: the most steps of a descent, the first one included.
        radius: of the ball.
        beta: weight of the KL term.

    Returns:
        Latents ``(C, N, L)`` and their energies ``(C, N)``.
    """
    grid = starts.shape[1:3]
    pairs = Pairs.of_all(decoders, images, beta)
    latents, energy = minimise_pairs(pairs, starts.flatten(1, 2), curvature, steps=steps, radius=radius)
    return latents.unflatten(0, grid), energy.unflatten(0, grid)


def minimise_pairs(
    pairs: Pairs, starts: Tensor, curvature: Tensor, *, steps: int, radius: float
) -> tuple[Tensor, Tensor]:
    """``minimise`` for pairs of an image and a class: starts ``(S, P, L)`` to latents ``(P, L)``, energies ``(P,)``."""
    count, number, size = starts.shape
    inverse = torch.linalg.inv(curvature.to(starts.dtype))
    latents = starts.transpose(0, 1).reshape(-1, size)
    if steps > 0:
        latents = project_to_ball(latents, radius)
    pairs = pairs.times(count)
    problem = _Problem(pairs, radius)
    every = torch.arange(len(latents), device=latents.device)
    walk = _Walk(
        latents,
        *pairs.energy_and_gradient(latents, every),
        inverse[pairs.label],
        latents.new_full((len(latents),), _LONGEST_STEP),
    )
    first = int(count > 1 and steps > 1)
    tried = walk.energy
    if first:
        move = problem.move(walk)
        promised = (walk.energy - _promise(walk.gradient, move)).view(number, count)
        rows = (promised <= promised.amin(1, keepdim=True) + _PROMISING).flatten().nonzero()[:, 0]
        walk.put(rows, problem.step(walk.at(rows), move[rows], rows))
        tried = torch.full_like(walk.energy, torch.inf).index_copy(0, rows, walk.energy[rows])
    rows = count * every[:number] + tried.view(number, count).argmin(1)
    final = walk.at(rows)
    active = every[:number]
    for _ in range(first, steps - 1):
        move = problem.move(final.at(active))
        promising = _promise(final.gradient[active], move) > _TOLERANCE
        active, move = active[promising], move[promising]
        if not len(active):
            break
        final.put(active, problem.step(final.at(active), move, rows[active]))
    latents, energy = final.latents, final.energy
    if steps > 0:
        last = latents + problem.move(final)
        last_energy = pairs.energy(last, rows)
        lower = last_energy < energy
        latents, energy = torch.where(lower[:, None], last, latents), torch.where(lower, last_energy, energy)
    return latents, energy


@dataclass(frozen=True)
class _Problem:
    pairs: Pairs
    radius: float

    def move(self, walk: _Walk) -> Tensor:
        """The quasi-Newton step, no longer than trusted, along the sphere where the ball ends."""
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

    def step(self, walk: _Walk, move: Tensor, rows: Tensor) -> _Walk:
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


def _promise(gradient: Tensor, move: Tensor) -> Tensor:
    """How much lower a quasi-Newton step leads, by its quadratic model."""
    return -0.5 * (gradient * move).sum(1)


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
