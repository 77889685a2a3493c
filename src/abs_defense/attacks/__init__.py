"""Attacks of the paper and of ours as foolbox attacks, and foolbox models that estimate gradients or count queries."""

from abs_defense.attacks._art_attack import ARTAttack
from abs_defense.attacks._base import L0Distance
from abs_defense.attacks._bisector import L0BisectorAttack, L2BisectorAttack, LInfBisectorAttack
from abs_defense.attacks._distal import DistalAttack
from abs_defense.attacks._epsilon_search import EpsilonSearchAttack, StartedAttack
from abs_defense.attacks._estimators import FiniteDifferenceModel, RandomDirectionModel
from abs_defense.attacks._latent_descent import LatentDescentAttack
from abs_defense.attacks._pointwise import PointwiseAttack
from abs_defense.attacks._queries import QueryCounter, QueryLimitExceededError
from abs_defense.attacks._register import register
from abs_defense.attacks._snapped import snap_to_threshold

__all__ = [
    "ARTAttack",
    "DistalAttack",
    "EpsilonSearchAttack",
    "FiniteDifferenceModel",
    "L0BisectorAttack",
    "L0Distance",
    "L2BisectorAttack",
    "LInfBisectorAttack",
    "LatentDescentAttack",
    "PointwiseAttack",
    "QueryCounter",
    "QueryLimitExceededError",
    "RandomDirectionModel",
    "StartedAttack",
    "register",
    "snap_to_threshold",
]
