"""A model that clips its images first, for tools that leave [0, 1] on purpose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abs_defense.models._classifier import Classifier


class Clipped(Classifier):
    """``x -> model(clip(x, 0, 1))``: for noise, finite differences and universal perturbations that leave [0, 1].

    The models refuse such images, because images on another scale are a common mistake. ``Clipped(ABS())`` takes any
    finite ones, as a camera would; the gradient is zero where a value is clipped. Beware: images on another scale pass,
    too.

    Args:
        model: one of our models.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.binary_threshold = model.binary_threshold
        self.eval()

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.model.num_classes

    def describe(self) -> dict[str, Any]:
        return {**self.model.describe(), "clipped": True}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the clipped images: ``(N, 1, 28, 28) -> (N, C)``.

        Raises:
            TypeError, ValueError: as the model's, but for finite values outside [0, 1].
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            images = torch.where(images.isfinite(), images.clamp(0.0, 1.0), images)
        logits: Tensor = self.model(images)
        return logits

    def confidence_softmax(self, logits: Tensor) -> Tensor:
        return self.model.confidence_softmax(logits)
