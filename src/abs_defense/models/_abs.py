"""ABS and Binary ABS as modules that map images to logits (Schott et al. 2018, sections 3 and 4)."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from abs_defense._checks import check_choices, check_counts, check_positive
from abs_defense._precision import full_precision
from abs_defense.inference import (
    PIXELS,
    Duel,
    Inference,
    InferenceSettings,
    Observation,
    Prototypes,
    Solver,
    asked_labels,
    average_curvature,
    envelope_gradient,
    infer_latents,
    publish,
    reconstruct,
    sample_latents,
    somebody_listens,
    unrolled_gradient,
)
from abs_defense.models._classifier import Classifier, device_of
from abs_defense.models._images import BINARY_THRESHOLD, check_images
from abs_defense.models._weights import Weights, load_weights

if TYPE_CHECKING:
    from typing_extensions import Self

Gradient = Literal["envelope", "unrolled", "none"]
_CURVATURE_SAMPLES = 32


class ABS(Classifier):
    """Analysis by Synthesis: which class's generative model explains the image best?

    For each class y the energy ``E_y(x) = min_z ||G_y(z) - x||^2 + beta * 0.5 ||z||^2`` is minimised by inference:
    the best of ``prototypes`` decoded samples of the prior, then at most ``steps`` steps of latent descent
    (``solver``) in the ball ``||z|| <= radius`` (section 3). The logits are ``alpha * l_y(x)`` with
    ``l_y = -E_y / 784`` (eq. 8); the paper's bound l*_y is -E_y.

    The module takes ``(N, 1, 28, 28)`` floating point images in [0, 1] and returns ``(N, C)`` float32 logits. An
    image's logits do not depend on its batch. Weights are frozen.

    The authors' code makes 49 updates where the paper says 50 iterations; ``steps`` counts updates.

    Args:
        weights: ``"mnist"`` (bundled), a ``.safetensors`` file, a folder with the authors' ``ABS_*.net``,
            ``Weights`` in memory, or None for an untrained model of 10 classes.
        prototypes: number of prior samples decoded per class; or the latents themselves, ``(K, L)`` or, for each
            class its own, ``(C, K, L)``.
        steps: updates of latent descent; 0 classifies by the best prototype alone.
        lr: Adam's step size on z; logits by ``"bfgs"`` do not depend on it.
        radius: of the ball that z is kept in.
        beta: weight of the KL term.
        solver: of the latent descent. ``"adam"`` is the paper's: ``steps`` updates from the best prototype. ``"bfgs"``
            (ours) makes at most ``steps`` BFGS steps from the better of two prototypes and stops when it has
            converged: lower energies, several times faster. None: ``"adam"`` for unrolled gradients, else ``"bfgs"``.
        gradient: what back-propagation from the logits yields. ``"envelope"``: the gradient at fixed latents,
            ``2 (x - G(z*))`` per energy, exact where z* is stationary. ``"unrolled"``: through every update of the
            descent (``solver="adam"`` only). ``"none"``: the logits are detached.
        seed: of the prior samples.

    Attributes:
        alpha: scale of the confidence softmax, see ``predict_proba``; a buffer that comes with the weights.
        eta: its offset, likewise.

    Raises:
        ValueError: a setting is out of its range, or the weights are damaged or of another architecture.
        FileNotFoundError: no such weights.
    """

    prototype_latents: Tensor
    _prototype_images: Tensor
    prototype_offsets: Tensor
    curvature: Tensor
    alpha: Tensor
    eta: Tensor

    def __init__(
        self,
        weights: str | Path | Weights | None = "mnist",
        *,
        prototypes: int | Tensor = 8000,
        steps: int = 50,
        lr: float = 0.05,
        radius: float = 5.0,
        beta: float = 1.0,
        solver: Solver | None = None,
        gradient: Gradient = "envelope",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if solver is None:
            solver = "adam" if gradient == "unrolled" else "bfgs"
        _check_settings(steps=steps, lr=lr, radius=radius, beta=beta, solver=solver, gradient=gradient)
        loaded = weights if isinstance(weights, Weights) else load_weights(weights)
        self.decoders = copy.deepcopy(loaded.decoders)  # moving one model moves no other
        self.settings = InferenceSettings(steps=steps, lr=lr, radius=radius, beta=beta, solver=solver)
        self.gradient: Gradient = gradient
        self.seed = seed
        self._register_calibration(loaded)
        latents = _prototype_latents(prototypes, self.num_classes, self.latent_dim, seed)
        self.register_buffer("prototype_latents", latents, persistent=False)
        self.to(device_of(self.decoders))
        for name in ("_prototype_images", "prototype_offsets", "curvature"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._decode_prototypes()
        self.register_load_state_dict_post_hook(_decode_prototypes_again)  # type: ignore[no-untyped-call]
        self.eval()

    def _register_calibration(self, weights: Weights) -> None:
        self.register_buffer("alpha", torch.tensor(weights.calibration.alpha, dtype=torch.float32))
        self.register_buffer("eta", torch.tensor(weights.calibration.eta, dtype=torch.float32))

    def _decode_prototypes(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            latents = self.prototype_latents.to(self._dtype)
            decoders = self.decoders.class_decoders()
            dtype, bfgs = self.prototype_latents.dtype, self.settings.solver == "bfgs" and self.settings.steps > 0
            compact = torch.float16 if bfgs and dtype == torch.float32 else dtype
            decoded = Prototypes.decode(decoders, latents, self.settings.beta, compact)
            if bfgs:
                prior = sample_latents(_CURVATURE_SAMPLES, self.latent_dim, self.seed).to(latents)
                self.curvature = average_curvature(decoders, prior, self.settings.beta)
        self._prototype_images, self.prototype_offsets = decoded.images, decoded.offsets

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.prototype_latents.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.prototype_latents.dtype != before and len(self.prototype_offsets):
            with torch.inference_mode(False), torch.no_grad():  # those of the rounded prototypes, and not rounded
                latents = self.prototype_latents.to(self._dtype)
                offsets = Prototypes.of_images(latents, self._prototype_images, self.settings.beta).offsets
            self.prototype_offsets = offsets
        return self

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.decoders.num_classes

    @property
    def latent_dim(self) -> int:
        """L, the number of latents of each VAE."""
        return self.decoders.latent_dim

    @property
    def prototype_images(self) -> Tensor:
        """G_c(z) of the prototypes, ``(C, K, 784)`` in (0, 1).

        With ``solver="bfgs"``, for which they only are starting points, they are kept in half precision.
        """
        return self._prototype_images.to(self.prototype_latents.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.prototype_latents.dtype, torch.float32)

    def extra_repr(self) -> str:
        s = self.settings
        return (
            f"classes={self.num_classes}, prototypes={self.prototype_latents.shape[-2]}, steps={s.steps}, lr={s.lr}, "
            f"radius={s.radius}, beta={s.beta}, solver={s.solver!r}, gradient={self.gradient!r}, seed={self.seed}"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``alpha * l_y(x)``: ``(N, 1, 28, 28) -> (N, C)``, float32.

        Raises:
            TypeError, ValueError: the images are not ``(N, 1, 28, 28)`` floats in [0, 1]; in [-1, 2] where a gradient
                is asked for, since attacks with momentum look ahead.
        """
        check_images(images)
        energies: Tensor = _Energies.apply(images, self, self._labels_in_question(images))  # type: ignore[no-untyped-call]
        if self.gradient == "none":
            energies = energies.detach()
        logits = -self.alpha.to(energies.dtype) * self._scale(energies) / PIXELS
        return logits.float()

    def confidence_softmax(self, logits: Tensor) -> Tensor:
        """p(y|x) = (exp(alpha l_y) + eta) / sum_c (exp(alpha l_c) + eta) from logits, ``(N, C) -> (N, C)`` (eq. 8).

        The offset eta makes the confidence uniform, not high, far from the data; there it no longer tells which class
        is best, so take predictions from the logits.
        """
        likelihood = logits.exp() + self.eta.to(logits.dtype)
        return likelihood / likelihood.sum(dim=1, keepdim=True)

    def predict(self, images: Tensor) -> Tensor:
        """The class of the largest logit, ``(N, 1, 28, 28) -> (N,)``.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        with torch.no_grad():
            logits: Tensor = self(images)
            return logits.argmax(dim=1)

    def infer(self, images: Tensor) -> Inference:
        """Energies, latents and reconstructions of all classes, without gradients.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        check_images(images)
        with torch.inference_mode(False), torch.no_grad(), full_precision(images.device):
            flat = self._flatten(images)
            decoders = self.decoders.class_decoders()
            return self._inference(*infer_latents(decoders, self._prototypes(), flat, self.settings))

    def _inference(self, energies: Tensor, latents: Tensor) -> Inference:
        reconstructions = reconstruct(self.decoders.class_decoders(), latents)
        return Inference(self._scale(energies).float(), latents.float(), reconstructions.float())

    def _observation(self, images: Tensor, energies: Tensor, latents: Tensor) -> Observation:
        return Observation(
            images=images.detach().clone(),
            inference=self._inference(energies.detach().clone(), latents),
            threshold=self.binary_threshold,
            gamma=self._factors(energies).float(),
            eta=float(self.eta),
        )

    def describe(self) -> dict[str, Any]:
        """Settings that its outputs depend on besides the weights."""
        return {
            **asdict(self.settings),
            "gradient": self.gradient,
            "prototypes": self.prototype_latents.shape[-2],
            "prototypes_sha256": _digest(self.prototype_latents),
            "prototype_seed": self.seed,
        }

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> str | None:
        """Write weights, settings and card to a folder; see ``abs_defense.hub.save_pretrained``."""
        from abs_defense.hub import save_pretrained

        return save_pretrained(self, folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload to the Hugging Face Hub; see ``abs_defense.hub.push_to_hub``."""
        from abs_defense.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Self:
        """A model from a folder or a repository of the Hub; see ``abs_defense.hub.from_pretrained``."""
        from abs_defense.hub import from_pretrained

        return from_pretrained(cls, source, **kwargs)

    def _labels_in_question(self, images: Tensor) -> Tensor | None:
        """The labels of which the caller only wants to know whether they win; None if it needs more."""
        if somebody_listens() or (torch.is_grad_enabled() and images.requires_grad):
            return None
        return asked_labels(len(images), self.num_classes)

    def _flatten(self, images: Tensor) -> Tensor:
        """What the VAEs see of the images, ``(N, 784)``."""
        seen = images.detach()
        if self.binary_threshold is not None:
            seen = (seen > self.binary_threshold).to(seen.dtype)
        return seen.flatten(1).to(self._dtype).clone()

    def _factors(self, like: Tensor) -> Tensor:
        """The factors by which ``_scale`` multiplies, ``(C,)``."""
        return self._scale(like.new_ones(1, self.num_classes))[0]

    def _scale(self, energies: Tensor) -> Tensor:
        """Energies as they are compared between classes."""
        return energies

    def _prototypes(self) -> Prototypes:
        return Prototypes(self.prototype_latents, self._prototype_images, self.prototype_offsets, self.curvature)


class BinaryABS(ABS):
    """Binary ABS: ABS on images binarised at 0.5, each class's energy multiplied by gamma_y (section 3).

    gamma comes with the weights; it is found on training data. Gradients pass the threshold straight through (BPDA)
    unless ``gradient="none"``. Arguments, shapes and errors are those of ``ABS``.

    Attributes:
        gamma: ``(C,)``, a buffer that comes with the weights.
    """

    binary_threshold = BINARY_THRESHOLD
    gamma: Tensor

    def _register_calibration(self, weights: Weights) -> None:
        super()._register_calibration(weights)
        self.register_buffer("gamma", torch.tensor(weights.calibration.gamma, dtype=torch.float32))

    def _scale(self, energies: Tensor) -> Tensor:
        return energies * self.gamma.to(energies.dtype).clone()  # autograd keeps no tensor of inference mode


class _Energies(torch.autograd.Function):
    """E_c(x), ``(N, C)``, with the gradient policy of the model; inference itself leaves no graph."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: ABS, labels: Tensor | None) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), full_precision(images.device):
            flat = model._flatten(images)
            decoders = model.decoders.class_decoders()
            duel = None if labels is None else Duel(labels.to(flat.device), model._factors(flat))
            energies, latents = infer_latents(decoders, model._prototypes(), flat, model.settings, duel)
            publish(lambda: model._observation(images, energies, latents))
        ctx.save_for_backward(flat, latents)
        ctx.model, ctx.decoders = model, decoders
        ctx.shape, ctx.dtype = images.shape, images.dtype
        return energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_energies: Tensor) -> tuple[Tensor, None, None]:
        images, latents = ctx.saved_tensors
        model: ABS = ctx.model
        with full_precision(images.device):
            if model.gradient == "unrolled" and model.settings.steps:
                gradient = unrolled_gradient(ctx.decoders, model._prototypes(), images, grad_energies, model.settings)
            else:
                gradient = envelope_gradient(ctx.decoders, images, latents, grad_energies)
        return gradient.view(ctx.shape).to(ctx.dtype), None, None


