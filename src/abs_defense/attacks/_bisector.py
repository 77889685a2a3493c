"""Minimal-norm attacks that know the points between which ABS decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import torch
from foolbox.criteria import Criterion
from foolbox.distances import Distance, l2, linf
from foolbox.models import Model
from torch import Tensor

from abs_defense._checks import check_counts, check_positive
from abs_defense.attacks._base import ContractAttack, L0Distance, as_starting_points
from abs_defense.attacks._insight import Goal, Insight, bisect, per_image
from abs_defense.attacks._programs import (
    L0Program,
    L2Program,
    LInfProgram,
    Points,
    Program,
    Setting,
    seen_images,
)
from abs_defense.inference import Observation

_TOLERANCE = 1e-4
_PATIENCE = 4
_LARGEST = torch.finfo(torch.float32).max  # but less than the distance of an image for which nothing was found


class BisectorAttack(ContractAttack):
    """Cross the bisectors between the points of the true class and one point of another class.

    ABS compares the energies of points ``(p, k) = (G(z), KL(z))``: ``E_p(x) = ||p - x||^2 + k``. The images that a
    point b of class c takes from a point a of class y are a half space, ``2 d . (p_b - p_a) >= E_b(x) - E_a(x)`` for
    the perturbation d. So the attack alternates: find the smallest d in the box that takes the image from every
    point of the true class met so far to b (a quadratic or linear program; for Binary ABS a choice of pixels to
    flip); infer again; add the point of the true class found there; replace b by the point of its class found there,
    if that is better. The smallest adversarial met counts, and is pulled towards the original by a binary search.
    Every candidate is judged by the model itself.

    Called with ``starting_points``, adversarials of another attack, it tries the classes and points found there
    first, and they count as found.

    Works on every foolbox model with ABS or Binary ABS inside, as ``LatentDescentAttack`` does.

    Args:
        steps: model queries an image and start.
        rivals: how many other classes are tried, nearest bisector first; 1 with a target.
        points: the most points of the true class kept; the least binding is dropped.
        binary_search_steps: at the end.
        margin: how far across the threshold pixels go, in the model's units (Binary ABS).

    Raises:
        ValueError: a setting is out of its range; at the call as ``LatentDescentAttack``.
    """

    _program: ClassVar[Program]
    _scalable: ClassVar[bool] = True  # whether a perturbation gets smaller when it is scaled down

    def __init__(
        self,
        *,
        steps: int = 20,
        rivals: int = 3,
        points: int = 8,
        binary_search_steps: int = 10,
        margin: float = 1e-5,
    ) -> None:
        check_counts(steps=steps, rivals=rivals, points=points)
        check_counts(0, binary_search_steps=binary_search_steps)
        check_positive(margin=margin)
        self.steps = steps
        self.rivals = rivals
        self.points = points
        self.binary_search_steps = binary_search_steps
        self.margin = margin

    def _perturb(
        self,
        model: Model,
        x: ep.Tensor,
        criterion: Criterion,
        early_stop: float | None,
        starting_points: Any = None,
    ) -> ep.Tensor:
        goal = Goal.of(criterion, self)
        insight = Insight(model, criterion, x)
        observation = insight.clean_observation
        setting = insight.setting(self.margin)
        original: Tensor = x.raw.detach()
        best = _Best.of(original, per_image(insight.clean, original), self.distance)
        enough = 0.0 if early_stop is None else min(early_stop, _LARGEST)
        everyone = torch.arange(len(original), device=original.device)

        if starting_points is not None:
            points = as_starting_points(starting_points, x, model)
            hit, found = insight(points.raw, everyone)
            best.update(points.raw, everyone, per_image(hit, original))
            rivals = goal.rivals(found.inference.energy, everyone)
            self._approach(insight, goal, setting, everyone[best.size > enough], rivals, found, best, enough)
        for rivals in self._nearest_rivals(goal, observation, everyone).unbind(1):
            rows = everyone[best.size > enough]
            self._approach(insight, goal, setting, rows, rivals, observation, best, enough)

        rows = everyone[(best.size > enough) & best.size.isfinite()]
        if self._scalable and len(rows):
            _, outer = bisect(insight, original[rows], best.images[rows], rows, self.binary_search_steps)
            best.update(outer, rows, torch.ones_like(rows, dtype=torch.bool))
        return ep.astensor(best.images)

    def _nearest_rivals(self, goal: Goal, observation: Observation, rows: Tensor) -> Tensor:
        """Classes by the distance of their bisector, nearest first, ``(N, rivals)``; the target if there is one."""
        if goal.targets is not None:
            return goal.targets[:, None]
        inference = observation.inference
        defenders = goal.defenders(inference.energy, rows)
        points = inference.reconstructions.flatten(2)
        gap = inference.energy - inference.energy.gather(1, defenders[:, None])
        way = (points - points[rows, defenders][:, None]).norm(dim=2)
        distance = (gap / way).scatter(1, defenders[:, None], torch.inf)
        order: Tensor = distance.argsort(dim=1, stable=True)[:, :-1]
        return order[:, : self.rivals]

    def _approach(
        self,
        insight: Insight,
        goal: Goal,
        setting: Setting,
        rows: Tensor,
        rivals: Tensor,
        start: Observation,
        best: _Best,
        enough: float,
    ) -> None:
        """Improve ``best`` for the images ``rows`` by going to their ``rivals``, from the points found in ``start``.

        ``setting``, ``rivals`` and ``start`` are of all images.
        """
        rivals, setting = rivals[rows], setting.at(rows)
        attackers = Points.found(start, rivals, rows)
        defenders = [Points.found(start, goal.defenders(start.inference.energy[rows], rows), rows)]
        last, waited = best.size[rows], torch.zeros_like(rows)
        for _ in range(self.steps):
            if not len(rows):
                return
            candidates = self._program.solve(setting, attackers, defenders)
            candidates = candidates.view(-1, *best.images.shape[1:]).to(best.images.dtype)
            hit, observation = insight(candidates, rows)
            best.update(candidates, rows, per_image(hit, candidates))

            seen, everyone = seen_images(observation), torch.arange(len(rows), device=rows.device)
            found = Points.found(observation, rivals, everyone)
            # A kept point that the model no longer finds would give the same candidate again.
            better = (found.energy(seen) < attackers.energy(seen)) | ~per_image(hit, rows)
            attackers = found.where(better, attackers)
            met = Points.found(observation, goal.defenders(observation.inference.energy, rows), everyone)
            if len(defenders) == self.points:
                energies = torch.stack([point.energy(seen) for point in defenders])
                defenders = _drop_worst(defenders, energies)
            defenders = [*defenders, met]

            size = best.size[rows]
            gained = size < last * (1.0 - _TOLERANCE)
            promising = ~per_image(hit, size) & (best.distances(candidates, rows) < size * (1.0 - _TOLERANCE))
            waited = torch.where(gained, 0, waited + (~promising).long())
            last = size
            going = (waited < _PATIENCE) & (size > enough)
            rows, rivals, last, waited = rows[going], rivals[going], last[going], waited[going]
            setting = setting.at(going)
            attackers, defenders = attackers.at(going), [point.at(going) for point in defenders]


def _drop_worst(points: list[Points], energies: Tensor) -> list[Points]:
    """Without each image's point of highest energy: ``m`` points and their energies ``(m, n)`` to ``m - 1`` points."""
    worst = energies.argmax(0)
    return [points[i + 1].where(worst <= i, points[i]) for i in range(len(points) - 1)]


