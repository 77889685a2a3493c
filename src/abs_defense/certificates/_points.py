"""The finite set of points that a model without latent descent compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.certificates._reach import PointBatch
from abs_defense.inference import PIXELS
from abs_defense.models import ABS

_ROUNDINGS_OF_LOGITS = 4


@dataclass(frozen=True)
class PointSet:
    """Points (p, k) of C classes, K of each: class c has the energy ``gamma_c min_j (||p_cj - s||^2 + k_cj)``.

    Attributes:
        images: p, ``(C, K, D)``.
        offsets: k >= 0, ``(C, K)``, double precision; infinite for places that hold no point.
        gamma: ``(C,)``, double precision.
        squares: ||p||^2, ``(C, K)``, double precision.
        slack: ``(C,)``; a class that is ahead by more than this, in exact energies, is the one that the model predicts.
    """

    images: Tensor
    offsets: Tensor
    gamma: Tensor
    squares: Tensor
    slack: Tensor

    @classmethod
    def of(cls, model: ABS) -> PointSet:
        """The prototypes of a model with ``steps=0``."""
        latents = model.prototype_latents.double()
        offsets = 0.5 * model.settings.beta * latents.square().sum(-1).expand(model.num_classes, -1)
        gamma = model._scale(torch.ones(1, model.num_classes, device=latents.device))[0].double()
        squares = torch.stack([points.double().square().sum(-1) for points in model.prototype_images])
        return cls(model.prototype_images, offsets, gamma, squares, _slack(model, offsets, gamma, squares))

    def batch(self, classes: Tensor, index: Tensor, seen: Tensor) -> PointBatch:
        """Points ``(m,)`` with their energies at the images ``(m, D)`` or ``(1, D)``, in double precision."""
        images = self.images[classes, index].double()
        gamma = self.gamma[classes]
        return PointBatch(images, gamma * ((images - seen).square().sum(1) + self.offsets[classes, index]), gamma)

    def nearest(self, seen: Tensor, *, offsets: bool = True) -> tuple[Tensor, Tensor]:
        """Per class the lowest energy of its points, or with ``offsets=False`` the lowest squared distance, at images
        ``(n, D)``: ``(n, C)`` in double precision, and which point it is."""
        values, index = [], []
        for images, squares, k, gamma in zip(self.images, self.squares, self.offsets, self.gamma, strict=True):
            constant = squares + k if offsets else squares.masked_fill(k.isinf(), torch.inf)
            least = (torch.addmm(constant, seen, images.double().T, alpha=-2.0)).min(1)
            values.append(gamma * (least.values + seen.square().sum(1)).clamp_min(0.0))
            index.append(least.indices)
        return torch.stack(values, 1), torch.stack(index, 1)


def _slack(model: ABS, offsets: Tensor, gamma: Tensor, squares: Tensor) -> Tensor:
    """Bound of the rounding errors between exact energies and the model's decision.

    The prototype of a class is chosen by a product of at least single precision. Whatever its order of summation, its
    error is at most ``n u / (1 - n u)`` times the sum of absolute values, with u the unit roundoff and n the number
    of terms (Higham 2002, section 3.1); that of the offsets which the model adds is measured. A wrong choice makes the
    energy too high by at most twice both, for the true class to its harm. The logits are rounded a few times more, by
    u relatively, and the image once.
    """
    dtype = torch.promote_types(model.prototype_images.dtype, torch.float32)
    roundoff = 0.5 * torch.finfo(dtype).eps
    terms = (PIXELS + 16) * roundoff
    sums = torch.stack([points.double().abs().sum(-1) for points in model.prototype_images])
    stored = (model.prototype_offsets.double() - (squares + offsets)).abs()
    choice = 2.0 * (terms / (1.0 - terms) * (2.0 * (squares + offsets) + 2.0 * sums) + stored).amax(1)
    highest = gamma.amax() * (PIXELS + offsets.amax())
    roundings = _ROUNDINGS_OF_LOGITS * highest + gamma.amax() * PIXELS
    return gamma * choice + torch.finfo(torch.float32).eps * roundings
