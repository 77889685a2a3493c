"""Smallest perturbations that take images from some points to another one: the programs of the bisector attacks.

For the perturbation d of an image x, point b takes x + d from point a if ``w_a . d >= r_a`` with
``w_a = 2 (p_b - p_a)`` and ``r_a = E_b(x) - E_a(x)``; all points a must be beaten, and x + d stays in the box.
For Binary ABS the image that the points see is binary: flipping pixel i lowers ``gamma_b E_b - gamma_a E_a`` by a
fixed gain ``g_ai``, and the gains of the flipped pixels must add up to ``r_a``.

A program has one problem an image, whose state it keeps in double precision. Infeasible problems give their best
effort: candidates are judged by the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from abs_defense.inference import Observation

_OVERSHOOT = 1e-3
_SWEEPS = 12
_NEWTON_STEPS = 12
_MIXTURES = 24


@dataclass(frozen=True)
class Points:
    """One point of a class for each of n images: energy ``gamma (||p - x||^2 + k)``.

    Attributes:
        images: p, ``(n, 784)``.
        offsets: k, ``(n,)``.
        gamma: factor of the class, ``(n,)``; ones for ABS.
    """

    images: Tensor
    offsets: Tensor
    gamma: Tensor

    @classmethod
    def found(cls, observation: Observation, classes: Tensor, index: Tensor) -> Points:
        """What inference found for images ``index`` of the observation and one class each."""
        gamma = observation.gamma.double()[classes]
        energies = observation.inference.energy.double()[index, classes] / gamma
        images = observation.inference.reconstructions.double()[index, classes].flatten(1)
        return cls(images, energies - (images - seen_images(observation)[index]).square().sum(1), gamma)

    def energy(self, seen: Tensor) -> Tensor:
        """Of the images ``(n, 784)`` that the points see, ``(n,)``."""
        return self.gamma * ((self.images - seen).square().sum(1) + self.offsets)

    def at(self, rows: Tensor) -> Points:
        """The points of some of the images."""
        return Points(self.images[rows], self.offsets[rows], self.gamma[rows])

    def where(self, mask: Tensor, other: Points) -> Points:
        """These points where ``mask``, else the other ones."""
        return Points(
            torch.where(mask[:, None], self.images, other.images),
            torch.where(mask, self.offsets, other.offsets),
            torch.where(mask, self.gamma, other.gamma),
        )


def seen_images(observation: Observation) -> Tensor:
    """What the VAEs saw, ``(N, 784)`` in double precision."""
    images = observation.images.double().flatten(1)
    return images if observation.threshold is None else (images > observation.threshold).double()


@dataclass(frozen=True)
class Setting:
    """What the problems of n images are about.

    Attributes:
        original: images in the attack's space, ``(n, 784)``.
        model_images: the same in the model's space.
        seen: what the VAEs see of them.
        scale: d(model space) / d(attack space), ``(784,)``.
        bounds: of the attack's space.
        threshold: of Binary ABS, else None.
        margin: how far across the threshold pixels go, in the model's space.
    """

    original: Tensor
    model_images: Tensor
    seen: Tensor
    scale: Tensor
    bounds: tuple[float, float]
    threshold: float | None
    margin: float

    def at(self, rows: Tensor) -> Setting:
        """The problems of some of the images."""
        return replace(self, original=self.original[rows], model_images=self.model_images[rows], seen=self.seen[rows])


class Program(ABC):
    """The smallest perturbation in one norm."""

    def solve(self, setting: Setting, attackers: Points, defenders: Sequence[Points]) -> Tensor:
        """Images in the attack's space, ``(n, 784)``, that ``attackers`` take from all ``defenders``."""
        rest = torch.stack([attackers.energy(setting.seen) - a.energy(setting.seen) for a in defenders], dim=1)
        rest = rest + _OVERSHOOT * rest.abs() + 1e-6
        change = self._flip if setting.threshold is not None else self._move
        images = setting.original + change(setting, attackers, defenders, rest)
        return images.clamp(*setting.bounds)

    def _move(self, setting: Setting, attackers: Points, defenders: Sequence[Points], rest: Tensor) -> Tensor:
        ways = torch.stack([2.0 * (attackers.images - a.images) * setting.scale for a in defenders], dim=1)
        lower, upper = (bound - setting.original for bound in setting.bounds)
        return self._smallest(ways, rest, lower, upper)

    def _flip(self, setting: Setting, attackers: Points, defenders: Sequence[Points], rest: Tensor) -> Tensor:
        sign = 1.0 - 2.0 * setting.seen
        cost = [p.gamma[:, None] * sign * (1.0 - 2.0 * p.images) for p in (attackers, *defenders)]
        gains = torch.stack([a - cost[0] for a in cost[1:]], dim=1)
        assert setting.threshold is not None
        across = setting.threshold + setting.margin * sign - setting.model_images
        visible = setting.scale != 0
        change = torch.where(visible, across / torch.where(visible, setting.scale, 1.0), 0.0)
        return change * self._chosen(gains * visible, rest, change.abs())

    @abstractmethod
    def _smallest(self, ways: Tensor, rest: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """d with ``ways . d >= rest`` and ``lower <= d <= upper``: ``(n, m, 784), (n, m), ... -> (n, 784)``."""

    @abstractmethod
    def _chosen(self, gains: Tensor, rest: Tensor, distance: Tensor) -> Tensor:
        """Pixels to flip, each ``distance`` away from it, so that the gains add up: ``(n, 784)`` of zeros and ones."""


class L2Program(Program):
    """A quadratic program, by coordinate ascent in its dual (Hildreth's method with the box kept exactly)."""

    def _smallest(self, ways: Tensor, rest: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        count = ways.shape[1]
        multipliers = torch.zeros_like(rest)
        free = torch.zeros_like(lower)
        for _ in range(_SWEEPS if count > 1 else 1):
            before = multipliers.clone()
            for j in range(count):
                way = ways[:, j]
                free = free - multipliers[:, j, None] * way
                multipliers[:, j] = _multiplier(free, way, rest[:, j], lower, upper)
                free = free + multipliers[:, j, None] * way
            if torch.allclose(before, multipliers, rtol=1e-4, atol=1e-9):
                break
        return free.clamp(lower, upper)

    def _chosen(self, gains: Tensor, rest: Tensor, distance: Tensor) -> Tensor:
        return _cover(gains, rest, distance.square(), largest=False)


class LInfProgram(Program):
    """A linear program, solved by HiGHS."""

    def _smallest(self, ways: Tensor, rest: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        solved = [
            _linear_program(*(part.cpu().numpy() for part in problem))
            for problem in zip(ways, rest, lower, upper, strict=True)
        ]
        return torch.from_numpy(np.stack(solved)).to(ways)

    def _chosen(self, gains: Tensor, rest: Tensor, distance: Tensor) -> Tensor:
        return _cover(gains, rest, distance, largest=True)


class L0Program(Program):
    """The fewest pixels, moved to a bound, found greedily."""

    def _smallest(self, ways: Tensor, rest: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        moves = torch.cat([upper, lower], dim=1)
        gains = torch.cat([ways, ways], dim=2) * moves[:, None]
        chosen = moves * _cover(gains, rest, torch.ones_like(moves), largest=False)
        up, down = chosen.chunk(2, dim=1)
        return up + down

    def _chosen(self, gains: Tensor, rest: Tensor, distance: Tensor) -> Tensor:
        return _cover(gains, rest, torch.ones_like(distance), largest=False)


def _multiplier(free: Tensor, way: Tensor, rest: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Least t >= 0 with ``way . clip(free + t way) >= rest``, by Newton's method: ``(n,)``."""
    t = torch.zeros_like(rest)
    for _ in range(_NEWTON_STEPS):
        moved = free + t[:, None] * way
        inside = (moved > lower) & (moved < upper) | (moved <= lower) & (way > 0) | (moved >= upper) & (way < 0)
        short = rest - (way * moved.clamp(lower, upper)).sum(1)
        slope = (way.square() * inside).sum(1)
        t = (t + torch.where(slope > 0, short / slope.clamp_min(1e-30), 0.0)).clamp_min(0.0)
    return t


def _linear_program(
    ways: NDArray[np.float64], rest: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """d of least maximum with ``ways @ d >= rest`` and ``lower <= d <= upper``; zeros if there is none."""
    pixels = len(lower)
    identity, column = scipy.sparse.identity(pixels), np.ones((pixels, 1))
    matrix = scipy.sparse.bmat(
        [[identity, -column], [-identity, -column], [scipy.sparse.csr_array(-ways), None]], format="csr"
    )
    solution = scipy.optimize.linprog(
        np.r_[np.zeros(pixels), 1.0],
        A_ub=matrix,
        b_ub=np.r_[np.zeros(2 * pixels), -rest],
        bounds=[*zip(lower, upper, strict=True), (0.0, None)],
        method="highs",
    )
    return np.zeros(pixels) if solution.x is None else np.asarray(solution.x[:-1])


def _cover(gains: Tensor, rest: Tensor, cost: Tensor, *, largest: bool) -> Tensor:
    """Few moves whose gains add up to all of ``rest``.

    Moves are taken in the order of gain for cost until all m demands are met, the gain being a mixture over the
    demands. Demands that a mixture leaves unmet weigh more in the next one; the cheapest cover of all mixtures is
    kept.

    Args:
        gains: ``(n, m, D)``.
        rest: ``(n, m)``.
        cost: ``(n, D)``.
        largest: the largest cost counts instead of their sum.

    Returns:
        ``(n, D)`` of zeros and ones; all useful moves where even they are not enough.
    """
    weights = torch.full_like(rest, 1.0 / rest.shape[1])
    best = torch.zeros_like(cost)
    best_cost = torch.full_like(rest[:, :1], torch.inf)
    for mixture in range(_MIXTURES if rest.shape[1] > 1 else 1):
        mixed = torch.einsum("nm,nmd->nd", weights, gains)
        useful = mixed > 0
        key = torch.where(useful, -cost if largest else mixed / cost.clamp_min(1e-12), -torch.inf)
        order = key.argsort(dim=1, descending=True, stable=True)
        reached = (gains * useful[:, None]).gather(2, order[:, None].expand_as(gains)).cumsum(2)
        spent = (cost * useful).gather(1, order)
        spent = spent.cummax(1).values if largest else spent.cumsum(1)
        count = _first((reached >= rest[:, :, None]).all(1))
        total = torch.where(count < len(spent[0]), spent.gather(1, count.clamp_max(len(spent[0]) - 1)), torch.inf)
        taken = torch.zeros_like(cost).scatter(1, order, (torch.arange(cost.shape[1]).to(count) <= count).to(cost))
        better = (total < best_cost) | (mixture == 0)
        best, best_cost = torch.where(better, taken * useful, best), torch.minimum(total, best_cost)
        relaxed = _first(
            torch.einsum("nm,nmd->nd", weights, reached) >= (weights * rest).sum(1, keepdim=True)
        ).clamp_max(cost.shape[1] - 1)
        unmet = rest - reached.gather(2, relaxed[:, None].expand(-1, rest.shape[1], -1))[:, :, 0]
        weights = weights * (unmet / rest.abs().amax(1, keepdim=True).clamp_min(1e-12)).clamp(-2.0, 2.0).exp()
        weights = weights / weights.sum(1, keepdim=True)
    return best


def _first(condition: Tensor) -> Tensor:
    """Index of the first true value of each row, or the length where there is none: ``(n, D) -> (n, 1)``."""
    index = condition.int().argmax(1, keepdim=True)
    return torch.where(condition.any(1, keepdim=True), index, condition.shape[1])