class L2BisectorAttack(BisectorAttack):
    __doc__ = f"L2. {BisectorAttack.__doc__}"
    distance = l2
    _program = L2Program()


class LInfBisectorAttack(BisectorAttack):
    __doc__ = f"L-infinity. {BisectorAttack.__doc__}"
    distance = linf
    _program = LInfProgram()


class L0BisectorAttack(BisectorAttack):
    __doc__ = f"L0: the program is solved greedily. {BisectorAttack.__doc__}"
    distance = L0Distance()
    _program = L0Program()
    _scalable = False


@dataclass
class _Best:
    """The smallest adversarial of each image so far, and its distance; infinite where none was found."""

    original: Tensor
    images: Tensor
    size: Tensor
    distance: Distance

    @classmethod
    def of(cls, original: Tensor, clean: Tensor, distance: Distance) -> _Best:
        return cls(original, original.clone(), torch.where(clean, 0.0, torch.inf), distance)

    def distances(self, candidates: Tensor, rows: Tensor) -> Tensor:
        sizes: Tensor = self.distance(self.original[rows], candidates)
        return sizes

    def update(self, candidates: Tensor, rows: Tensor, hit: Tensor) -> None:
        size = self.distances(candidates, rows)
        better = hit & (size < self.size[rows])
        self.images[rows[better]] = candidates[better]
        self.size[rows[better]] = size[better].to(self.size.dtype)
