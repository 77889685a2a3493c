"""Runs models against attacks, piece by piece, and continues where it was stopped."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import foolbox
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abs_defense._versions import versions
from abs_defense.attacks import QueryCounter
from abs_defense.benchmark._plan import NORMS, AttackSpec
from abs_defense.benchmark._store import Arrays, PieceKey, Store
from abs_defense.data import ImageSet
from abs_defense.models import ABS

SHARD = 50
CLEAN = "clean"


@dataclass(frozen=True)
class Result:
    """What one model and one attack (or none) gave on all images.

    Attributes:
        model: name of the model.
        attack: name of the attack, ``"clean"`` for none.
        norm: of the distances, None for clean.
        arrays: per image, ``predictions`` and ``confidences`` for clean; ``distances`` (0 for images that are
            misclassified as they are, infinity where the attack failed) and ``adversarials`` for an attack; and
            ``queries`` and ``gradients`` (of the model, an image) for both.
        seconds: of computing, summed over pieces.
        error: why the attack could not be run, if it could not.
    """

    model: str
    attack: str
    norm: str | None
    arrays: Arrays
    seconds: float
    error: str | None = None


def evaluate(
    models: Mapping[str, Callable[[], ABS]],
    attacks: Sequence[AttackSpec],
    data: ImageSet,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> list[Result]:
    """Clean predictions of every model, and its distance under every attack, for every image.

    Finished pieces of at most 50 images are kept in ``out/pieces``; a later call with the same models, attacks,
    images, seed and versions computes only what is missing. A piece that fails is reported and does not stop the
    rest; it is tried again by the next call.

    Args:
        models: factories by name; each is called once.
        attacks: to run on each model.
        data: images and labels.
        out: folder; made if missing.
        device: where to compute.
        seed: foolbox's attacks draw from global random states; these are seeded with it for each piece and put back.
        progress: show progress bars.

    Raises:
        ValueError: a label is not a class of a model.
        OSError: the folder cannot be written.
    """
    store = Store(Path(out) / "pieces")
    images_sha256 = data.sha256()
    results = []
    for name, factory in models.items():
        model = factory().to(device)
        check_labels(data.labels, model.num_classes, name)
        settings = model_settings(model)
        for spec in (None, *attacks):
            attack = CLEAN if spec is None else spec.name
            pieces: list[Arrays] = []
            error = None
            with tqdm(
                total=len(data) * (1 if spec is None else spec.queries),
                desc=f"{name}: {attack}",
                unit="query",
                disable=not progress,
            ) as bar:
                for start in range(0, len(data), SHARD):
                    shard = slice(start, min(start + SHARD, len(data)))
                    key = PieceKey(
                        model=name,
                        model_settings=settings,
                        attack=attack,
                        attack_settings={} if spec is None else spec.settings,
                        images_sha256=images_sha256,
                        start=shard.start,
                        stop=shard.stop,
                        seed=seed,
                        versions=versions(),
                    )
                    piece = store.load(key)
                    if piece is None:
                        x, y = data.images[shard].to(device), data.labels[shard].to(device)
                        try:
                            piece = _clean(model, x, bar) if spec is None else _attack(model, spec, x, y, seed, bar)
                        except (RuntimeError, ValueError, AssertionError) as problem:
                            error = f"images {shard.start} to {shard.stop - 1}: {problem}"
                            tqdm.write(f"{name}: {attack} failed on {error}")
                            break
                        store.save(key, piece)
                    else:
                        bar.update(len(piece["queries"]) * (1 if spec is None else spec.queries))
                    pieces.append(piece)
            arrays = {field: np.concatenate([p[field] for p in pieces]) for field in pieces[0]} if pieces else {}
            seconds = float(arrays.pop("seconds").sum()) if arrays else 0.0
            results.append(Result(name, attack, None if spec is None else spec.norm, arrays, seconds, error))
    return results


def model_settings(model: ABS) -> dict[str, Any]:
    """What a result of a model depends on."""
    return {
        **asdict(model.settings),
        "class": type(model).__name__,
        "gradient": model.gradient,
        "prototypes": model.prototype_latents.shape[-2],
        "prototypes_sha256": hashlib.sha256(model.prototype_latents.cpu().numpy().tobytes()).hexdigest(),
        "prototype_seed": model.seed,
        "weights_sha256": model.weights_sha256(),
    }


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1} of model {name!r}, "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )


def _clean(model: ABS, x: Tensor, bar: tqdm[Any]) -> Arrays:
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(x)
        predictions, confidences = logits.argmax(dim=1), model.confidence_softmax(logits).amax(dim=1)
    bar.update(len(x))
    return {
        "predictions": predictions.cpu().numpy(),
        "confidences": confidences.cpu().numpy(),
        "queries": np.ones(len(x)),
        "gradients": np.zeros(len(x)),
        "seconds": np.array([time.perf_counter() - started]),
    }


def _attack(model: ABS, spec: AttackSpec, x: Tensor, y: Tensor, seed: int, bar: tqdm[Any]) -> Arrays:
    started = time.perf_counter()
    counter = QueryCounter(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), len(x))
    with _show_queries(model, bar), _seeded(seed):
        adversarials, _, _ = spec.make()(counter, x, y, epsilons=None)
    with torch.no_grad():
        fooled = model(adversarials).argmax(1) != y
        misclassified = model(x).argmax(1) != y
    distances = NORMS[spec.norm].distance(x, adversarials)
    distances = torch.where(fooled, distances, torch.inf)
    distances = torch.where(misclassified, 0.0, distances)
    return {
        "distances": distances.cpu().numpy(),
        "adversarials": adversarials.cpu().numpy(),
        "queries": counter.queries,
        "gradients": counter.gradients,
        "seconds": np.array([time.perf_counter() - started]),
    }


@contextmanager
def _show_queries(model: nn.Module, bar: tqdm[Any]) -> Iterator[None]:
    def update(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        bar.update(len(output))

    handle = model.register_forward_hook(update)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
