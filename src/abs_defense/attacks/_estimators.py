"""Foolbox models whose gradients are estimated from the outputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import eagerpy as ep
import numpy as np
import torch
from foolbox.models import Model
from torch import Tensor

from abs_defense._checks import check_counts, check_positive
from abs_defense.attacks._base import WrappedModel, queried_rows, query_rows

T = TypeVar("T")

_KEPT = 512  # 16 MB for images of MNIST and ten classes


class EstimatedGradientModel(WrappedModel):
    """A foolbox model with the outputs of another one and estimated gradients; any gradient attack runs on it.

    The Jacobian of an image's outputs is estimated when a backward pass first needs it, from queries of that image
    alone, and kept for further backward passes through the same call.

    Raises:
        ValueError: a setting is out of its range; at the call, if the inputs are not PyTorch tensors.
    """

    def __init__(self, model: Model, *, chunk: int) -> None:
        check_counts(chunk=chunk)
        super().__init__(model)
        self._chunk = chunk

    def __call__(self, inputs: T) -> T:
        x, restore_type = ep.astensor_(inputs)
        if not isinstance(x, ep.PyTorchTensor):
            raise ValueError(f"inputs: expected a PyTorch tensor, got {type(x.raw).__name__}")
        if not x.raw.requires_grad:
            return restore_type(self._model(x))
        outputs = _Estimated.apply(x.raw, self)  # type: ignore[no-untyped-call]
        return restore_type(ep.astensor(outputs))  # type: ignore[no-any-return]

    def _query(self, images: Tensor, rows: Tensor) -> Tensor:
        """Outputs, in chunks."""
        outputs = []
        for part, which in zip(images.split(self._chunk), rows.split(self._chunk), strict=True):
            with torch.no_grad(), query_rows(which.cpu().numpy()):
                outputs.append(self._model(ep.astensor(part)).raw)
        return torch.cat(outputs)

    @abstractmethod
    def _jacobians(self, images: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        """d outputs / d pixels of images ``(n, D)``, which are ``rows`` of the batch: ``(n, C, D)``."""


class FiniteDifferenceModel(EstimatedGradientModel):
    """Gradients by coordinate-wise finite differences of the outputs, as the paper estimated them.

    ``(f(x + h e_i) - f(x - h e_i)) / 2h`` for every pixel i; on a pixel closer than h to a bound, the difference
    goes to the bound instead, and nothing is asked where that is the image itself. At most two queries a pixel, and
    none for one of the last 512 images with the outputs it had (an attack that tries several epsilons comes back to the
    same image).

    Args:
        model: PyTorch foolbox model.
        epsilon: h, in the units of the inputs.
        chunk: the most images asked in one call of the model.
    """

    def __init__(self, model: Model, *, epsilon: float = 0.05, chunk: int = 512) -> None:
        super().__init__(model, chunk=chunk)
        check_positive(epsilon=epsilon)
        self.epsilon = epsilon
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def _jacobians(self, images: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        return torch.stack([self._known_jacobian(*of_image) for of_image in zip(images, rows, outputs, strict=True)])

    def _known_jacobian(self, image: Tensor, row: Tensor, output: Tensor) -> Tensor:
        key = image.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        known = self._known.pop(key, None)
        # Outputs tell whether the model has changed; its batch may change their last digits.
        if known is None or not torch.allclose(known[0], output, rtol=1e-4, atol=1e-4):
            known = output, self._jacobian(image, row, output)
        self._known[key] = known
        if len(self._known) > _KEPT:
            self._known.pop(next(iter(self._known)))
        return known[1]

    def _jacobian(self, image: Tensor, row: Tensor, output: Tensor) -> Tensor:
        lower, upper = self.bounds
        flat = image.flatten()
        values, widths = [], torch.zeros_like(flat)
        for sign in (1.0, -1.0):
            moved = (flat + sign * self.epsilon).clamp(lower, upper)
            pixels = (moved != flat).nonzero()[:, 0]
            batch = flat.repeat(len(pixels), 1)
            batch[torch.arange(len(pixels)), pixels] = moved[pixels]
            value = output.repeat(len(flat), 1)
            if len(pixels):
                value[pixels] = self._query(batch.view(-1, *image.shape), row.expand(len(pixels)))
            values.append(value)
            widths += sign * moved
        return ((values[0] - values[1]) / widths[:, None]).T


class RandomDirectionModel(EstimatedGradientModel):
    """Gradients from antithetic pairs of outputs along random directions.

    For directions ``u_k`` from N(0, I) the pair ``f(x + s u_k) - f(x - s u_k)``, both clipped to the bounds, is
    correlated with the moves ``v_k`` that were left of ``2 s u_k``:
    ``df/dx_i ~ sum_k (f_k+ - f_k-) v_ki / sum_k v_ki^2``. All images of a call share the directions, which differ
    from call to call; each image's estimate is made from its own outputs, so it does not depend on its batch.

    Args:
        model: PyTorch foolbox model.
        directions: pairs a gradient; each costs two queries.
        sigma: s, in the units of the inputs.
        seed: of the directions; the n-th call that needs gradients always draws the same ones.
        chunk: the most images asked in one call of the model.
    """

    def __init__(
        self, model: Model, *, directions: int = 64, sigma: float = 0.1, seed: int = 0, chunk: int = 512
    ) -> None:
        super().__init__(model, chunk=chunk)
        check_counts(directions=directions)
        check_positive(sigma=sigma)
        self.directions = directions
        self.sigma = sigma
        self.seed = seed
        self._calls = 0

    def _jacobians(self, images: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, self._calls]).generate_state(1)[0])
        )
        self._calls += 1
        shape = (self.directions, *images.shape[1:])
        step = self.sigma * torch.randn(shape, generator=generator, dtype=torch.float64).to(images)
        jacobians = []
        for image, row in zip(images, rows, strict=True):
            pair = torch.cat([image + step, image - step]).clamp(*self.bounds)
            plus, minus = self._query(pair, row.expand(len(pair))).chunk(2)
            moves = (pair[: self.directions] - pair[self.directions :]).flatten(1)
            jacobians.append((plus - minus).T @ moves / moves.square().sum(0).clamp_min(1e-30))
        return torch.stack(jacobians)


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, model: EstimatedGradientModel) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = model._model(ep.astensor(images.detach())).raw
        ctx.save_for_backward(images, outputs)
        ctx.model = model
        ctx.known = {}
        rows = queried_rows()
        known = rows is not None and len(rows) == len(images)
        ctx.rows = torch.from_numpy(rows) if known else torch.arange(len(images))
        return outputs.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor, None]:
        images, outputs = ctx.saved_tensors
        needed = grad_outputs.flatten(1).any(1).nonzero()[:, 0]
        new = torch.tensor([row for row in needed.tolist() if row not in ctx.known], dtype=torch.long)
        if len(new):
            new = new.to(images.device)
            jacobians = ctx.model._jacobians(images[new].detach(), ctx.rows.to(new.device)[new], outputs[new])
            ctx.known.update(zip(new.tolist(), jacobians, strict=True))
        gradient = torch.zeros_like(images).flatten(1)
        for row in needed.tolist():
            gradient[row] = grad_outputs[row] @ ctx.known[row].to(grad_outputs)
        return gradient.view_as(images), None
