"""Decisions only: inference that stops working on classes that can't win any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("abs_defense_decisions_only", default=False)


@contextmanager
def decisions_only() -> Iterator[None]:
    """Inside, ABS models may leave the descents of hopeless classes unfinished, in this thread or task.

    The largest logit is the same as outside; those of the other classes are of unfinished descents. That is measured,
    not proved: the margins are a good deal more than descents gained on digits, adversarials, noise and inverted
    digits, with the bundled weights. Calls that need more
    (gradients, ``infer``, attacks that listen) are not affected.
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def only_decisions_wanted() -> bool:
    """Whether the caller is inside ``decisions_only``."""
    return _wanted.get()


@dataclass(frozen=True)
class Contest:
    """Which classes can still have the lowest energy of an image.

    Attributes:
        scale: factor of each class's energy in the comparison, ``(C,)``.
        margins: after so many steps, how far behind the best a class is hopeless, in nats.
        share: of its energy that every class may still lose, which is more where no class explains the image (of
            inverted digits 0.13 was the most, with 20 prototypes 0.18; of digits it is less than the margins).
    """

    scale: Tensor
    margins: Sequence[tuple[int, float]]
    share: float = 0.3

    def margin(self, steps: int) -> float:
        """The margin after ``steps`` steps; infinite before the first entry."""
        reached = [margin for least, margin in self.margins if steps >= least]
        return reached[-1] if reached else torch.inf

    def is_open(self, energies: Tensor, steps: int) -> Tensor:
        """Whether each class may still win: ``(C, N) -> (C, N)``."""
        compared = energies * self.scale[:, None]
        gain = (self.share * compared).clamp_min(self.margin(steps))
        return compared - gain <= compared.min(0).values
