"""A small set of prototypes that explains a data set as well as many random ones."""

from __future__ import annotations

import copy
import heapq
import math
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from abs_defense._checks import check_counts
from abs_defense.data import ImageSet
from abs_defense.inference import ClassDecoder, descend, kl_divergence, sample_latents
from abs_defense.models import Weights
from abs_defense.training._augment import augment, light_augmentation

_LR, _RADIUS = 0.05, 5.0
_STARTS = 8000
_CHUNK = 256


def choose_prototypes(
    weights: Weights,
    data: ImageSet,
    count: int,
    *,
    samples: int = 8000,
    copies: int = 0,
    augmentation: float = 0.5,
    beta: float = 1.0,
    steps: int = 20,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Weights:
    """The weights with prototypes chosen for each class, best first: ``(C, count, L)``, rounded to half precision.

    Candidates are ``samples`` of the prior, and for each training image of the class, and for ``copies`` of it that are
    lightly distorted, the latents that inference finds for it (the best sample, then ``steps`` updates of latent
    descent). Of these, one after the other is taken that lowers most the mean over these images of the lowest energy so
    far (the greedy algorithm for facility location). Latents of an image and its copies don't count for them, so that
    the choice serves unseen images. With a ``count`` near the number of images and copies the last ones are arbitrary.

    The energies of all m images and copies of a class at all candidates are held at once: ``4 m (samples + m)`` bytes,
    6 GB for MNIST with 3 copies and 30,000 samples.

    Args:
        weights: trained decoders.
        data: training images of all classes.
        count: of prototypes a class.
        samples: of the prior, the same for all classes; with 0 none are candidates, and inference starts from 8000.
        copies: distorted ones of each training image.
        augmentation: probability of each kind of distortion, see ``light_augmentation``.
        beta: of the energies ``||x - G(z)||^2 + beta KL(z)``, here and in the prototype classifier (the
            ``prototype_beta`` of the weights). Chosen prototypes say by their density how likely a latent is; with 0 it
            is not counted a second time.
        steps: of latent descent for the training images.
        seed: of the samples and distortions.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        ValueError: a setting is out of its range, there are fewer candidates than ``count``, or the data has other
            classes than the weights.
    """
    check_counts(count=count)
    check_counts(0, samples=samples, copies=copies, steps=steps)
    if not 0.0 <= augmentation <= 1.0:
        raise ValueError(f"augmentation: expected a probability, got {augmentation}")
    if not 0.0 <= beta < math.inf:
        raise ValueError(f"beta: expected a finite number of at least 0, got {beta}")
    classes = weights.decoders.num_classes
    images = torch.bincount(data.labels, minlength=classes)
    if len(images) != classes or not bool((images > 0).all()):
        raise ValueError(f"expected images of {classes} classes, as the weights have, got {images.tolist()} a class")
    candidates_a_class = samples + (1 + copies) * int(images.min())
    if count > candidates_a_class:
        raise ValueError(f"count: expected at most {candidates_a_class} candidates a class, got {count}")
    starts = sample_latents(samples or _STARTS, weights.decoders.latent_dim, seed).to(device)
    pipeline = light_augmentation(augmentation) if copies else None
    chosen = []
    decoders = copy.deepcopy(weights.decoders).to(device).class_decoders()
    for c, decoder in enumerate(tqdm(decoders, desc="choosing prototypes", unit="class", disable=not progress)):
        own = data.images[data.labels == c]
        shown = own.flatten(1)
        if pipeline is not None:
            distorted = [augment(own, pipeline, seed + number).flatten(1) for number in range(copies)]
            shown = torch.cat([shown, *distorted])
        shown = shown.to(device)
        candidates = torch.cat([_explain(decoder, shown, starts, steps, beta), starts[:samples]]).half().float()
        energies = _energies(decoder, shown, candidates, beta)
        of_image = energies[: len(shown)].view(1 + copies, len(own), 1 + copies, len(own))
        of_image.diagonal(dim1=1, dim2=3).fill_(torch.inf)
        chosen.append(candidates[_facility_location(energies.cpu(), count).to(device)].cpu())
        del energies, of_image
    return replace(weights, prototypes=torch.stack(chosen), prototype_beta=beta)


def _explain(decoder: ClassDecoder, images: Tensor, starts: Tensor, steps: int, beta: float) -> Tensor:
    """What inference finds for the images of one class, ``(N, D) -> (N, L)``."""
    points, offsets = _decode(decoder, starts, beta)
    parts: list[Tensor] = []
    for x in images.split(_CHUNK):
        z = starts[torch.addmm(offsets, x, points.T, alpha=-2.0).argmin(1)]
        parts += descend([decoder], x, z[None], steps=steps, lr=_LR, radius=_RADIUS, beta=beta)
    return torch.cat(parts)


def _energies(decoder: ClassDecoder, images: Tensor, latents: Tensor, beta: float) -> Tensor:
    """Of all latents at all images, ``(K, N)``."""
    energies = images.new_empty(len(latents), len(images))
    squares = images.square().sum(1)
    for z, rows in zip(latents.split(_CHUNK), energies.split(_CHUNK), strict=True):
        points, offsets = _decode(decoder, z, beta)
        torch.addmm(offsets[:, None] + squares, points, images.T, alpha=-2.0, out=rows)
    return energies


def _decode(decoder: ClassDecoder, latents: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """G(z) and ||G(z)||^2 + beta KL(z): ``(K, L) -> (K, D), (K,)``."""
    points = torch.cat([decoder(z) for z in latents.split(_CHUNK)])
    return points, points.square().sum(1) + beta * kl_divergence(latents)


def _facility_location(energies: Tensor, count: int) -> Tensor:
    """Lazy greedy choice of rows of ``(K, N)`` that lower the sum of column minima most, ``(count,)``.

    Gains only fall as more is chosen, so a row whose refreshed gain still beats the others' old ones is the best.
    """
    highest = [part.masked_fill(part.isinf(), 0.0).amax(0) for part in energies.split(_CHUNK)]
    best = torch.stack(highest).amax(0).double()
    gains = torch.cat([(best - part).clamp_min(0.0).sum(1) for part in energies.split(_CHUNK)])
    queue = [(-gain, row) for row, gain in enumerate(gains.tolist())]
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < count:
        _, row = heapq.heappop(queue)
        gain = float((best - energies[row]).clamp_min(0.0).sum())
        if queue and gain < -queue[0][0]:
            heapq.heappush(queue, (-gain, row))
        else:
            chosen.append(row)
            best = torch.minimum(best, energies[row].double())
    return torch.tensor(chosen)
