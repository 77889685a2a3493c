"""Attacks of foolbox that need something first: an epsilon, or a starting point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import eagerpy as ep
import numpy as np
from foolbox.attacks import HopSkipJumpAttack, LinearSearchBlendedUniformNoiseAttack
from foolbox.attacks.base import Attack, FixedEpsilonAttack, MinimizationAttack
from foolbox.criteria import Criterion
from foolbox.distances import Distance
from foolbox.models import Model

from abs_defense._checks import check_counts
from abs_defense.attacks._base import ContractAttack, DecidingModel, Oracle, Rows, query_rows, some_images

# Not the Boundary attack: nearly nine in ten of its queries are not misclassified, so there is nothing to save.
_DECISION_BASED = (HopSkipJumpAttack, LinearSearchBlendedUniformNoiseAttack)


class _Delegating(ContractAttack):
    """An attack that runs another one, and may be as random as that."""

    attack: FixedEpsilonAttack | MinimizationAttack

    @property
    def distance(self) -> Distance:
        """That of the attack."""
        return self.attack.distance

    def repeat(self, times: int) -> Attack:
        """Foolbox's repetition: the best of ``times`` runs."""
        return MinimizationAttack.repeat(self, times)


class EpsilonSearchAttack(_Delegating):
    """Makes a minimisation attack of an attack that needs an epsilon, which foolbox has no way to do.

    The epsilons are tried in ascending order, each on the images for which no smaller one succeeded; then the size of
    the perturbation is reduced along its direction by binary search.

    With a ``surrogate`` it is a transfer attack: perturbations are crafted on the surrogate and judged by the model.

    Args:
        attack: any attack of foolbox with a fixed epsilon.
        epsilons: to try, in units of the model's bounds.
        surrogate: foolbox model to craft on; None for the model itself.
        binary_search_steps: at the end.

    Raises:
        ValueError: no epsilon, or one that is not positive; the attack has no fixed epsilon; at the call, a criterion
            other than (targeted) misclassification.
    """

    def __init__(
        self,
        attack: FixedEpsilonAttack,
        epsilons: Sequence[float],
        *,
        surrogate: Model | None = None,
        binary_search_steps: int = 10,
    ) -> None:
        if not isinstance(attack, FixedEpsilonAttack):
            raise ValueError(f"attack: expected one of a fixed epsilon, got {type(attack).__name__}")
        try:
            tried = sorted(float(epsilon) for epsilon in epsilons)
        except (TypeError, ValueError):
            tried = []
        if not tried or not all(epsilon > 0 for epsilon in tried):
            raise ValueError(f"epsilons: expected positive numbers, got {epsilons!r}")
        check_counts(0, binary_search_steps=binary_search_steps)
        self.attack = attack
        self.epsilons = tuple(tried)
        self.surrogate = surrogate
        self.binary_search_steps = binary_search_steps

    def _perturb(self, model: Model, x: ep.Tensor, criterion: Criterion, early_stop: float | None) -> ep.Tensor:
        x = _detached(x)
        oracle = Oracle(model, criterion, x)
        result, open_rows = x, np.flatnonzero(~oracle.clean)
        found: list[Rows] = [np.empty(0, dtype=np.int64)]
        for epsilon in self.epsilons:
            if not len(open_rows):
                break
            with query_rows(open_rows):
                crafted = self.attack.run(
                    self.surrogate or model, x[open_rows], some_images(criterion, open_rows), epsilon=epsilon
                )
            crafted = self.attack.distance.clip_perturbation(x[open_rows], crafted, epsilon)
            flags = oracle(crafted, open_rows)
            result = ep.index_update(result, open_rows[flags], crafted[np.flatnonzero(flags)])
            found.append(open_rows[flags])
            open_rows = open_rows[~flags]
        rows = np.concatenate(found)
        if early_stop is not None and len(rows):
            rows = rows[self.attack.distance(x[rows], result[rows]).numpy() > early_stop]
        return self._shrink(oracle, x, result, rows)

    def _shrink(self, oracle: Oracle, x: ep.Tensor, result: ep.Tensor, rows: Rows) -> ep.Tensor:
        if not len(rows):
            return result
        inner, outer = x[rows], result[rows]
        for _ in range(self.binary_search_steps):
            middle = 0.5 * (inner + outer)
            flags = ep.from_numpy(x, oracle(middle, rows)).reshape((-1, *[1] * (x.ndim - 1)))
            inner, outer = ep.where(flags, inner, middle), ep.where(flags, middle, outer)
        return ep.index_update(result, rows, outer)


class StartedAttack(_Delegating):
    """Runs an attack that needs adversarial starting points on those images for which there is one; the others fail.

    Foolbox's Boundary, HopSkipJump and Brendel-Bethge attacks give up the whole batch where one image has none.

    Args:
        attack: a minimisation attack whose ``run`` takes ``starting_points``.
        init_attack: gives the starting points; by default foolbox's blended noise with 50 directions.

    Raises:
        ValueError: at the call, a criterion other than (targeted) misclassification, or ``starting_points``.
    """

    def __init__(self, attack: MinimizationAttack, init_attack: MinimizationAttack | None = None) -> None:
        self.attack = attack
        self.init_attack = init_attack or LinearSearchBlendedUniformNoiseAttack(directions=50, steps=50)

    def _perturb(
        self, model: Model, x: ep.Tensor, criterion: Criterion, early_stop: float | None, **kwargs: Any
    ) -> ep.Tensor:
        if "starting_points" in kwargs:
            raise ValueError(f"starting_points: {type(self.attack).__name__} itself takes them; here init_attack does")
        x = _detached(x)
        oracle = Oracle(model, criterion, x)
        rows = np.flatnonzero(~oracle.clean)
        if not len(rows):
            return x
        with query_rows(rows):
            starts = _run(self.init_attack, model, x[rows], some_images(criterion, rows))
        started = oracle(starts, rows)
        rows, starts = rows[started], starts[np.flatnonzero(started)]
        if not len(rows):
            return x
        with query_rows(rows):
            perturbed = _run(
                self.attack,
                model,
                x[rows],
                some_images(criterion, rows),
                early_stop=early_stop,
                starting_points=starts,
                **kwargs,
            )
        return ep.index_update(x, rows, perturbed)


def _run(attack: Attack, model: Model, x: ep.Tensor, criterion: Criterion, **kwargs: Any) -> ep.Tensor:
    """``attack.run``; one that is known to ask for decisions on whole batches only gets no more than these."""
    asked = DecidingModel(model, criterion) if type(attack) in _DECISION_BASED else model
    perturbed: ep.Tensor = attack.run(asked, x, criterion, **kwargs)  # type: ignore[attr-defined]
    return perturbed


def _detached(x: ep.Tensor) -> ep.Tensor:
    return ep.astensor(x.raw.detach()) if isinstance(x, ep.PyTorchTensor) else x
