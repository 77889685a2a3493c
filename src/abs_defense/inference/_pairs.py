"""Energies of chosen pairs of an image and a class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abs_defense.inference._decoder import ClassDecoder, JointDecoder
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
    def of_all(cls, decoders: Sequence[ClassDecoder], images: Tensor, beta: float) -> Pairs:
        """Every class with every image: in the order (class, image)."""
        label = torch.arange(len(decoders), device=images.device).repeat_interleave(len(images))
        image = torch.arange(len(images), device=images.device).repeat(len(decoders))
        return cls(decoders, images, label, image, beta)

    def chosen(self, rows: Tensor) -> Pairs:
        """Some of them, whose ``rows`` are in ascending order."""
        return replace(self, label=self.label[rows], image=self.image[rows])

    def times(self, count: int) -> Pairs:
        """Each of them ``count`` times, one after the other."""
        return replace(self, label=self.label.repeat_interleave(count), image=self.image.repeat_interleave(count))

    def energy_and_gradient(self, latents: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """E and dE/dz at the latents of the pairs ``rows``, which are in ascending order: ``(R,), (R, L)``."""
        counts = self._counts(rows)
        joint = self._joint(counts)
        if joint is not None:
            table = _Table(counts, rows.device)
            errors, slopes = joint.squared_error_and_gradient(table.of(latents), table.of(self._images(rows)))
            energy, gradient = table.rows(errors), table.rows(slopes)
        else:
            energy, gradient = torch.empty_like(latents[:, 0]), torch.empty_like(latents)
            for decoder, part in self._parts(counts):
                x = self._images(rows[part])
                energy[part], gradient[part] = decoder.squared_error_and_gradient(latents[part], x)
        return energy + self.beta * kl_divergence(latents), gradient + self.beta * latents

    def energy(self, latents: Tensor, rows: Tensor) -> Tensor:
        """E at the latents of the pairs ``rows``, which are in ascending order: ``(R,)``."""
        counts = self._counts(rows)
        joint = self._joint(counts)
        if joint is not None:
            table = _Table(counts, rows.device)
            decoded = table.rows(joint(table.of(latents)))
            energy = (decoded - self._images(rows)).square().sum(1)
        else:
            energy = torch.empty_like(latents[:, 0])
            for decoder, part in self._parts(counts):
                energy[part] = (decoder(latents[part]) - self._images(rows[part])).square().sum(1)
        return energy + self.beta * kl_divergence(latents)

    def _images(self, rows: Tensor) -> Tensor:
        return self.images[self.image[rows]]

    def _counts(self, rows: Tensor) -> list[int]:
        """How many of the rows are of each class."""
        counts: list[int] = torch.bincount(self.label[rows], minlength=len(self.decoders)).tolist()
        return counts

    def _joint(self, counts: Sequence[int]) -> JointDecoder | None:
        """The decoders of the classes that have rows, where one pass through them is faster than one a class."""
        if not JointDecoder.is_faster(counts):
            return None
        return JointDecoder.of([decoder for decoder, number in zip(self.decoders, counts, strict=True) if number])

    def _parts(self, counts: Sequence[int]) -> Iterator[tuple[ClassDecoder, slice]]:
        """The rows of one class after the other, a few at a time."""
        chunk = _CHUNK_CUDA if self.images.is_cuda else _CHUNK_CPU
        start = 0
        for decoder, number in zip(self.decoders, counts, strict=True):
            for first in range(start, start + number, chunk):
                yield decoder, slice(first, min(first + chunk, start + number))
            start += number


class _Table:
    """R rows, sorted by class, as a table ``(classes that have rows, largest count, ...)``; what is left free there is
    zero."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        counts = [number for number in counts if number]
        self.shape = (len(counts), max(counts))
        starts = range(0, len(counts) * max(counts), max(counts))
        place = itertools.chain(*(range(start, start + n) for start, n in zip(starts, counts, strict=True)))
        self.place = torch.tensor(list(place), device=device)

    def of(self, values: Tensor) -> Tensor:
        table = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        return table.index_copy_(0, self.place, values).view(*self.shape, *values.shape[1:])

    def rows(self, table: Tensor) -> Tensor:
        return table.flatten(0, 1)[self.place]
