"""What all models of this package have in common."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from abs_defense._memory import reuse_freed_memory


class Classifier(nn.Module):
    """A model of ``(N, 1, 28, 28)`` images in [0, 1] that returns ``(N, C)`` logits, ready to be evaluated.

    Attributes:
        binary_threshold: the model sees of each pixel only whether it is brighter than this; None if it sees more.
    """

    binary_threshold: float | None = None

    def __init__(self) -> None:
        super().__init__()
        reuse_freed_memory()

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings that its outputs depend on besides the weights."""

    def predict_proba(self, images: Tensor) -> Tensor:
        """Probabilities of the classes, ``(N, C)``.

        Raises:
            TypeError, ValueError: the images are not ``(N, 1, 28, 28)`` floats in [0, 1].
        """
        return self.confidence_softmax(self(images))

    def confidence_softmax(self, logits: Tensor) -> Tensor:
        """``predict_proba`` from logits that are already known: ``(N, C) -> (N, C)``."""
        return logits.softmax(dim=1)

    def weights_sha256(self) -> str:
        """Digest of the weights and calibration in use: which model a number was measured on."""
        return state_sha256(self)


def state_sha256(module: nn.Module) -> str:
    """Digest of names and values of all parameters and persistent buffers, in double precision."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


def device_of(module: nn.Module) -> torch.device:
    """Where the module is; the CPU if it has neither parameters nor buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
