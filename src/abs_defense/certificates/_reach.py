"""How far an image must move until one point takes it from another one: the bisector bound in each norm.

For the perturbation d of an image x, a point b takes x + d from a point a only if the gains of the moved pixels add up
to what b lacks. For ABS the gain of d_i is ``2 d_i (p_b - p_a)_i`` and b lacks ``E_b(x) - E_a(x)``. The VAEs of Binary
ABS see a binary image s; flipping pixel i gains ``(1 - 2 s_i) (gamma_a (1 - 2 p_a)_i - gamma_b (1 - 2 p_b)_i)``.

Every radius here is a lower bound, also where an iteration stops early: x + d stays in the box, and moves that no
attacker can make or that only help the defender are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["l2", "linf", "l0"]
NORM_NAMES: tuple[str, ...] = get_args(Norm)

_NEWTON_STEPS = 40
_CONVERGED = 500
_TINY = 1e-30


@dataclass(frozen=True)
class PointBatch:
    """m points, one of a class each, of energy ``gamma (||p - s||^2 + k)`` at the image s that they see.

    Attributes:
        images: p, ``(m, D)``.
        energies: at the image in question, gamma included, ``(m,)``.
        gamma: factor of the class, ``(m,)``; ones for ABS.
    """

    images: Tensor
    energies: Tensor
    gamma: Tensor

    def __getitem__(self, rows: Tensor) -> PointBatch:
        return PointBatch(self.images[rows], self.energies[rows], self.gamma[rows])

    def to(self, dtype: torch.dtype) -> PointBatch:
        """In another precision."""
        return PointBatch(self.images.to(dtype), self.energies.to(dtype), self.gamma.to(dtype))


@dataclass(frozen=True)
class Scene:
    """n images and what can happen to them.

    Attributes:
        images: x in [0, 1], ``(n, D)``; radii are proved in double precision.
        norm: in which perturbations are measured.
        threshold: of Binary ABS, else None.
    """

    images: Tensor
    norm: Norm
    threshold: float | None

    @property
    def seen(self) -> Tensor:
        """What the VAEs see, ``(n, D)``."""
        return self.images if self.threshold is None else (self.images > self.threshold).to(self.images)

    def __getitem__(self, rows: Tensor) -> Scene:
        return Scene(self.images[rows], self.norm, self.threshold)

    def to(self, dtype: torch.dtype) -> Scene:
        """In another precision."""
        return Scene(self.images.to(dtype), self.norm, self.threshold)

    def reach(self, attackers: PointBatch, defenders: PointBatch) -> tuple[Tensor, Tensor]:
        """Radii ``(n,)`` below which no attacker takes its image from its defender, and where it does: ``(n, D)``, as
        the VAEs see it. Infinity where an attacker can't."""
        lacking = attackers.energies - defenders.energies
        if self.threshold is None:
            radius, change = self._move(attackers.images - defenders.images, 0.5 * lacking)
        else:
            radius, change = self._flip(attackers, defenders, lacking)
        return torch.where(lacking > 0, radius, 0.0), self.seen + change

    def _move(self, way: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
        room = torch.where(way > 0, 1.0 - self.images, self.images).clamp_min(0.0)
        speed = way.abs() * (room > 0)
        if self.norm == "l0":
            radius, moved = _fewest(speed * room, lacking)
            return radius, moved * room * way.sign()
        radius, size = (_least_square if self.norm == "l2" else _least_maximum)(speed, room, lacking)
        return radius, size * way.sign()

    def _flip(self, attackers: PointBatch, defenders: PointBatch, lacking: Tensor) -> tuple[Tensor, Tensor]:
        assert self.threshold is not None
        sign = 1.0 - 2.0 * self.seen
        cost = (p.gamma[:, None] * (1.0 - 2.0 * p.images) for p in (defenders, attackers))
        gains = (sign * (next(cost) - next(cost))).clamp_min(0.0)
        across = (self.images - self.threshold).abs()
        radius, flipped = _fewest(gains, lacking)
        if self.norm != "l0":
            flips = radius + 1.0
            radius, flipped = (_cheapest_square if self.norm == "l2" else _cheapest_maximum)(gains, across, lacking)
            if self.norm == "l2":
                radius = torch.maximum(radius, _root_of_smallest(across, flips))
        return radius, flipped * sign


def _least_square(speed: Tensor, room: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """min ||d|| with ``speed . d >= lacking`` and ``0 <= d <= room`` (water filling): radius ``(n,)``, d ``(n, D)``.

    d = min(t speed, room). The gain is concave in t, so Newton's method comes from below and every t of it gives a
    lower bound by weak duality.
    """
    t = lacking / speed.square().sum(1).clamp_min(_TINY)
    for _ in range(_NEWTON_STEPS):
        filled = t[:, None] * speed
        short = lacking - (speed * torch.minimum(filled, room)).sum(1)
        slope = (speed.square() * (filled < room)).sum(1)
        step = torch.where((slope > 0) & (short > 0), short / slope.clamp_min(_TINY), 0.0)
        t = t + step
        if not bool((step > _CONVERGED * torch.finfo(t.dtype).eps * t).any()):
            break
    size = torch.minimum(t[:, None] * speed, room)
    dual = size.square().sum(1) + 2.0 * t * (lacking - (speed * size).sum(1))
    return _unless_out_of_reach(dual.clamp_min(0.0).sqrt(), speed, room, lacking), size


def _least_maximum(speed: Tensor, room: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """min max(d) with ``speed . d >= lacking`` and ``0 <= d <= room``: d = min(t, room)."""
    t = lacking / speed.sum(1).clamp_min(_TINY)
    for _ in range(_NEWTON_STEPS):
        short = lacking - (speed * torch.minimum(t[:, None], room)).sum(1)
        slope = (speed * (t[:, None] < room)).sum(1)
        step = torch.where((slope > 0) & (short > 0), short / slope.clamp_min(_TINY), 0.0)
        t = t + step
        if not bool((step > _CONVERGED * torch.finfo(t.dtype).eps * t).any()):
            break
    return _unless_out_of_reach(t, speed, room, lacking), torch.minimum(t[:, None], room) * (speed > 0)


def _unless_out_of_reach(radius: Tensor, speed: Tensor, room: Tensor, lacking: Tensor) -> Tensor:
    return torch.where((speed * room).sum(1) < lacking * (1.0 - 1e-12), torch.inf, radius)


def _fewest(gains: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """The largest k such that no k gains add up to ``lacking``, and the k + 1 that do: ``(n,)``, ``(n, D)``."""
    ordered, order = gains.sort(dim=1, descending=True)
    below = ordered.cumsum(1) < lacking[:, None] * (1.0 - 1e-12)
    count = below.sum(1)
    taken = torch.arange(gains.shape[1], device=gains.device) <= count[:, None]
    moved = torch.zeros_like(gains).scatter(1, order, taken.to(gains))
    return torch.where(below[:, -1], torch.inf, count.to(gains)), moved


def _cheapest_square(gains: Tensor, across: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bound of the root of the summed squares of ``across`` over flips that gain enough: the knapsack with
    fractions. Also the flips, rounded up."""
    price = across.square()
    order = (gains / price.clamp_min(_TINY)).argsort(dim=1, descending=True)
    gain, paid = gains.gather(1, order).cumsum(1), price.gather(1, order).cumsum(1)
    last = (gain < lacking[:, None] * (1.0 - 1e-12)).sum(1, keepdim=True)
    index = last.clamp_max(gains.shape[1] - 1)
    fraction = (gain.gather(1, index) - lacking[:, None]) / gains.gather(1, order).gather(1, index).clamp_min(_TINY)
    spent = paid.gather(1, index) - fraction.clamp(0.0, 1.0) * price.gather(1, order).gather(1, index)
    taken = torch.arange(gains.shape[1], device=gains.device) <= last
    flipped = torch.zeros_like(gains).scatter(1, order, taken.to(gains))
    radius = spent[:, 0].clamp_min(0.0).sqrt()
    return torch.where(last[:, 0] == gains.shape[1], torch.inf, radius), flipped * (gains > 0)


def _cheapest_maximum(gains: Tensor, across: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """Least distance such that all flips no farther than it gain enough; the flips."""
    ordered, order = across.sort(dim=1)
    last = (gains.gather(1, order).cumsum(1) < lacking[:, None] * (1.0 - 1e-12)).sum(1, keepdim=True)
    radius = ordered.gather(1, last.clamp_max(gains.shape[1] - 1))
    radius = torch.where(last == gains.shape[1], torch.inf, radius)
    return radius[:, 0], ((across <= radius) & (gains > 0)).to(gains)


def _root_of_smallest(across: Tensor, count: Tensor) -> Tensor:
    """Root of the sum of the ``count`` smallest squares: what so many flips cost at least."""
    sums = across.square().sort(dim=1).values.cumsum(1)
    index = count.clamp(1, across.shape[1]).long() - 1
    return torch.where(count.isfinite(), sums.gather(1, index[:, None])[:, 0].sqrt(), torch.inf)
