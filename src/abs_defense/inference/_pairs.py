"""Energies of chosen pairs of an image and a class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.inference._decoder import ClassDecoder
from abs_defense.inference._energy import kl_divergence

_CHUNK_CPU = 64
_CHUNK_CUDA = 8192


@dataclass(frozen=True)
class Pairs:
    """P pairs of an image and a class, sorted by class.

    Attributes:
        decoders: the C classes.
        images: x, ``(N, 784)``.
        label: the class of each pair, ``(P,)``, ascending.
        image: the image of each pair, ``(P,)``.
        beta: weight of the KL term.
    """

    decoders: Sequence[ClassDecoder]
    images: Tensor
    label: Tensor
    image: Tensor
    beta: float

    @classmethod
    def of_all(cls, decoders: Sequence[ClassDecoder], images: Tensor, beta: float, starts: int = 1) -> Pairs:
        """Every class with every image, ``starts`` times: in the order (class, start, image)."""
        number = len(images)
        label = torch.arange(len(decoders), device=images.device).repeat_interleave(starts * number)
        image = torch.arange(number, device=images.device).repeat(len(decoders) * starts)
        return cls(decoders, images, label, image, beta)

    def energy_and_gradient(self, latents: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """E and dE/dz at the latents of the pairs ``rows``, which are in ascending order: ``(R,), (R, L)``."""
        energy, gradient = torch.empty_like(latents[:, 0]), torch.empty_like(latents)
        for decoder, part in self._parts(rows):
            x = self.images[self.image[rows[part]]]
            energy[part], gradient[part] = decoder.squared_error_and_gradient(latents[part], x)
        return energy + self.beta * kl_divergence(latents), gradient + self.beta * latents

    def energy(self, latents: Tensor, rows: Tensor) -> Tensor:
        """E at the latents of the pairs ``rows``, which are in ascending order: ``(R,)``."""
        energy = torch.empty_like(latents[:, 0])
        for decoder, part in self._parts(rows):
            energy[part] = (decoder(latents[part]) - self.images[self.image[rows[part]]]).square().sum(1)
        return energy + self.beta * kl_divergence(latents)

    def _parts(self, rows: Tensor) -> Iterator[tuple[ClassDecoder, slice]]:
        """The rows of one class after the other, a few at a time."""
        chunk = _CHUNK_CUDA if rows.is_cuda else _CHUNK_CPU
        counts = torch.bincount(self.label[rows], minlength=len(self.decoders)).tolist()
        start = 0
        for decoder, number in zip(self.decoders, counts, strict=True):
            for first in range(start, start + number, chunk):
                yield decoder, slice(first, min(first + chunk, start + number))
            start += number
