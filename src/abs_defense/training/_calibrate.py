"""Calibration on training data: alpha and eta of the confidence softmax, gamma of Binary ABS."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from abs_defense.data import ImageSet
from abs_defense.inference import PIXELS, DecoderStack
from abs_defense.models import ABS, BinaryABS, Calibration, Weights

_MEDIAN_CONFIDENCE = 0.9
_ALPHAS = np.geomspace(10.0, 10_000.0, 400)
_ETAS = np.geomspace(1e-9, 1e-1, 81)
_GAMMAS = np.linspace(0.9, 1.1, 201)
_SWEEPS = 3


def class_energies(model: ABS, images: Tensor, *, progress: bool = True, batch_size: int = 256) -> Tensor:
    """Energies ``(N, C)`` of many images, on the CPU, with a progress bar."""
    device = next(model.parameters()).device
    parts = []
    with tqdm(total=len(images), desc=f"inference, {type(model).__name__}", unit="img", disable=not progress) as bar:
        for part in images.split(batch_size):
            logits = model(part.to(device)).detach()
            parts.append((-logits.double() * PIXELS / model.alpha.double()).float().cpu())
            bar.update(len(part))
    return torch.cat(parts)


def calibrate_confidence(energies: Tensor, labels: Tensor) -> tuple[float, float]:
    """alpha and eta of p(y|x) = (exp(alpha l_y) + eta) / sum_c (exp(alpha l_c) + eta), l = -E / 784 (eq. 8).

    For every eta on a grid, alpha is the smallest value at which the median confidence is 0.9; of these pairs the one
    of lowest cross entropy wins. The paper chose by the test set; pass training images to keep the test set unseen.

    Raises:
        ValueError: no alpha and eta give a median confidence of 0.9, as for a model that cannot tell the classes.
    """
    scores = -energies.double().numpy() / PIXELS
    targets = labels.numpy()
    order = np.sort(scores, axis=1)[:, ::-1]
    best: tuple[float, float, float] | None = None
    for eta in _ETAS:
        alpha = _smallest_alpha(order, float(eta))
        if alpha is None:
            continue
        likelihood = np.exp(alpha * scores) + eta
        chosen = likelihood[np.arange(len(targets)), targets]
        cross_entropy = float(-np.log(chosen / likelihood.sum(axis=1)).mean())
        if best is None or cross_entropy < best[0]:
            best = cross_entropy, alpha, float(eta)
    if best is None:
        raise ValueError(
            f"no alpha from {_ALPHAS[0]:g} to {_ALPHAS[-1]:g} gives a median confidence of {_MEDIAN_CONFIDENCE} on "
            f"{len(scores)} images: their energies hardly differ between the classes; train longer or on more images"
        )
    return best[1], best[2]


def _smallest_alpha(sorted_scores: np.ndarray, eta: float) -> float | None:
    for alpha in _ALPHAS:
        likelihood = np.exp(alpha * sorted_scores) + eta
        if np.median(likelihood[:, 0] / likelihood.sum(axis=1)) >= _MEDIAN_CONFIDENCE:
            return float(alpha)
    return None


def calibrate_gamma(energies: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Factors gamma of Binary ABS by line search on the training accuracy, class after class ("discriminative
    finetuning", section 4).

    Of the factors with the best accuracy the middle one is taken. gamma_0 stays 1, because only ratios matter.
    """
    scaled_by = torch.ones(energies.shape[1], dtype=torch.float64)
    exact = energies.double()
    for _ in range(_SWEEPS):
        for c in range(1, energies.shape[1]):
            correct = []
            for gamma in _GAMMAS:
                scaled_by[c] = gamma
                correct.append(int(((exact * scaled_by).argmin(1) == labels).sum()))
            winners = np.flatnonzero(np.array(correct) == max(correct))
            scaled_by[c] = _GAMMAS[winners[len(winners) // 2]]
    return tuple(round(g, 4) for g in scaled_by.tolist())


def calibrate(
    decoders: DecoderStack,
    data: ImageSet,
    *,
    images: int = 10_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Calibration:
    """alpha, eta and gamma of trained decoders, from ``images`` training images drawn at random with ``seed``.

    Raises:
        ValueError: see ``calibrate_confidence``.
    """
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:images]
    x, y = data.images[chosen], data.labels[chosen]
    neutral = Weights(decoders, Calibration(1.0, 0.0, (1.0,) * decoders.num_classes))
    alpha, eta = calibrate_confidence(class_energies(ABS(neutral).to(device), x, progress=progress), y)
    gamma = calibrate_gamma(class_energies(BinaryABS(neutral).to(device), x, progress=progress), y)
    return Calibration(alpha, eta, gamma)
