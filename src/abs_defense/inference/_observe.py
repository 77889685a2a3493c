"""How a model tells whoever listens what its inference found, through any number of wrappers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._infer import Inference


@dataclass(frozen=True)
class Observation:
    """One call of an ABS model, as seen from inside.

    Attributes:
        images: what reached the model after all preprocessing, ``(N, 1, 28, 28)`` in [0, 1].
        inference: what was found; energies as they are compared between classes.
        threshold: at which the model binarises the images before inference, None if it does not.
        gamma: factor of each class's energy, ``(C,)``; ones for ABS.
        eta: offset of the model's confidence softmax.
    """

    images: Tensor
    inference: Inference
    threshold: float | None
    gamma: Tensor
    eta: float

    @classmethod
    def concatenate(cls, parts: Sequence[Observation]) -> Observation:
        """One observation of several calls of the same model.

        Raises:
            ValueError: they are of models that binarise or scale differently.
        """
        first = parts[0]
        if any(p.threshold != first.threshold or not torch.equal(p.gamma, first.gamma) for p in parts):
            raise ValueError("model: expected one ABS model inside, got several that binarise or scale differently")
        inference = Inference(
            *(torch.cat([getattr(p.inference, f.name) for p in parts]) for f in dataclasses.fields(Inference))
        )
        images = torch.cat([p.images for p in parts])
        return cls(images, inference, first.threshold, first.gamma, first.eta)


_listeners: ContextVar[tuple[list[Observation], ...]] = ContextVar("abs_defense_listeners", default=())


@contextmanager
def listen() -> Iterator[list[Observation]]:
    """Collect the ``Observation`` of every ABS call made inside, in this thread or task."""
    heard: list[Observation] = []
    token = _listeners.set((*_listeners.get(), heard))
    try:
        yield heard
    finally:
        _listeners.reset(token)


def somebody_listens() -> bool:
    """Whether ``publish`` would make an observation."""
    return bool(_listeners.get())


def publish(observe: Callable[[], Observation]) -> None:
    """Give the observation to all listeners; it is only made if there are any."""
    listeners = _listeners.get()
    if listeners:
        observation = observe()
        for heard in listeners:
            heard.append(observation)
