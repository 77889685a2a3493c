"""The paper's inference: best of many prototypes, then latent descent, for every class (section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abs_defense._threads import share_out
from abs_defense.inference._decoder import IMAGE_SHAPE, PIXELS, ClassDecoder, JointDecoder
from abs_defense.inference._descent import descend, descend_pairs
from abs_defense.inference._energy import energy
from abs_defense.inference._pairs import Pairs
from abs_defense.inference._prototypes import Prototypes
from abs_defense.inference._quasi_newton import minimise, minimise_pairs

_CHUNK_CPU = 128
_CHUNK_CUDA = 2048
_CHUNK_UNROLLED = 16
_ENOUGH_FOR_THREADS = 64  # images, for the classes to be shared out to threads of one core each; Adam needs fewer
# Images, for two rounds of descents to be faster than one of all where a third is misclassified.
_ENOUGH_FOR_DUELS = {"adam": 32, "bfgs": 16}
_HOPELESS = 10.0  # nats: a rival that far behind the label before the descents hardly ever beats it
# By how much of its energy a class must be behind to have lost whatever rounding does to the logits.
_SURE = 1e-5

Solver = Literal["adam", "bfgs"]


@dataclass(frozen=True)
class Inference:
    """What inference found for N images and C classes with L latents.

    Attributes:
        energy: E_c(x), ``(N, C)``, nats summed over pixels; the prediction is the class of lowest energy. For Binary
            ABS it is that of the binarised image and includes the factor gamma_c.
        latents: z*, ``(N, C, L)``.
        reconstructions: G_c(z*), ``(N, C, 1, 28, 28)`` in (0, 1).
    """

    energy: Tensor
    latents: Tensor
    reconstructions: Tensor

    @property
    def prediction(self) -> Tensor:
        """Class of lowest energy, ``(N,)``."""
        return self.energy.argmin(dim=1)


@dataclass(frozen=True)
class InferenceSettings:
    """Hyperparameters of inference; see ``abs_defense.ABS`` for their meaning."""

    steps: int
    lr: float
    radius: float
    beta: float
    solver: Solver = "adam"


@dataclass(frozen=True)
class Duel:
    """Whether the label of each image is the class of lowest energy.

    Attributes:
        labels: ``(N,)``.
        factors: of each class's energy in the comparison, ``(C,)``.
    """

    labels: Tensor
    factors: Tensor

    def compared(self, energies: Tensor) -> Tensor:
        """Energies ``(C, N)`` as they are compared between classes."""
        return energies * self.factors[:, None]


def _chunk_size(images: Tensor) -> int:
    """How many images are worked on at once: small enough to stay in a CPU's cache, large enough to fill a GPU."""
    return _CHUNK_CUDA if images.is_cuda else _CHUNK_CPU


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same images in each tensor; none for an empty batch."""
    for start in range(0, len(tensors[0]), size):
        yield tuple(tensor[start : start + size] for tensor in tensors)


def _decode(decoders: Sequence[ClassDecoder], latents: Tensor) -> Tensor:
    """G_c(z): ``(C, N, L) -> (C, N, 784)``."""
    joint = JointDecoder.of(decoders) if JointDecoder.is_faster([latents.shape[1]] * len(decoders)) else None
    if joint is not None:
        return joint(latents)
    return torch.stack([decoder(z) for decoder, z in zip(decoders, latents, strict=True)])


def infer_latents(
    decoders: Sequence[ClassDecoder],
    prototypes: Prototypes,
    images: Tensor,
    settings: InferenceSettings,
    duel: Duel | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies ``(N, C)`` and latents ``(N, C, L)`` of images ``(N, 784)``, in bounded memory.

    With ``duel`` only whether the label wins matters: where another class beats it, all others may be left at their
    prototype.
    """
    classes = len(decoders)
    energies = images.new_empty(len(images), classes)
    latents = images.new_empty(len(images), classes, prototypes.latents.shape[-1])
    labels = images.new_empty(len(images), 0) if duel is None else duel.labels
    for x, label, energy_out, latents_out in _chunks(_chunk_size(images), images, labels, energies, latents):
        if duel is None or settings.steps == 0 or len(x) < _ENOUGH_FOR_DUELS[settings.solver]:
            z, found = _solve(decoders, prototypes, x, settings)
        else:
            z, found = _solve_duel(decoders, prototypes, x, settings, Duel(label, duel.factors))
        energy_out.copy_(found.T)
        latents_out.copy_(z.transpose(0, 1))
    return energies, latents


def reconstruct(decoders: Sequence[ClassDecoder], latents: Tensor) -> Tensor:
    """G_c(z) as images: ``(N, C, L) -> (N, C, 1, 28, 28)``, in bounded working memory."""
    out = latents.new_empty(*latents.shape[:2], PIXELS)
    for z, target in _chunks(_chunk_size(latents), latents, out):
        target.copy_(_decode(decoders, z.transpose(0, 1)).transpose(0, 1))
    return out.view(*latents.shape[:2], *IMAGE_SHAPE)


def envelope_gradient(
    decoders: Sequence[ClassDecoder], images: Tensor, latents: Tensor, grad_energies: Tensor
) -> Tensor:
    """Gradient of sum_c w_c E_c(x) at fixed latents: sum_c 2 w_c (x - G_c(z*)), ``(N, 784)``.

    By the envelope theorem this is the gradient of min_z where z* is stationary.
    """
    gradient = torch.empty_like(images)
    for x, z, w, target in _chunks(_chunk_size(images), images, latents, grad_energies, gradient):
        decoded = _decode(decoders, z.transpose(0, 1)).transpose(0, 1)
        target.copy_((2.0 * w[:, :, None] * (x[:, None] - decoded)).sum(dim=1))
    return gradient


