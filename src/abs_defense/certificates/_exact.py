"""The exact minimal L2 perturbation of a classifier by finitely many points: quadratic programs.

The nearest image that point b wins is ``x + d`` with the smallest ||d|| such that
``d . (p_b - p_a) >= (E_b - E_a) / 2`` for every point a of the true class, and x + d in the box (Voracek and Hein,
ICML 2022).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from abs_defense.certificates._finite import FiniteSearch

Array = NDArray[np.float64]

_OVERSHOOT = 1e-4
_TOLERANCE = 1e-7
_VIOLATED = 4
_RESTARTS = 6


@dataclass(frozen=True)
class ExactResult:
    """The robustness of one image.

    Attributes:
        radius: proved.
        rival, index: the point that wins first.
        adversarial: ``(D,)``, just beyond; None if no point can win.
    """

    radius: float
    rival: int
    index: int
    adversarial: Tensor | None


@dataclass(order=True)
class _Attacker:
    """A point b, the constraints met so far, and the radius that they prove."""

    radius: float
    order: int
    held_by: list[int] = field(compare=False)
    multipliers: Array | None = field(compare=False, default=None)
    settled: bool = field(compare=False, default=False)


class ExactSearch:
    """Best first: the attacker of the lowest proved radius gets the constraints that its solution violates, until the
    first one violates none. All others have proved radii above it.

    Args:
        search: gives the attackers in the order of their cheap bounds.
        row: the image.
    """

    def __init__(self, search: FiniteSearch, row: int) -> None:
        self.search, self.row = search, row
        self.image = search.seen[row].cpu().numpy()
        self.own = search.points.images[search.label]
        offsets = search.points.offsets[search.label]
        self.own_constants = search.points.squares[search.label] + offsets

    def run(self) -> ExactResult:
        anchors = self.search.anchors(self.row)
        size, done = 64, 0
        candidates = self.search.candidates(self.row, size)
        heap: list[_Attacker] = []
        while True:
            least = heap[0].radius if heap else torch.inf
            if done < len(candidates.bounds) and float(candidates.bounds[done]) <= least:
                part = slice(done, done + max(8, done))
                radii, holders = self.search.refine(self.row, candidates, part, anchors, every=False)
                for i, (radius, holder) in enumerate(zip(radii.tolist(), holders.tolist(), strict=True)):
                    heapq.heappush(heap, _Attacker(radius, done + i, [int(anchors.index[holder])]))
                done += len(radii)
            elif candidates.rest < least:
                size *= 8
                candidates, heap, done = self.search.candidates(self.row, size), [], 0
            elif not heap or np.isinf(least):
                return ExactResult(np.inf, -1, -1, None)
            else:
                attacker = heapq.heappop(heap)
                rival, index = int(candidates.classes[attacker.order]), int(candidates.index[attacker.order])
                if attacker.settled:
                    return ExactResult(attacker.radius, rival, index, self._adversarial(rival, index, attacker))
                self._tighten(rival, index, attacker, slack=self.search.slack)
                heapq.heappush(heap, attacker)

    def _tighten(self, rival: int, index: int, attacker: _Attacker, slack: float) -> Array | None:
        """Solve with the constraints so far, then add those that the solution violates; the solution."""
        image = torch.from_numpy(self.image).to(self.search.seen)
        point = self.search.points.images[rival, index].double()
        offset = self.search.points.offsets[rival, index]
        own = self.own[attacker.held_by].double()
        ways = (point - own).cpu().numpy()
        energy = (point - image).square().sum() + offset
        held = (own - image).square().sum(1) + self.search.points.offsets[self.search.label, attacker.held_by]
        lacking = 0.5 * (energy - held - slack).cpu().numpy()
        start = np.zeros(len(lacking))
        if attacker.multipliers is not None:
            start[: len(attacker.multipliers)] = attacker.multipliers
        radius, attacker.multipliers, change = solve_quadratic_program(ways, lacking, self.image, start)
        attacker.radius = max(attacker.radius, radius)
        if np.isinf(radius):
            attacker.settled = True
            return None
        moved = torch.from_numpy(self.image + change).to(self.search.seen)
        energies = (
            self.own_constants - 2.0 * (self.own.to(self.search.product) @ moved.to(self.search.product)).double()
        )
        target = float((point - moved).square().sum() + offset - slack - moved.square().sum())
        nearest = energies.topk(min(_VIOLATED, len(energies)), largest=False).indices
        exact = self.own_constants[nearest] - 2.0 * (self.own[nearest].double() @ moved)
        violated = [
            int(a)
            for a, e in zip(nearest.tolist(), exact.tolist(), strict=True)
            if e < target - _TOLERANCE and a not in attacker.held_by
        ]
        attacker.held_by += violated
        attacker.settled = not violated
        return np.asarray(change)

    def _adversarial(self, rival: int, index: int, attacker: _Attacker) -> Tensor | None:
        """The optimal image, taken across the boundary by a little more than rounding."""
        beyond = _Attacker(0.0, 0, list(attacker.held_by))
        change = None
        while not beyond.settled:
            change = self._tighten(rival, index, beyond, slack=-_OVERSHOOT)
        return None if change is None else torch.from_numpy(self.image + change).to(self.search.seen)


def solve_quadratic_program(ways: Array, lacking: Array, image: Array, start: Array) -> tuple[float, Array, Array]:
    """min ||d|| subject to ``ways @ d >= lacking`` and ``0 <= image + d <= 1``.

    The dual has one multiplier u >= 0 a constraint: maximise ``2 u . lacking + ||d||^2 - 2 u . ways @ d`` with
    ``d = clip(u @ ways, -image, 1 - image)``. It is concave and smooth; L-BFGS-B maximises it. By weak duality its
    value at any u is a lower bound, so the radius is proved however far the solver came.

    Args:
        ways: ``(m, D)``.
        lacking: ``(m,)``.
        image: ``(D,)`` in [0, 1].
        start: of the multipliers, ``(m,)``.

    Returns:
        The radius (infinity if there is no solution), the multipliers ``(m,)`` and d ``(D,)``.
    """
    lower, upper = -image, 1.0 - image
    scale = 1.0 / np.maximum(np.linalg.norm(ways, axis=1), 1e-12)
    ways, lacking = ways * scale[:, None], lacking * scale
    best_gain = (np.maximum(ways * lower, ways * upper)).sum(1)
    if (best_gain < lacking * (1.0 - 1e-12)).any():
        return np.inf, start, np.zeros_like(image)

    def negative_dual(u: Array) -> tuple[float, Array]:
        change = np.clip(u @ ways, lower, upper)
        short = lacking - ways @ change
        return -float(change @ change + 2.0 * u @ short), -2.0 * short

    u, value = start / scale, -np.inf
    for _ in range(_RESTARTS):
        solution = scipy.optimize.minimize(
            negative_dual,
            u,
            jac=True,
            bounds=[(0.0, None)] * len(lacking),
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxfun": 4000},
        )
        u, before, value = solution.x, value, -float(solution.fun)
        # It sometimes stalls on the kinks of the dual; a fresh start there goes on.
        if value - before <= 1e-9 * max(1.0, value):
            break
    if value > image.size:
        return np.inf, u * scale, np.zeros_like(image)
    return float(np.sqrt(max(0.0, value))), u * scale, np.clip(u @ ways, lower, upper)
