"""What is evaluated: the models and, per norm, foolbox attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import foolbox
from foolbox.attacks.base import MinimizationAttack

from abs_defense.attacks import (
    L0BisectorAttack,
    L2BisectorAttack,
    LatentDescentAttack,
    LInfBisectorAttack,
    PointwiseAttack,
)
from abs_defense.certificates import Norm


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


def _pointwise_from_bisector(**settings: Any) -> PointwiseAttack:
    return PointwiseAttack(init_attack=L0BisectorAttack(), **settings)


FULL_ATTACKS: Sequence[AttackSpec] = (
    AttackSpec("latent-descent", "l2", LatentDescentAttack, queries=130),
    AttackSpec("l2-bisector", "l2", L2BisectorAttack, {"steps": 20, "rivals": 3}, queries=45),
    AttackSpec("ddn-100", "l2", foolbox.attacks.DDNAttack, {"steps": 100}, queries=102),
    AttackSpec("l2-fmn", "l2", foolbox.attacks.L2FMNAttack, {"steps": 60}, queries=62),
    AttackSpec("linf-bisector", "linf", LInfBisectorAttack, {"steps": 20, "rivals": 3}, queries=45),
    AttackSpec("linf-fmn-100", "linf", foolbox.attacks.LInfFMNAttack, {"steps": 100}, queries=102),
    AttackSpec("l0-bisector", "l0", L0BisectorAttack, {"steps": 20, "rivals": 3}, queries=45),
    AttackSpec("l0-bisector-pointwise", "l0", _pointwise_from_bisector, {"restarts": 3}, queries=110),
    AttackSpec("pointwise", "l0", PointwiseAttack, {"restarts": 2}, queries=600),
    AttackSpec("l0-fmn-100", "l0", foolbox.attacks.L0FMNAttack, {"steps": 100}, queries=102),
)

PRESETS: dict[str, Sequence[AttackSpec]] = {"quick": FIRST_ATTACKS, "full": FULL_ATTACKS}


def choose_attacks(preset: str, names: Sequence[str] = ()) -> Sequence[AttackSpec]:
    """The attacks of a preset, or those of all presets with the given names.

    Raises:
        ValueError: no such preset or attack.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if not names:
        return PRESETS[preset]
    known = {attack.name: attack for attacks in PRESETS.values() for attack in attacks}
    for name in names:
        if name not in known:
            raise ValueError(f"attack: expected one of {', '.join(known)}, got {name!r}")
    return [known[name] for name in dict.fromkeys(names)]
