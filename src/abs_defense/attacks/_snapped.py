"""Attacks on models that binarise their input, without the changes that such a model does not see."""

from __future__ import annotations

from typing import Any

import eagerpy as ep
import numpy as np
from foolbox.attacks.base import MinimizationAttack
from foolbox.criteria import Criterion
from foolbox.models import Model

from abs_defense._checks import check_positive
from abs_defense.attacks._base import Oracle
from abs_defense.attacks._epsilon_search import Delegating, detached


class SnappedAttack(Delegating):
    """Runs an attack on a model that binarises its input, then moves its result to the nearest image that looks the
    same to the model.

    Pixels on the same side of the threshold as those of the original get the original's value, the others go just
    across the threshold: what Latent Descent does for Binary ABS (Schott et al. 2018, section 4.3), for any attack.
    The perturbation never grows in any Lp norm. Where the attack's own result is adversarial and the moved one is not
    (the model does not binarise so after all), the attack's own is kept.

    Args:
        attack: a minimisation attack of foolbox.
        threshold: pixels above it are bright, all others dark; in units of the model's bounds.
        margin: how far across the threshold pixels go, in the same units.

    Raises:
        ValueError: ``margin`` is not positive.
    """

    def __init__(self, attack: MinimizationAttack, *, threshold: float = 0.5, margin: float = 1e-3) -> None:
        check_positive(margin=margin)
        self.attack = attack
        self.threshold = threshold
        self.margin = margin

    def _perturb(
        self, model: Model, x: ep.Tensor, criterion: Criterion, early_stop: float | None, **kwargs: Any
    ) -> ep.Tensor:
        x = detached(x)
        result = self.attack.run(model, x, criterion, early_stop=early_stop, **kwargs)
        bright = result > self.threshold
        # The attack itself may have stopped within the margin.
        across = ep.where(
            bright,
            ep.minimum(result, self.threshold + self.margin),
            ep.maximum(result, self.threshold - self.margin),
        )
        snapped = ep.where(bright == (x > self.threshold), x, across)
        rows = np.flatnonzero((snapped != result).reshape((len(x), -1)).any(axis=1).numpy())
        if not len(rows):
            return result
        keep = rows[Oracle(model, criterion, x)(snapped[rows], rows)]
        return ep.index_update(result, keep, snapped[keep]) if len(keep) else result
