"""A small set of prototypes that explains a data set as well as many random ones."""

from __future__ import annotations

import copy
import heapq

import torch
from torch import Tensor
from tqdm import tqdm

from abs_defense.data import ImageSet
from abs_defense.inference import ClassDecoder, descend, kl_divergence, sample_latents
from abs_defense.models import Weights

_BETA, _LR, _RADIUS = 1.0, 0.05, 5.0
_CHUNK = 256


def choose_prototypes(
    weights: Weights,
    data: ImageSet,
    count: int,
    *,
    samples: int = 8000,
    steps: int = 20,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Tensor:
    """Latents of prototypes for each class, best first: ``(C, count, L)``, rounded to half precision.

    Candidates are ``samples`` of the prior, and for each training image of the class the latents that inference finds
    for it (the best sample, then ``steps`` updates of latent descent). Of these, one after the other is taken that
    lowers most the mean over the class's training images of the lowest energy so far (the greedy algorithm for
    facility location). An image's own latents don't count for it, so that the choice serves unseen images.

    Args:
        weights: trained decoders.
        data: training images of all classes.
        count: of prototypes a class.
        samples: of the prior, the same for all classes.
        steps: of latent descent for the training images.
        seed: of the samples.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        ValueError: ``count`` or ``samples`` is less than 1, there are fewer candidates than ``count``, or the data
            has other classes than the weights.
    """
    for name, value in {"count": count, "samples": samples}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    classes = weights.decoders.num_classes
    images = torch.bincount(data.labels, minlength=classes)
    if len(images) != classes or not bool((images > 0).all()):
        raise ValueError(f"expected images of {classes} classes, as the weights have, got {images.tolist()} a class")
    if count > samples + int(images.min()):
        raise ValueError(f"count: expected at most {samples + int(images.min())} candidates a class, got {count}")
    prior = sample_latents(samples, weights.decoders.latent_dim, seed).to(device)
    chosen = []
    decoders = copy.deepcopy(weights.decoders).to(device).class_decoders()
    for c, decoder in enumerate(tqdm(decoders, desc="choosing prototypes", unit="class", disable=not progress)):
        own = data.images[data.labels == c].flatten(1).to(device)
        candidates = torch.cat([_explain(decoder, own, prior, steps), prior]).half().float()
        energies = _energies(decoder, own, candidates)
        energies[torch.arange(len(own)), torch.arange(len(own))] = torch.inf
        chosen.append(candidates[_facility_location(energies.cpu(), count)].cpu())
    return torch.stack(chosen)


def _explain(decoder: ClassDecoder, images: Tensor, prior: Tensor, steps: int) -> Tensor:
    """What inference finds for the images of one class, ``(N, D) -> (N, L)``."""
    start = prior[_energies(decoder, images, prior).argmin(0)]

    parts = [
        descend([decoder], x, z[None], steps=steps, lr=_LR, radius=_RADIUS, beta=_BETA)[0]
        for x, z in zip(images.split(_CHUNK), start.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _energies(decoder: ClassDecoder, images: Tensor, latents: Tensor) -> Tensor:
    """Of all latents at all images, ``(K, N)``."""
    rows = []
    for z in latents.split(_CHUNK):
        points = decoder(z)
        constant = (points.square().sum(1) + _BETA * kl_divergence(z))[:, None] + images.square().sum(1)
        rows.append(torch.addmm(constant, points, images.T, alpha=-2.0))
    return torch.cat(rows)


def _facility_location(energies: Tensor, count: int) -> Tensor:
    """Lazy greedy choice of rows of ``(K, N)`` that lower the sum of column minima most, ``(count,)``.

    Gains only fall as more is chosen, so a row whose refreshed gain still beats the others' old ones is the best.
    """
    best = energies.isfinite().double().mul(energies.nan_to_num(posinf=0.0)).amax(0)
    gains = torch.cat([(best - part).clamp_min(0.0).sum(1) for part in energies.double().split(_CHUNK)])
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
