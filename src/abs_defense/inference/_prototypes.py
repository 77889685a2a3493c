"""Decoded samples of the prior, and the search for the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._decoder import PIXELS, ClassDecoder
from abs_defense.inference._energy import energy, kl_divergence

_DROPPED_FRACTION = 0.1
_DECODE_CHUNK = 128
_CANDIDATES = 4


def sample_latents(count: int, latent_dim: int, seed: int) -> Tensor:
    """Draw from N(0, I), drop the least likely tenth, keep ``count``: ``(count, L)``, float32, the same anywhere.

    The global random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(round(count / (1.0 - _DROPPED_FRACTION)), latent_dim, generator=generator, dtype=torch.float32)
    likely = drawn.norm(dim=1).argsort(stable=True)[:count]
    return drawn[likely.sort().values]


@dataclass(frozen=True)
class Prototypes:
    """Decoded latents of all classes.

    Attributes:
        latents: z, ``(K, L)`` if the classes share them, else ``(C, K, L)``.
        images: G_c(z), ``(C, K, 784)``.
        offsets: ||G_c(z)||^2 + beta KL(z), ``(C, K)``: what the search adds to -2 x . G_c(z).
    """

    latents: Tensor
    images: Tensor
    offsets: Tensor

    @classmethod
    def decode(cls, decoders: Sequence[ClassDecoder], latents: Tensor, beta: float) -> Prototypes:
        """Decode ``(K, L)`` latents with every class's decoder, or ``(C, K, L)`` with their own."""
        images = latents.new_empty(len(decoders), latents.shape[-2], PIXELS)
        for decoder, z, target in zip(decoders, latents.expand(len(decoders), -1, -1), images, strict=True):
            for start in range(0, len(z), _DECODE_CHUNK):
                part = slice(start, start + _DECODE_CHUNK)
                target[part] = decoder(z[part])
        offsets = torch.stack([image.square().sum(-1) for image in images]) + beta * kl_divergence(latents)
        return cls(latents, images, offsets)

    @property
    def class_latents(self) -> Tensor:
        """``(C, K, L)``."""
        return self.latents.expand(len(self.images), -1, -1)

    def latents_at(self, indices: Tensor) -> Tensor:
        """The latents of prototypes of every class, ``(C, ...) -> (C, ..., L)``."""
        return torch.stack([z[index] for z, index in zip(self.class_latents, indices, strict=True)])

    def nearest(self, images: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The prototype of lowest energy of each class for each image.

        One matrix product finds a few candidates; their energies are then computed in float64, so that the choice
        does not depend on how the product was rounded, and so not on the batch.

        Args:
            images: ``(N, 784)``.
            beta: weight of the KL term.

        Returns:
            Indices ``(C, N)`` and energies ``(C, N)`` in float64.
        """
        dtype = torch.promote_types(self.images.dtype, images.dtype)
        exact_images = images.double()
        indices, energies = [], []
        for points, offsets, latents in zip(self.images, self.offsets, self.class_latents, strict=True):
            scores = torch.addmm(offsets.to(dtype), images.to(dtype), points.to(dtype).T, alpha=-2.0)
            candidates = scores.topk(min(_CANDIDATES, len(points)), largest=False).indices.sort(dim=1).values
            exact = energy(exact_images[:, None], points[candidates].double(), latents[candidates].double(), beta)
            best = exact.min(dim=1)
            indices.append(candidates.gather(1, best.indices[:, None])[:, 0])
            energies.append(best.values)
        return torch.stack(indices), torch.stack(energies)