def _digest(tensor: Tensor) -> str:
    values = tensor.cpu().contiguous().view(torch.uint8)  # numpy has no bfloat16
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _decode_prototypes_again(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, ABS)
    module._decode_prototypes()


def _prototype_latents(prototypes: int | Tensor, num_classes: int, latent_dim: int, seed: int) -> Tensor:
    if not isinstance(prototypes, Tensor):
        check_counts(prototypes=prototypes)
        return sample_latents(prototypes, latent_dim, seed)
    shape = tuple(prototypes.shape)
    if (
        len(shape) not in (2, 3)
        or shape[-1] != latent_dim
        or (len(shape) == 3 and shape[0] != num_classes)
        or not shape[-2]
    ):
        raise ValueError(
            f"prototypes: expected a number or latents of shape (K, {latent_dim}) or ({num_classes}, K, {latent_dim}), "
            f"got {shape}"
        )
    if not prototypes.is_floating_point() or not bool(prototypes.isfinite().all()):
        raise ValueError(f"prototypes: expected finite floating point latents, got {prototypes.dtype}")
    return prototypes.detach().to("cpu", torch.float32, copy=True)


def _check_settings(*, steps: int, lr: float, radius: float, beta: float, solver: str, gradient: str) -> None:
    check_counts(0, steps=steps)
    check_positive(lr=lr, radius=radius)
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta: expected a finite number of at least 0, got {beta}")
    check_choices(gradient=(gradient, get_args(Gradient)), solver=(solver, get_args(Solver)))
    if gradient == "unrolled" and solver != "adam":
        raise ValueError(f'gradient="unrolled" goes through the steps of Adam: expected solver="adam", got {solver!r}')
