"""The least bisector bound over the latents of a model with latent descent: an estimate, as its inference is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.certificates._reach import PointBatch, Scene
from abs_defense.inference import ClassDecoder, InferenceSettings, adam_in_ball, descend, energy
from abs_defense.models import ABS

_ANCHOR_RIVALS = 3


@dataclass(frozen=True)
class Estimate:
    """What the search found for n images.

    Attributes:
        radius: ``(n,)``.
        rival: ``(n,)``.
        point, anchor: their images ``(n, D)``.
        offset, anchor_offset: their offsets k, ``(n,)``.
    """

    radius: Tensor
    rival: Tensor
    point: Tensor
    offset: Tensor
    anchor: Tensor
    anchor_offset: Tensor


class LatentSearch:
    """Descends over the rivals' latents to the point that reaches the image with the smallest perturbation.

    For a point b and the best anchor a, the bound is reached at some image x + d. By the envelope theorem its gradient
    over b is that of b's energy at x + d, so the descent is that of inference, at an image that moves along.

    Every class starts from its nearest prototypes and from what inference found. After the first descent the class of
    the image gets more anchors: what explains best the images that the nearest rivals would win. A second descent then
    starts from the first one's results.

    Args:
        model: with latent descent.
        scene: n images.
        labels: their classes, ``(n,)``.
        starts: of each rival class.
    """

    def __init__(self, model: ABS, scene: Scene, labels: Tensor, starts: int) -> None:
        self.scene, self.labels = scene, labels
        self.settings: InferenceSettings = model.settings
        self.decoders: list[ClassDecoder] = model.decoders.class_decoders()
        self.gamma = model._scale(torch.ones(1, model.num_classes, device=labels.device))[0].double()
        self.prototypes = model._prototypes()
        self.seen = scene.seen
        self.starts = starts
        self.dtype = model._dtype
        n, classes = len(labels), model.num_classes
        self.image = torch.arange(n, device=labels.device).repeat_interleave(classes * starts)
        self.rival = torch.arange(classes, device=labels.device).repeat_interleave(starts).repeat(n)
        keep = self.rival != labels[self.image]
        self.image, self.rival = self.image[keep], self.rival[keep]
        order = self.rival.argsort(stable=True)
        self.image, self.rival = self.image[order], self.rival[order]
        self.anchor_images = self.seen.new_empty(n, 0, self.seen.shape[1])
        self.anchor_offsets = self.seen.new_empty(n, 0)

    def run(self) -> Estimate:
        own = self._explain(self.seen, self.labels)
        self._add_anchor(own)
        latents = self._first_latents()
        latents = self._descend(latents, self.settings.steps)
        radius, _, target = self._bounds(self._decode(latents), latents)
        for image in self._images_to_explain(radius, target):
            self._add_anchor(self._explain(image, self.labels))
        latents = self._descend(latents, self.settings.steps // 2)
        return self._least(latents)

    def _split(self, latents: Tensor) -> list[Tensor]:
        return list(latents.split(torch.bincount(self.rival, minlength=len(self.decoders)).tolist()))

    def _decode(self, latents: Tensor) -> Tensor:
        parts = zip(self.decoders, self._split(latents), strict=True)
        return torch.cat([decoder(part) for decoder, part in parts if len(part)])

    def _descend(self, latents: Tensor, steps: int) -> Tensor:
        counts = self._split(self.image)

        def gradient(z: Tensor) -> Tensor:
            slopes, done = [], 0
            for decoder, part, rows in zip(self.decoders, self._split(z), counts, strict=True):
                if not len(rows):
                    continue
                block = slice(done, done + len(rows))

                def towards(decoded: Tensor, part: Tensor = part, block: slice = block) -> Tensor:
                    return 2.0 * (decoded - self._bounds(decoded, part, block, self.dtype)[2])

                slopes.append(decoder.pullback(part, towards) + self.settings.beta * part)
                done += len(rows)
            return torch.cat(slopes)

        return adam_in_ball(gradient, latents, steps=steps, lr=self.settings.lr, radius=self.settings.radius)

    def _bounds(
        self, decoded: Tensor, latents: Tensor, block: slice = slice(None), dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Radii ``(m,)``, the anchors that hold best ``(m,)`` and the images where the rivals win ``(m, D)``."""
        image, rival = self.image[block], self.rival[block]
        attackers = self._attackers(decoded, latents, image, rival).to(dtype)
        scene = self.scene[image].to(dtype)
        radius, target = scene.reach(attackers, self._anchors(image, 0).to(dtype))
        anchor = torch.zeros_like(image)
        for a in range(1, self.anchor_offsets.shape[1]):
            other = scene.reach(attackers, self._anchors(image, a).to(dtype))
            better = other[0] > radius
            radius = torch.where(better, other[0], radius)
            target = torch.where(better[:, None], other[1], target)
            anchor = torch.where(better, a, anchor)
        return radius, anchor, target

    def _attackers(self, decoded: Tensor, latents: Tensor, image: Tensor, rival: Tensor) -> PointBatch:
        points, gamma = decoded.double(), self.gamma[rival]
        return PointBatch(points, gamma * energy(self.seen[image], points, latents.double(), self.settings.beta), gamma)

    def _anchors(self, image: Tensor, number: int) -> PointBatch:
        points, gamma = self.anchor_images[image, number], self.gamma[self.labels[image]]
        energies = gamma * ((points - self.seen[image]).square().sum(1) + self.anchor_offsets[image, number])
        return PointBatch(points, energies, gamma)

    def _first_latents(self) -> Tensor:
        """The nearest prototypes of every rival, and in the last place what inference makes of the first."""
        nearest = torch.stack(
            [
                torch.addmm(offsets.to(self.dtype), self.seen.to(self.dtype), points.to(self.dtype).T, alpha=-2.0)
                .topk(min(self.starts, len(points)), largest=False)
                .indices
                for points, offsets in zip(self.prototypes.images, self.prototypes.offsets, strict=True)
            ]
        )
        start = self.prototypes.latents_at(nearest).to(self.dtype)  # (C, n, S, L)
        count = start.shape[2]
        place = torch.arange(len(self.image), device=self.image.device) % self.starts % count
        latents = start[self.rival, self.image, place]
        last = torch.arange(len(self.image), device=self.image.device) % self.starts == self.starts - 1
        if self.starts > 1:
            latents[last] = start[self.rival, self.image, 0][last]
            for c, decoder in enumerate(self.decoders):
                mine = last & (self.rival == c)
                if mine.any():
                    latents[mine] = self._infer(decoder, self.seen[self.image[mine]], latents[mine])
        return latents

    def _infer(self, decoder: ClassDecoder, images: Tensor, latents: Tensor) -> Tensor:
        return _descend([decoder], images.to(self.dtype), latents[None], self.settings, self.settings.beta)[0]

    def _explain(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The point of lowest energy of one class for each image ``(n, D)``: images ``(n, D)``, offsets ``(n,)``."""
        points = torch.empty_like(images)
        offsets = images.new_empty(len(images))
        for c in classes.unique().tolist():
            rows = (classes == c).nonzero()[:, 0]
            scores = torch.addmm(
                self.prototypes.offsets[c].to(self.dtype),
                images[rows].to(self.dtype),
                self.prototypes.images[c].to(self.dtype).T,
                alpha=-2.0,
            )
            start = self.prototypes.class_latents[c].to(self.dtype)[scores.argmin(1)]
            z = self._infer(self.decoders[c], images[rows], start)
            points[rows] = self.decoders[c](z).double()
            offsets[rows] = 0.5 * self.settings.beta * z.double().square().sum(1)
        return points, offsets

    def _add_anchor(self, anchor: tuple[Tensor, Tensor]) -> None:
        self.anchor_images = torch.cat([self.anchor_images, anchor[0][:, None]], 1)
        self.anchor_offsets = torch.cat([self.anchor_offsets, anchor[1][:, None]], 1)

    def _images_to_explain(self, radius: Tensor, target: Tensor) -> list[Tensor]:
        """Where the nearest rivals win: for each of the first few classes in the order of radius, ``(n, D)``."""
        n, classes = len(self.labels), len(self.decoders)
        best = radius.new_full((n * classes,), torch.inf)
        place = self.image * classes + self.rival
        best = best.scatter_reduce(0, place, radius, "amin")
        rows = self._last_of(place, radius == best[place], n * classes)
        nearest = best.view(n, classes).topk(min(_ANCHOR_RIVALS, classes - 1), dim=1, largest=False).indices
        return [target[rows.view(n, classes).gather(1, nearest[:, i : i + 1])[:, 0]] for i in range(nearest.shape[1])]

    @staticmethod
    def _last_of(place: Tensor, chosen: Tensor, count: int) -> Tensor:
        """For each place the row of a chosen element there, ``(count,)``."""
        rows = torch.arange(len(place), device=place.device)[chosen]
        none = torch.zeros(count, dtype=torch.long, device=place.device)
        return none.scatter_reduce(0, place[chosen], rows, "amax")

    def _least(self, latents: Tensor) -> Estimate:
        decoded = self._decode(latents)
        radius, anchor, _ = self._bounds(decoded, latents)
        n = len(self.labels)
        least = radius.new_full((n,), torch.inf).scatter_reduce(0, self.image, radius, "amin")
        row = self._last_of(self.image, radius == least[self.image], n)
        offset = 0.5 * self.settings.beta * latents[row].double().square().sum(1)
        image = torch.arange(n, device=radius.device)
        return Estimate(
            radius[row],
            self.rival[row],
            decoded[row].double(),
            offset,
            self.anchor_images[image, anchor[row]],
            self.anchor_offsets[image, anchor[row]],
        )


def lowest_energies(model: ABS, images: Tensor, starts: int, beta: float) -> tuple[Tensor, Tensor]:
    """E_c(x) with another ``beta``, the least of several descents: energies ``(n, C)``, latents ``(n, C, L)``."""
    settings, dtype = model.settings, model._dtype
    decoders, prototypes = model.decoders.class_decoders(), model._prototypes()
    seen = images.to(dtype)
    energies, latents = [], []
    for decoder, points, offsets, own in zip(
        decoders, prototypes.images, prototypes.offsets, prototypes.class_latents, strict=True
    ):
        corrected = offsets + (beta - settings.beta) * 0.5 * own.square().sum(1)
        scores = torch.addmm(corrected.to(dtype), seen, points.to(dtype).T, alpha=-2.0)
        chosen = scores.topk(min(starts, len(points)), largest=False).indices
        z = own.to(dtype)[chosen].flatten(0, 1)
        x = seen.repeat_interleave(chosen.shape[1], dim=0)
        z = _descend([decoder], x, z[None], settings, beta)[0]
        found = energy(x.double(), decoder(z).double(), z.double(), beta).view(len(seen), -1).min(1)
        energies.append(found.values)
        latents.append(z.view(*chosen.shape, -1)[torch.arange(len(seen), device=z.device), found.indices])
    return torch.stack(energies, 1), torch.stack(latents, 1)


def _descend(
    decoders: Sequence[ClassDecoder], images: Tensor, latents: Tensor, settings: InferenceSettings, beta: float
) -> Tensor:
    return descend(decoders, images, latents, steps=settings.steps, lr=settings.lr, radius=settings.radius, beta=beta)
