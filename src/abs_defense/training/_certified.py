"""Fine-tuning of the prototype classifier for certified radii."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from abs_defense._checks import check_counts, check_positive
from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense._memory import reuse_freed_memory
from abs_defense.certificates import certify
from abs_defense.data import ImageSet
from abs_defense.inference import ClassDecoder, DecoderStack, kl_divergence
from abs_defense.models import Weights, load_model, load_weights, save_weights, state_sha256
from abs_defense.training._augment import augment, light_augmentation
from abs_defense.training._card import write_card
from abs_defense.training._checkpoint import load_checkpoint, save_checkpoint
from abs_defense.training._mean import mean_weights

WEIGHTS = "certified.safetensors"
LOG = "certified.csv"
_NAME = "ABS without latent descent, {} fine-tuned for certified radii"
_DECODE_CHUNK = 256
_TINY = 1e-6


@dataclass(frozen=True)
class CertifiedTraining:
    """Recipe of the fine-tuning: Adam on the hinge loss of the certified radius (after Voracek and Hein, ICML 2022,
    whose prototypes are free; here decoders and latents learn, so that prototypes stay on a manifold).

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: of the decoders, falling linearly to a fiftieth; 0 leaves them as they are, so that only the
            choice of prototypes on their manifold is tuned.
        latent_learning_rate: of the prototypes' latents, likewise.
        margin: radius up to which a larger one is rewarded, in the L2 norm.
        power: of the hinge; above 1, images with a small or negative radius count more.
        shift: images are moved by up to so many pixels in each direction.
        augment: probability of each kind of light augmentation (zoom, shear, skew, elastic distortion) for an image.
        refresh: steps between decodings of all prototypes; in between, the deciding points are looked for among
            those last decoded, and decoded again.
        seed: of order and shifts.

    Raises:
        ValueError: a number is out of its range.
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-4
    latent_learning_rate: float = 3e-3
    margin: float = 2.5
    power: float = 1.0
    shift: int = 1
    augment: float = 0.0
    refresh: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size, refresh=self.refresh)
        check_positive(latent_learning_rate=self.latent_learning_rate, margin=self.margin)
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a finite number, at least 0, got {self.learning_rate}")
        if not self.power >= 1:
            raise ValueError(f"power: expected at least 1, got {self.power}")
        if not 0 <= self.shift <= 3:
            raise ValueError(f"shift: expected 0 to 3 pixels, got {self.shift}")
        if not 0.0 <= self.augment <= 1.0:
            raise ValueError(f"augment: expected a probability between 0 and 1, got {self.augment}")


