"""Our attacks under ``foolbox.attacks``."""

from __future__ import annotations

import foolbox.attacks

from abs_defense.attacks._bisector import L0BisectorAttack, L2BisectorAttack, LInfBisectorAttack
from abs_defense.attacks._distal import DistalAttack
from abs_defense.attacks._latent_descent import LatentDescentAttack
from abs_defense.attacks._pointwise import PointwiseAttack

_ATTACKS = (
    DistalAttack,
    L0BisectorAttack,
    L2BisectorAttack,
    LInfBisectorAttack,
    LatentDescentAttack,
    PointwiseAttack,
)


def register(*, overwrite: bool = False) -> tuple[str, ...]:
    """Put our attacks into ``foolbox.attacks``, for benchmarks that look attacks up by name. May be called again.

    Args:
        overwrite: also replace foolbox's own attacks of the same name (``PointwiseAttack``).

    Returns:
        The names under which ``foolbox.attacks`` now has ours.
    """
    names = []
    for attack in _ATTACKS:
        name = attack.__name__
        if overwrite or not hasattr(foolbox.attacks, name):
            setattr(foolbox.attacks, name, attack)
        if getattr(foolbox.attacks, name) is attack:
            names.append(name)
    return tuple(names)
