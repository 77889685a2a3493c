"""Training of the class-conditional VAEs, one a class, with checkpoints and exact continuation."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from abs_defense._checks import check_counts, check_positive
from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense._memory import reuse_freed_memory
from abs_defense._threads import one_core_each
from abs_defense.data import ImageSet
from abs_defense.models._vae import VAE
from abs_defense.training._augment import augment, light_augmentation
from abs_defense.training._checkpoint import load_checkpoint, save_checkpoint

LOSS_LOG = "losses.csv"
_LOG_FIELDS = ["epoch", "class", "squared_error", "kl", "kl_weight", "learning_rate", "seconds"]


@dataclass(frozen=True)
class VAETraining:
    """Recipe of the VAEs. The defaults are the paper's recipe, as far as it is known; the bundled weights
    went on from there, see docs/results.md.

    From the paper: Adam on squared error (summed over the 784 pixels) plus ``w * KL``, with w falling from
    ``kl_start`` to ``kl_end`` over the first ``kl_epochs`` epochs (linearly: our reading). From the second author's
    reimplementation: learning rate 3e-3, batches of 128, light augmentation. Ours: the number of epochs, and the
    cosine decay of the learning rate from ``decay_from`` to the last epoch.

    ``augment`` is the probability of each kind of augmentation for an image; 0 for none.

    In the first ``encoder_epochs`` epochs only the encoders learn, for a start from decoders whose encoders are not
    at hand.

    Raises:
        ValueError: a number is out of its range.
    """

    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 3e-3
    decay_from: int = 50
    kl_start: float = 10.0
    kl_end: float = 1.0
    kl_epochs: int = 50
    encoder_epochs: int = 0
    augment: float = 0.1
    latent_dim: int = 8
    seed: int = 0
    checkpoint_every: int = 2

    def __post_init__(self) -> None:
        check_counts(
            epochs=self.epochs,
            batch_size=self.batch_size,
            latent_dim=self.latent_dim,
            checkpoint_every=self.checkpoint_every,
        )
        check_positive(learning_rate=self.learning_rate)
        if not 0.0 <= self.augment <= 1.0:
            raise ValueError(f"augment: expected a probability between 0 and 1, got {self.augment}")

    def kl_weight(self, epoch: int) -> float:
        """Weight of the KL term in an epoch (counted from 0)."""
        progress = min(1.0, epoch / self.kl_epochs) if self.kl_epochs else 1.0
        return self.kl_start + (self.kl_end - self.kl_start) * progress

    def rate(self, epoch: int) -> float:
        """Learning rate in an epoch (counted from 0)."""
        if epoch < self.decay_from or self.decay_from >= self.epochs:
            return self.learning_rate
        progress = (epoch - self.decay_from) / (self.epochs - self.decay_from)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


class _ClassTrainer:
    """One VAE, its optimizer and its images. An epoch depends on nothing but the weights and (seed, epoch, class)."""

    def __init__(self, label: int, images: Tensor, config: VAETraining, device: torch.device, init: VAE | None) -> None:
        self.label, self.config, self.device = label, config, device
        self.images = images.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed(-1))
            vae = VAE(config.latent_dim)
        if init is not None:
            vae.load_state_dict(init.state_dict())
        self.vae = vae.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=config.learning_rate, fused=True)
        self.pipeline: nn.Module | None = light_augmentation(config.augment) if config.augment else None

    def _seed(self, epoch: int) -> int:
        return (self.config.seed * 1_000_003 + epoch + 1) * 1_009 + self.label

    def run_epoch(self, epoch: int) -> dict[str, float]:
        config, started = self.config, time.perf_counter()
        generator = torch.Generator().manual_seed(self._seed(epoch))
        order = torch.randperm(len(self.images), generator=generator).to(self.device)
        noise = torch.randn(len(self.images), config.latent_dim, generator=generator).to(self.device)
        images = self.images[order]
        if self.pipeline is not None:
            images = augment(images, self.pipeline, seed=self._seed(epoch))
        images = images.contiguous(memory_format=torch.channels_last)
        weight = config.kl_weight(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(epoch)
        self.vae.train()
        decoder_learns = epoch >= config.encoder_epochs
        self.vae.decoder.train(decoder_learns).requires_grad_(decoder_learns)
        totals = torch.zeros(2, device=self.device)
        batches = max(1, round(len(images) / config.batch_size))
        for x, n in zip(images.tensor_split(batches), noise.tensor_split(batches), strict=True):
            reconstruction, mean, log_variance = self.vae(x, n)
            error = (reconstruction - x).square().sum()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
            self.optimizer.zero_grad(set_to_none=True)
            ((error + weight * kl) / len(x)).backward()
            self.optimizer.step()
            totals += torch.stack([error.detach(), kl.detach()])
        error_mean, kl_mean = (totals / len(images)).tolist()
        return {
            "epoch": epoch,
            "class": self.label,
            "squared_error": error_mean,
            "kl": kl_mean,
            "kl_weight": weight,
            "learning_rate": config.rate(epoch),
            "seconds": time.perf_counter() - started,
        }

    def state(self) -> dict[str, Any]:
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_vaes(
    data: ImageSet,
    out: str | Path,
    config: VAETraining | None = None,
    *,
    init: Sequence[VAE] | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: bool = True,
    after_epoch: Callable[[int], None] | None = None,
) -> list[VAE]:
    """Train one VAE a class on the images of that class, and return them in evaluation mode on the CPU.

    After every ``checkpoint_every`` epochs ``out/checkpoint.pt`` is replaced atomically. A later call with the same
    recipe and images continues from it and ends with the weights of an uninterrupted run. ``out/losses.csv`` has one
    row an epoch and class: squared error and KL in nats an image.

    The classes are independent, so on a CPU they train side by side, each on one thread: faster than several threads
    for one class, and the result does not depend on the number of threads.

    Args:
        data: training images of all classes.
        out: folder for checkpoint and log; made if missing.
        config: the recipe.
        init: VAEs to start from instead of random weights, one a class.
        device: where to train.
        workers: classes trained at once; by default torch's number of threads, or 1 on a GPU.
        progress: show a progress bar.
        after_epoch: called with the number of finished epochs after each.

    Raises:
        ValueError: a class between 0 and the largest label has fewer than two images, ``init`` has another number
            of classes, or the folder holds a checkpoint of another recipe or other images.
        OSError: the folder cannot be written.
    """
    config = config or VAETraining()
    reuse_freed_memory()
    device = torch.device(device)
    folder = require_writable_folder(out)
    counts = torch.bincount(data.labels, minlength=data.num_classes).tolist()
    for label, count in enumerate(counts):
        if count < 2:
            raise ValueError(f"{data.name}: class {label} has {count} images; a VAE needs at least 2")
    if init is not None and len(init) != len(counts):
        raise ValueError(f"init: expected {len(counts)} VAEs, one a class, got {len(init)}")
    recipe = {**asdict(config), "images": data.sha256(), "init": None if init is None else _digest(init)}
    del recipe["checkpoint_every"]
    trainers = [
        _ClassTrainer(label, data.images[data.labels == label], config, device, None if init is None else init[label])
        for label in range(len(counts))
    ]
    start = _resume(folder, recipe, trainers)
    rows = _rows_before(folder / LOSS_LOG, start)
    bar = tqdm(
        total=config.epochs * len(trainers),
        initial=start * len(trainers),
        desc="training VAEs",
        unit="class-epoch",
        disable=not progress,
    )
    with bar, _pool(workers, device) as pool:
        for epoch in range(start, config.epochs):
            for trainer, row in zip(trainers, pool.map(partial(_run_epoch, epoch), trainers), strict=True):
                if not math.isfinite(row["squared_error"] + row["kl"]):
                    raise FloatingPointError(f"class {trainer.label} diverged in epoch {epoch}: {row}")
                rows.append(row)
                bar.update()
                bar.set_postfix(epoch=epoch, error=f"{row['squared_error']:.2f}", kl=f"{row['kl']:.2f}")
            done = epoch + 1
            if done % config.checkpoint_every == 0 or done == config.epochs:
                save_checkpoint(folder, recipe, {"epochs_done": done, "classes": [t.state() for t in trainers]})
            _write_log(folder / LOSS_LOG, rows)
            if after_epoch is not None:
                after_epoch(done)
    return [trainer.vae.cpu().eval().requires_grad_(False) for trainer in trainers]


def _run_epoch(epoch: int, trainer: _ClassTrainer) -> dict[str, float]:
    return trainer.run_epoch(epoch)


def _pool(workers: int | None, device: torch.device) -> contextlib.AbstractContextManager[ThreadPoolExecutor]:
    if device.type == "cpu":
        return one_core_each(workers or torch.get_num_threads())
    return ThreadPoolExecutor(workers or 1)


def _digest(vaes: Sequence[VAE]) -> str:
    digest = hashlib.sha256()
    for vae in vaes:
        for name, value in vae.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resume(folder: Path, recipe: dict[str, Any], trainers: list[_ClassTrainer]) -> int:
    state = load_checkpoint(folder, recipe)
    if state is None:
        return 0
    for trainer, saved in zip(trainers, state["classes"], strict=True):
        trainer.load(saved)
    return int(state["epochs_done"])


def _rows_before(path: Path, epoch: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    with replace_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, _LOG_FIELDS)
        writer.writeheader()
        writer.writerows(rows)
