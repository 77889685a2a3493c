"""Misclassified or not: inference that stops working on classes once that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """Whether each image of a batch is classified as its label.

    Attributes:
        labels: ``(N,)``.
        answers: the logits of each call of a model that left classes unfinished; see ``trusts``.
    """

    labels: Tensor
    answers: list[Tensor] = field(default_factory=list)

    def suits(self, images: int, classes: int) -> bool:
        """Whether there is one label for each of so many images, and all are classes."""
        labels = self.labels
        return len(labels) == images > 0 and bool(((labels >= 0) & (labels < classes)).all())

    def trusts(self, outputs: object) -> bool:
        """Whether ``outputs``, of whatever is around the models, tell whether the labels win: not if they are anything
        else than the logits of one model, such as a mean over several, and classes were left unfinished."""
        if not self.answers:
            return True
        return len(self.answers) == 1 and isinstance(outputs, Tensor) and torch.equal(outputs, self.answers[0])


_asked: ContextVar[Question | None] = ContextVar("abs_defense_question", default=None)


@contextmanager
def misclassification_only(labels: Tensor) -> Iterator[Question]:
    """Inside, ABS models need only tell whether the largest logit is that of ``labels``, in this thread or task.

    Where it is, all logits are the same as outside. Where it is not, the descents of the label and of one class with a
    larger logit are finished, so this is certain, and those of the other classes may not be: their logits are too low,
    and the largest one may be of another class than outside. Calls with another number of images than labels, or that
    need more (gradients, ``infer``, attacks that listen), are not affected.

    Args:
        labels: one class an image, ``(N,)``.

    Yields:
        The question; ask without this context where it does not trust what came out.
    """
    question = Question(labels)
    token = _asked.set(question)
    try:
        yield question
    finally:
        _asked.reset(token)


def asked_question() -> Question | None:
    """What the caller wants to know; None if it is everything."""
    return _asked.get()