def unrolled_gradient(
    decoders: Sequence[ClassDecoder],
    prototypes: Prototypes,
    images: Tensor,
    grad_energies: Tensor,
    settings: InferenceSettings,
) -> Tensor:
    """Gradient of sum_c w_c E_c(x) through every step of the descent, ``(N, 784)``.

    The descent is run again with a graph, for a few images and one class at a time, so memory stays bounded. The
    choice of the starting prototype is piecewise constant and contributes nothing.
    """
    gradient = torch.zeros_like(images)
    for x, w, target in _chunks(_CHUNK_UNROLLED, images, grad_energies, gradient):
        starts = prototypes.latents_at(prototypes.nearest(x, settings.beta)[0]).to(images.dtype)
        for decoder, start, w_class in zip(decoders, starts, w.unbind(1), strict=True):
            with torch.enable_grad():
                live = x.clone().requires_grad_()
                z = _descend([decoder], live, start[None], settings)[0]
                weighted = (w_class * energy(live, decoder(z), z, settings.beta)).sum()
                target += torch.autograd.grad(weighted, live)[0]
    return gradient


def _solve(
    decoders: Sequence[ClassDecoder],
    prototypes: Prototypes,
    x: Tensor,
    settings: InferenceSettings,
) -> tuple[Tensor, Tensor]:
    """Latents ``(C, N, L)`` and energies ``(C, N)`` of images ``(N, 784)``."""
    if not _worth_threads(len(x), len(decoders), settings, x.device):
        return _solve_classes(decoders, prototypes, x, settings)

    def some_classes(part: slice) -> tuple[Tensor, Tensor]:
        return _solve_classes(decoders[part], prototypes.of_classes(part), x, settings)

    z, energies = (torch.cat(parts) for parts in zip(*share_out(some_classes, len(decoders)), strict=True))
    return z, energies


def _worth_threads(images: int, classes: int, settings: InferenceSettings, device: torch.device) -> bool:
    """Whether threads that take some classes each are faster than all classes at once."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return False
    if settings.solver == "adam" and settings.steps > 0:
        return not JointDecoder.is_faster([images] * classes)
    return images >= _ENOUGH_FOR_THREADS


def _solve_classes(
    decoders: Sequence[ClassDecoder], prototypes: Prototypes, x: Tensor, settings: InferenceSettings
) -> tuple[Tensor, Tensor]:
    starts, energies = _starts(prototypes, x, settings)
    if settings.steps == 0:
        return starts[0], energies
    if settings.solver == "bfgs":
        assert prototypes.curvature is not None
        return minimise(
            decoders,
            x,
            starts,
            prototypes.curvature,
            steps=settings.steps,
            radius=settings.radius,
            beta=settings.beta,
        )
    z = _descend(decoders, x, starts[0], settings)
    return z, energy(x, _decode(decoders, z), z, settings.beta)


def _starts(prototypes: Prototypes, x: Tensor, settings: InferenceSettings) -> tuple[Tensor, Tensor]:
    """Where descents start, ``(S, C, N, L)``, and the energies of the first of these prototypes, ``(C, N)``."""
    if settings.steps > 0 and settings.solver == "bfgs":
        indices, energies = prototypes.nearest_two(x, settings.beta)
    else:
        index, energies = prototypes.nearest(x, settings.beta)
        indices = index[None]
    return torch.stack([prototypes.latents_at(i) for i in indices]).to(x.dtype), energies


def _solve_duel(
    decoders: Sequence[ClassDecoder],
    prototypes: Prototypes,
    x: Tensor,
    settings: InferenceSettings,
    duel: Duel,
) -> tuple[Tensor, Tensor]:
    """``_solve`` for the label and the class that its prototype makes the first rival, or all classes of images that
    the label is likely to win; then for the other classes of the images where the rival loses."""
    starts, known = _starts(prototypes, x, settings)
    z, energies = starts[0].clone(), known.to(x.dtype)
    pairs = Pairs.of_all(decoders, x, settings.beta)
    everyone = torch.arange(len(x), device=x.device)
    compared = duel.compared(energies)
    first = torch.zeros_like(energies, dtype=torch.bool)
    first[duel.labels, everyone] = True
    behind, rival = (compared.masked_fill(first, torch.inf) - compared[duel.labels, everyone]).min(0)
    first[rival, everyone] = True
    first[:, behind > _HOPELESS] = True

    def finish(wanted: Tensor) -> None:
        rows = wanted.flatten().nonzero()[:, 0]
        if len(rows):
            solved = _solve_pairs(pairs.chosen(rows), starts.flatten(1, 2)[:, rows], prototypes, settings)
            z[wanted], energies[wanted] = solved

    finish(first)
    compared = duel.compared(energies)
    lost = compared[rival, everyone] < (1.0 - _SURE) * compared[duel.labels, everyone]
    finish(~first & ~lost)
    return z, energies


def _solve_pairs(
    pairs: Pairs, starts: Tensor, prototypes: Prototypes, settings: InferenceSettings
) -> tuple[Tensor, Tensor]:
    """Latents ``(P, L)`` and energies ``(P,)`` from starts ``(S, P, L)``."""
    if settings.solver == "bfgs":
        assert prototypes.curvature is not None
        return minimise_pairs(pairs, starts, prototypes.curvature, steps=settings.steps, radius=settings.radius)
    z = descend_pairs(pairs, starts[0], steps=settings.steps, lr=settings.lr, radius=settings.radius)
    return z, pairs.energy(z, torch.arange(len(z), device=z.device))


def _descend(decoders: Sequence[ClassDecoder], x: Tensor, start: Tensor, settings: InferenceSettings) -> Tensor:
    return descend(decoders, x, start, steps=settings.steps, lr=settings.lr, radius=settings.radius, beta=settings.beta)
