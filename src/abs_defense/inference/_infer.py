"""The paper's inference: best of many prototypes, then latent descent, for every class (section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abs_defense._threads import share_out
from abs_defense.inference._decide import Contest
from abs_defense.inference._decoder import IMAGE_SHAPE, PIXELS, ClassDecoder, JointDecoder
from abs_defense.inference._descent import descend, descend_while_open
from abs_defense.inference._energy import energy
from abs_defense.inference._pairs import Pairs
from abs_defense.inference._prototypes import Prototypes
from abs_defense.inference._quasi_newton import minimise

_CHUNK_CPU = 128
_CHUNK_CUDA = 2048
_CHUNK_UNROLLED = 16
_ENOUGH_FOR_THREADS = 64  # images, for the classes to be shared out to threads of one core each; Adam needs fewer

# How much a descent can still gain after so many steps, in nats, with 8000 prototypes: a third more than the most that
# any of 1500 pairs (BFGS: 3800) of an image (digits, their adversarials, noise) and a class gained.
_MARGINS: dict[str, tuple[tuple[int, float], ...]] = {
    "adam": ((5, 40.0), (10, 35.0), (20, 29.0), (30, 18.0), (40, 7.0)),
    "bfgs": ((2, 40.0), (4, 30.0)),
}

_MARGINS_PROTOTYPES = 8000
_PROTOTYPE_EXPONENT = 0.125  # as the distance to the nearest of K samples in 8 dimensions grows

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
    compared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Energies ``(N, C)`` and latents ``(N, C, L)`` of images ``(N, 784)``, in bounded memory.

    With ``compared``, ``(C,)``, only the class of lowest energy times ``compared`` matters: those that can't be it any
    more are left unfinished.
    """
    classes = len(decoders)
    energies = images.new_empty(len(images), classes)
    latents = images.new_empty(len(images), classes, prototypes.latents.shape[-1])
    for x, energy_out, latents_out in _chunks(_chunk_size(images), images, energies, latents):
        z, found = _solve(decoders, prototypes, x, settings, compared)
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
    compared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Latents ``(C, N, L)`` and energies ``(C, N)`` of images ``(N, 784)``."""
    contest = None
    if compared is not None and settings.steps > 0:
        fewer = max(1.0, _MARGINS_PROTOTYPES / prototypes.images.shape[1]) ** _PROTOTYPE_EXPONENT
        contest = Contest(compared.to(x.dtype), [(step, fewer * gain) for step, gain in _MARGINS[settings.solver]])
    if contest is not None or not _worth_threads(len(x), len(decoders), settings, x.device):
        return _solve_classes(decoders, prototypes, x, settings, contest)

    def some_classes(part: slice) -> tuple[Tensor, Tensor]:
        return _solve_classes(decoders[part], prototypes.of_classes(part), x, settings, None)

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
    decoders: Sequence[ClassDecoder],
    prototypes: Prototypes,
    x: Tensor,
    settings: InferenceSettings,
    contest: Contest | None,
) -> tuple[Tensor, Tensor]:
    if settings.steps > 0 and settings.solver == "bfgs":
        assert prototypes.curvature is not None
        pairs = torch.stack([prototypes.latents_at(i) for i in prototypes.nearest_two(x, settings.beta)])
        return minimise(
            decoders,
            x,
            pairs.to(x.dtype),
            prototypes.curvature,
            steps=settings.steps,
            radius=settings.radius,
            beta=settings.beta,
            contest=contest,
        )
    indices, energies = prototypes.nearest(x, settings.beta)
    starts = prototypes.latents_at(indices).to(x.dtype)
    if settings.steps == 0:
        return starts, energies
    if contest is None:
        z = _descend(decoders, x, starts, settings)
    else:
        open_pairs = Pairs.of_all(decoders, x, settings.beta)
        z = descend_while_open(
            open_pairs, starts, contest, steps=settings.steps, lr=settings.lr, radius=settings.radius
        )
    return z, energy(x, _decode(decoders, z), z, settings.beta)


def _descend(decoders: Sequence[ClassDecoder], x: Tensor, start: Tensor, settings: InferenceSettings) -> Tensor:
    return descend(decoders, x, start, steps=settings.steps, lr=settings.lr, radius=settings.radius, beta=settings.beta)
