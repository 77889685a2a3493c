"""The check of images at the door of every model."""

from __future__ import annotations

import torch
from torch import Tensor

from abs_defense.inference import IMAGE_SHAPE

TOLERANCE = 1e-3
LOOK_AHEAD = 1.0
BINARY_THRESHOLD = 0.5


def check_images(images: Tensor) -> None:
    """Accept ``(N, 1, 28, 28)`` floating point images in [0, 1] (up to 1e-3, for the rounding of other libraries).

    Images that ask for gradients may lie in [-1, 2]: attacks look ahead (NI-FGSM, EAD, VMI-FGSM), and some project only
    in the end. Predictions, which every evaluation begins and ends with, remain strict.

    Raises:
        TypeError: not a tensor.
        ValueError: wrong shape, integer values, NaN or infinities, or values outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor, got {type(images).__name__}; try torch.as_tensor(images)")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images: expected shape (N, 1, 28, 28), got {shape}{_likely_cause(shape)}")
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected floating point values in [0, 1], got {images.dtype}; "
            "for bytes in 0..255 use images.float() / 255"
        )
    if not len(images):
        return
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (torch.isfinite(torch.tensor([low, high])).all()):
        raise ValueError(f"images: expected finite values in [0, 1], got a minimum of {low} and a maximum of {high}")
    allowed = LOOK_AHEAD if images.requires_grad else TOLERANCE
    if low < -allowed or high > 1.0 + allowed:
        cause = ""
        if low >= 0.0 and high > 2.0:
            cause = "; these look like bytes in 0..255: divide by 255"
        elif low < 0.0:
            cause = "; these look normalised: pass raw pixels, or undo the normalisation before the model"
        elif high <= 2.0:
            cause = "; if a tool leaves [0, 1] on purpose: abs_defense.models.Clipped(model)"
        raise ValueError(f"images: expected values in [0, 1], got values from {low:g} to {high:g}{cause}")


def _likely_cause(shape: tuple[int, ...]) -> str:
    if len(shape) == 2 and shape == (28, 28):
        return "; a single image without batch and channel: use images[None, None]"
    if len(shape) == 3 and shape == IMAGE_SHAPE:
        return "; the batch or the channel axis is missing: use images[None]"
    if len(shape) == 3 and shape[1:] == (28, 28):
        return "; the channel axis is missing: use images.unsqueeze(1)"
    if len(shape) == 4 and shape[1:] == (28, 28, 1):
        return "; the channels are last: use images.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1:] == (3, 28, 28):
        return "; colour images: average the three channels"
    if len(shape) == 2 and shape[1] == 784:
        return "; flat images: use images.view(-1, 1, 28, 28)"
    return ""
