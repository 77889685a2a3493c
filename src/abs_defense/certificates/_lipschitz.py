"""Bounds that hold each class's energy against how fast it can change: ours by Lipschitz, and the paper's."""

from __future__ import annotations

import torch
from torch import Tensor


def lipschitz_radius(energies: Tensor, labels: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """``(sqrt(E_c) - sqrt(E_y)) / 2``, the least over the rivals c: the root of an energy is 1-Lipschitz in L2,
    because it is the distance from (x, 0) to the nearest (p, sqrt(k)).

    Args:
        energies: ``(n, C)``, for rivals not above the true ones, for the own class not below.
        labels: ``(n,)``.
        slack: a lead in energy that is not enough, ``(n,)``.

    Returns:
        Radii ``(n,)`` and rivals ``(n,)``.
    """
    roots = energies.clamp_min(0.0).sqrt()
    own = energies.gather(1, labels[:, None])
    lead = energies - own - slack[:, None]
    return _least(lead / (2.0 * (roots + own.clamp_min(0.0).sqrt())).clamp_min(1e-300), labels)


def paper_radius(
    distances: Tensor, own_energy: Tensor, own_distance: Tensor, labels: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """``(d_c^2 - E_y) / (2 (d_c + r_y))``, the least over the rivals c (paper, section 5).

    Args:
        distances: ``d_c = min_z ||G_c(z) - x||``, ``(n, C)``.
        own_energy: E_y, ``(n,)``.
        own_distance: ``r_y = ||G_y(z*) - x||``, ``(n,)``.
        labels: ``(n,)``.
        slack: a lead in energy that is not enough, ``(n,)``.

    Returns:
        Radii ``(n,)`` and rivals ``(n,)``.
    """
    lead = distances.square() - (own_energy + slack)[:, None]
    return _least(lead / (2.0 * (distances + own_distance[:, None])).clamp_min(1e-300), labels)


def _least(radii: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    radii = radii.clamp_min(0.0).scatter(1, labels[:, None], torch.inf)
    least = radii.min(1)
    return least.values, least.indices
