"""Decoded samples of the prior, and the search for the best one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense._threads import one_core_each
from abs_defense.inference._decoder import PIXELS, ClassDecoder
from abs_defense.inference._energy import energy, kl_divergence

_DROPPED_FRACTION = 0.1
_DECODE_CHUNK = 128
_SEARCH_CHUNK = 1000
_CANDIDATES = 4
_FAR_CANDIDATES = 32
_FAR = 2.5


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
        images: G_c(z), ``(C, K, 784)``; also in half precision, which only the search for starting points may use.
        offsets: ||G_c(z)||^2 + beta KL(z), ``(C, K)``: what the search adds to -2 x . G_c(z).
        curvature: ``(C, L, L)``, what the solver "bfgs" begins with (see ``average_curvature``), or None.
    """

    latents: Tensor
    images: Tensor
    offsets: Tensor
    curvature: Tensor | None = None

    @classmethod
    def decode(
        cls, decoders: Sequence[ClassDecoder], latents: Tensor, beta: float, dtype: torch.dtype | None = None
    ) -> Prototypes:
        """Decode ``(K, L)`` latents with every class's decoder, or ``(C, K, L)`` with their own; keep the images as
        ``dtype``, by default that of the latents."""
        images = latents.new_empty(len(decoders), latents.shape[-2], PIXELS, dtype=dtype)
        own = latents.expand(len(decoders), -1, -1)
        if latents.device.type == "cpu" and torch.get_num_threads() > 1:
            with one_core_each(min(len(decoders), torch.get_num_threads())) as pool:
                list(pool.map(_decode, decoders, own, images))
        else:
            for decoder, z, target in zip(decoders, own, images, strict=True):
                _decode(decoder, z, target)
        return cls.of_images(latents, images, beta)

    @classmethod
    def of_images(cls, latents: Tensor, images: Tensor, beta: float) -> Prototypes:
        """Latents that are decoded already; the offsets are as precise as the latents."""
        squares = torch.stack([image.to(latents.dtype).square().sum(-1) for image in images])
        return cls(latents, images, squares + beta * kl_divergence(latents))

    @property
    def class_latents(self) -> Tensor:
        """``(C, K, L)``."""
        return self.latents.expand(len(self.images), -1, -1)

    def of_classes(self, part: slice) -> Prototypes:
        """Those of some classes; a view."""
        latents = self.latents if self.latents.ndim == 2 else self.latents[part]
        curvature = None if self.curvature is None else self.curvature[part]
        return Prototypes(latents, self.images[part], self.offsets[part], curvature)

    def latents_at(self, indices: Tensor) -> Tensor:
        """The latents of prototypes of every class, ``(C, ...) -> (C, ..., L)``."""
        return torch.stack([z[index] for z, index in zip(self.class_latents, indices, strict=True)])

    def nearest(self, images: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The prototype of lowest energy of each class for each image.

        One matrix product a class finds a few candidates; their energies are then computed in float64, so that the
        choice does not depend on how the product was rounded, and so not on the batch.

        Args:
            images: ``(N, 784)``.
            beta: weight of the KL term.

        Returns:
            Indices ``(C, N)`` and energies ``(C, N)`` in float64.
        """
        indices, energies = [], []
        for c in range(len(self.images)):
            index, value = self._best(c, images, self._lowest(c, images, _CANDIDATES), beta)
            indices.append(index)
            energies.append(value)
        return torch.stack(indices), torch.stack(energies)

    def nearest_two(self, images: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Two starting points of each class for each image: the prototype of lowest energy, and the best of the next
        ones that lies at least 2.5 from it in the latent space (if there is none, the second best).

        Args:
            images: ``(N, 784)``.
            beta: weight of the KL term.

        Returns:
            Indices ``(2, C, N)``, and the energies of the first ``(C, N)`` in float64.
        """
        pairs, energies = [], []
        for c, latents in enumerate(self.class_latents):
            lowest = self._lowest(c, images, _FAR_CANDIDATES)
            first, value = self._best(c, images, lowest[:, :_CANDIDATES], beta)
            distance = (latents[lowest] - latents[first][:, None]).norm(dim=2)
            # Far ones first, then the other ones, each in the order of their energies; the first itself last.
            rank = (distance < _FAR).int() + (lowest == first[:, None]).int()
            order = rank.argsort(dim=1, stable=True)[:, :2]
            second, _ = self._best(c, images, _first_kind(lowest.gather(1, order), rank.gather(1, order)), beta)
            pairs.append(torch.stack([first, second]))
            energies.append(value)
        return torch.stack(pairs, dim=1), torch.stack(energies)

    def _lowest(self, c: int, images: Tensor, count: int) -> Tensor:
        """Indices of the ``count`` prototypes of lowest energy, as a product in single precision sees it, in
        ascending order: ``(N, count)``."""
        dtype = torch.promote_types(self.images.dtype, images.dtype)
        images, offsets = images.to(dtype), self.offsets[c].to(dtype)
        scores = [  # in chunks that stay in a CPU's cache when they are converted
            torch.addmm(constant, images, points.to(dtype).T, alpha=-2.0)
            for points, constant in zip(self.images[c].split(_SEARCH_CHUNK), offsets.split(_SEARCH_CHUNK), strict=True)
        ]
        return torch.cat(scores, dim=1).topk(min(count, len(offsets)), largest=False).indices

    def _best(self, c: int, images: Tensor, candidates: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """The candidate of lowest energy, and that energy, in double precision: ``(N,), (N,)``."""
        candidates = candidates.sort(dim=1).values
        latents = self.class_latents[c][candidates].double()
        exact = energy(images.double()[:, None], self.images[c][candidates].double(), latents, beta)
        best = exact.min(dim=1)
        return candidates.gather(1, best.indices[:, None])[:, 0], best.values


@torch.no_grad()
def _decode(decoder: ClassDecoder, latents: Tensor, images: Tensor) -> None:
    for z, target in zip(latents.split(_DECODE_CHUNK), images.split(_DECODE_CHUNK), strict=True):
        target.copy_(decoder(z))


def _first_kind(candidates: Tensor, rank: Tensor) -> Tensor:
    """``candidates`` with those of a higher rank than the first replaced by the first, ``(N, M)``."""
    return torch.where(rank == rank[:, :1], candidates, candidates[:, :1])
