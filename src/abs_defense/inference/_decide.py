"""Misclassified or not: inference that stops working on classes once that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_asked: ContextVar[Tensor | None] = ContextVar("abs_defense_question", default=None)


@contextmanager
def misclassification_only(labels: Tensor) -> Iterator[None]:
    """Inside, ABS models need only tell whether the largest logit is that of ``labels``, in this thread or task.

    Where it is, all logits are the same as outside. Where it is not, the descents of the label and of one class with a
    larger logit are finished, so this is certain, and those of the other classes may not be: their logits are too low,
    and the largest one may be of another class than outside. So nothing around the model may do more with the logits
    than pass them on: no mean over several models, no rejection of uncertain images, no cache, no forward hook.

    Calls with another number of images than labels, with labels that are no classes, or that need more (gradients,
    ``infer``, attacks that listen) are not affected.

    Args:
        labels: one class an image, whole numbers, ``(N,)``.

    Raises:
        TypeError, ValueError: the labels are not ``(N,)`` whole numbers.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if labels.ndim != 1:
        raise ValueError(f"labels: expected shape (N,), one an image, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected whole numbers, got {labels.dtype}")
    token = _asked.set(labels.long())
    try:
        yield
    finally:
        _asked.reset(token)


def asked_labels(images: int, classes: int) -> Tensor | None:
    """Of so many images and classes: the labels of which the caller only wants to know whether they win, ``(N,)``; None
    if it wants to know everything."""
    labels = _asked.get()
    if labels is None or not len(labels) == images > 0 or not bool(((labels >= 0) & (labels < classes)).all()):
        return None
    return labels