class _Points(nn.Module):
    """Decoders and latents that learn, and all their points as last decoded."""

    images: Tensor
    constants: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        assert weights.prototypes is not None
        self.stack = DecoderStack(
            [weights.decoders.get_parameter(f"weight_{i}") for i in range(4)],
            [weights.decoders.get_parameter(f"bias_{i}") for i in range(4)],
        ).requires_grad_(True)
        self.latents = nn.Parameter(weights.prototypes.clone())
        self.beta = weights.prototype_beta
        classes, count = self.latents.shape[:2]
        self.register_buffer("images", torch.empty(classes, count, 784), persistent=False)
        self.register_buffer("constants", torch.empty(classes, count), persistent=False)

    def decoder(self, c: int) -> ClassDecoder:
        return ClassDecoder(
            [self.stack.get_parameter(f"weight_{i}")[c] for i in range(4)],
            [self.stack.get_parameter(f"bias_{i}")[c] for i in range(4)],
        )

    @torch.no_grad()
    def refresh(self) -> None:
        for c, target in enumerate(self.images):
            decoder = self.decoder(c)
            for z, part in zip(self.latents[c].split(_DECODE_CHUNK), target.split(_DECODE_CHUNK), strict=True):
                part.copy_(decoder(z))
        self.constants.copy_(self.images.square().sum(-1) + self.beta * kl_divergence(self.latents))

    @torch.no_grad()
    def deciding(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The anchor of the true class (lowest energy), and the class and index of the point that limits the bisector
        radius with it: three times ``(N,)``."""
        classes, count = self.latents.shape[:2]
        rows = torch.arange(len(x), device=x.device)
        points = self.images.flatten(0, 1)
        energies = torch.addmm(self.constants.flatten(), x, points.T, alpha=-2.0).view(-1, classes, count)
        lowest, anchor = energies[rows, y].min(1)
        anchors = self.images[y, anchor]
        squares = points.square().sum(1) + anchors.square().sum(1, keepdim=True)
        lengths = torch.addmm(squares, anchors, points.T, alpha=-2.0).clamp_min(_TINY).sqrt().view_as(energies)
        radii = (energies - lowest[:, None, None]) / (2.0 * lengths)
        radii[rows, y] = torch.inf
        rival = radii.flatten(1).argmin(1)
        return anchor, rival // count, rival % count

    def radii(self, x: Tensor, y: Tensor, anchor: Tensor, rival_class: Tensor, rival: Tensor) -> Tensor:
        """``(E_b(x) - E_a(x)) / (2 ||p_b - p_a||)`` of the given points, differentiable, ``(N,)``."""
        labels, index = torch.cat([y, rival_class]), torch.cat([anchor, rival])
        groups = [(labels == c).nonzero()[:, 0] for c in range(len(self.latents))]
        latents = torch.cat([self.latents[c, index[rows]] for c, rows in enumerate(groups)])
        decoded = torch.cat(
            [self.decoder(c)(self.latents[c, index[rows]]) for c, rows in enumerate(groups) if len(rows)]
        )
        order = torch.cat(groups).argsort()
        p, z = decoded[order], latents[order]
        energy = (p - torch.cat([x, x])).square().sum(1) + self.beta * kl_divergence(z)
        (own, other), (a, b) = energy.chunk(2), p.chunk(2)
        return (other - own) / (2.0 * (b - a).square().sum(1).clamp_min(_TINY).sqrt())


def train_certified(
    weights: Weights,
    data: ImageSet,
    out: str | Path,
    config: CertifiedTraining | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Weights:
    """Fine-tune decoders and prototypes so that the bisector radius of the training images grows.

    For an image x of class y, a = the point of y with the lowest energy, b = the point of another class that takes x
    from a with the smallest perturbation, the loss is
    ``max(0, margin - (E_b(x) - E_a(x)) / (2 ||p_b - p_a||)) ** power``.
    Misclassified images have a negative radius.

    After every epoch ``out/checkpoint.pt`` is replaced and ``out/certified.csv`` (epoch, loss, seconds) written; a
    later call with the same recipe, weights and images continues and ends with the same weights.

    Args:
        weights: with prototypes; of alpha, eta and gamma the result keeps those.
        data: training images.
        out: folder; made if missing.
        config: the recipe.
        device: where to compute.
        progress: show a progress bar.

    Raises:
        ValueError: the weights have no prototypes, the data has other classes, or the folder holds a checkpoint of
            another recipe.
        OSError: the folder cannot be written.
    """
    config = config or CertifiedTraining()
    reuse_freed_memory()
    if weights.prototypes is None:
        raise ValueError("weights: expected some with prototypes (abs-defense train prototypes), got none")
    if data.num_classes != weights.decoders.num_classes:
        raise ValueError(f"expected images of {weights.decoders.num_classes} classes, got {data.num_classes}")
    folder = require_writable_folder(out)
    points = _Points(weights).to(device)
    points.stack.requires_grad_(config.learning_rate > 0)
    optimizer = torch.optim.Adam(
        [
            {"params": list(points.stack.parameters()), "lr": config.learning_rate},
            {"params": [points.latents], "lr": config.latent_learning_rate},
        ]
    )
    steps = max(1, len(data) // config.batch_size)
    total = config.epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1.0 - step / total))
    stateful: dict[str, Any] = {"points": points, "optimizer": optimizer, "schedule": schedule}
    identity = {**asdict(config), "images": data.sha256(), "weights": state_sha256(points)}
    saved = load_checkpoint(folder, identity)
    start, log = 0, []
    if saved is not None:
        start, log = int(saved["epochs_done"]), saved["log"]
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
    with tqdm(total=total, initial=start * steps, desc="certified training", unit="step", disable=not progress) as bar:
        for epoch in range(start, config.epochs):
            began, losses = time.perf_counter(), torch.zeros(())
            for number, (x, y) in enumerate(_batches(data, config, epoch, steps)):
                if number % config.refresh == 0:
                    points.refresh()
                x, y = x.to(device), y.to(device)
                short = F.relu(config.margin - points.radii(x, y, *points.deciding(x, y)))
                loss = short.pow(config.power).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses += loss.detach().cpu()
                bar.update()
            log.append({"epoch": epoch, "loss": losses.item() / steps, "seconds": time.perf_counter() - began})
            bar.set_postfix(epoch=epoch, loss=f"{log[-1]['loss']:.4f}")
            state = {name: part.state_dict() for name, part in stateful.items()}
            save_checkpoint(folder, identity, {**state, "epochs_done": epoch + 1, "log": log})
            with replace_atomically(folder / LOG) as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(log[0]))
                writer.writeheader()
                writer.writerows(log)
    stack = points.stack.cpu().requires_grad_(False)
    return replace(weights, decoders=stack, prototypes=points.latents.detach().cpu())


def train_certified_abs(
    weights: Weights,
    train: ImageSet,
    out: str | Path,
    config: CertifiedTraining | None = None,
    *,
    test: ImageSet | None = None,
    device: str | torch.device = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """``train_certified``; then write ``certified.safetensors`` and its card ``certified.json`` into ``out``.

    Args:
        weights, train, out, config, device, progress: see ``train_certified``.
        test: if given, clean accuracy and proved radii of all of it go into the card.
        command: the command line, for the card.

    Returns:
        The card.

    Raises:
        ValueError, OSError: see ``train_certified``.
    """
    config = config or CertifiedTraining()
    tuned = train_certified(weights, train, out, config, device=device, progress=progress)
    path = Path(out) / WEIGHTS
    save_weights(path, tuned)
    learned = "decoders and prototypes" if config.learning_rate > 0 else "prototypes"
    return write_card(
        path,
        command,
        name=_NAME.format(learned),
        data=train.name,
        data_sha256=train.sha256(),
        recipe=asdict(config),
        start_sha256=state_sha256(_Points(weights)),
        test_figures=None if test is None else _figures(path, test, device, progress),
    )


def average_certified_abs(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    shares: Sequence[float] | None = None,
    test: ImageSet | None = None,
    device: str | torch.device = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """The weighted mean of the decoders and prototypes of fine-tunings that continue one another, or started from the
    same weights; ``certified.safetensors`` and its card in ``out``. Between two of different margins or powers, the
    shares choose a point on the trade-off between clean accuracy and large radii.

    Args:
        sources: weights with prototypes in the same order.
        out: folder; made if missing.
        shares: of each of the sources, with sum 1; None for equal ones.
        test: if given, clean accuracy and proved radii of all of it go into the card.
        device: where to compute these.
        command: the command line, for the card.
        progress: show a progress bar.

    Returns:
        The card.

    Raises:
        ValueError: no sources, ones of different classes, architectures or numbers of prototypes, or shares that
            don't fit.
        FileNotFoundError: no such weights.
        OSError: the folder cannot be written.
    """
    mean = mean_weights(sources, shares, prototypes=True)
    path = require_writable_folder(out) / WEIGHTS
    save_weights(path, mean)
    return write_card(
        path,
        command,
        name=_NAME.format("decoders and prototypes"),
        recipe={
            "mean of": [state_sha256(_Points(load_weights(source))) for source in sources],
            "shares": None if shares is None else list(shares),
        },
        test_figures=None if test is None else _figures(path, test, device, progress),
    )


def _figures(path: Path, test: ImageSet, device: str | torch.device, progress: bool) -> dict[str, Any]:
    model = load_model("prototype-abs", weights=path).to(device)
    certificate = certify(model, test.images, test.labels, progress=progress)
    radius = certificate.radius
    return {
        "images": len(test),
        "data": test.name,
        "accuracy": certificate.correct.double().mean().item(),
        "mean certified radius, L2": radius.mean().item(),
        **{f"certified accuracy at {r:g}": (radius > r).double().mean().item() for r in (0.5, 1.0, 1.5, 2.0)},
    }


def _batches(data: ImageSet, config: CertifiedTraining, epoch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat images, augmented and shifted, with their labels."""
    pipeline = light_augmentation(config.augment) if config.augment else None
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(data), generator=generator)
    for number, rows in enumerate(order[: steps * config.batch_size].tensor_split(steps)):
        x = data.images[rows].clone()
        if pipeline is not None:
            x = augment(x, pipeline, seed=(config.seed * 1_000_003 + epoch) * steps + number)
        moves = torch.randint(-config.shift, config.shift + 1, (len(rows), 2), generator=generator)
        for move in moves.unique(dim=0):
            moved = (moves == move).all(1)
            x[moved] = _shifted(x[moved], int(move[0]), int(move[1]))
        yield x.flatten(1), data.labels[rows]


def _shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Moved by whole pixels, black where nothing was."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    top, left = max(-down, 0), max(-right, 0)
    return padded[..., top : top + height, left : left + width]
