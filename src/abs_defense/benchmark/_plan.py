"""What is evaluated: the models and, per norm, foolbox attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import foolbox
from foolbox.attacks.base import MinimizationAttack

Norm = Literal["l2", "linf", "l0"]


@dataclass(frozen=True)
class AttackSpec:
    """One attack of the plan.

    Attributes:
        name: used in files and tables.
        norm: of the distance that the attack minimises.
        factory: makes the foolbox attack from the settings.
        settings: keyword arguments of the factory; part of every result.
        queries: expected model queries an image, for the progress bar.
    """

    name: str
    norm: Norm
    factory: Callable[..., MinimizationAttack]
    settings: dict[str, Any] = field(default_factory=dict)
    queries: int = 0

    def make(self) -> MinimizationAttack:
        return self.factory(**self.settings)


@dataclass(frozen=True)
class NormSpec:
    """How distances of a norm are shown: its symbol, the paper's threshold, and how to measure it."""

    label: str
    threshold: float
    distance: Any


NORMS: dict[Norm, NormSpec] = {
    "l2": NormSpec("L2", 1.5, foolbox.distances.l2),
    "linf": NormSpec("L∞", 0.3, foolbox.distances.linf),
    "l0": NormSpec("L0", 12.0, foolbox.distances.l0),
}

FIRST_ATTACKS: Sequence[AttackSpec] = (
    AttackSpec("ddn", "l2", foolbox.attacks.DDNAttack, {"steps": 30}, queries=32),
    AttackSpec("linf-fmn", "linf", foolbox.attacks.LInfFMNAttack, {"steps": 30}, queries=32),
    AttackSpec("l0-fmn", "l0", foolbox.attacks.L0FMNAttack, {"steps": 30}, queries=32),
)
