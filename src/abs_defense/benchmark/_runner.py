"""Runs measurements of models piece by piece, here or elsewhere, and continues where it was stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from abs_defense._files import require_writable_folder
from abs_defense._versions import versions
from abs_defense.benchmark._code import code_digests
from abs_defense.benchmark._measure import OnQueries, Speed, describe, measure, probe
from abs_defense.benchmark._store import CODE, Arrays, PieceKey, Store
from abs_defense.benchmark._suite import CLEAN, AttackSpec, DistalSpec, Measurement, ModelSpec
from abs_defense.data import ImageSet


@dataclass(frozen=True)
class Record:
    """Where the result of a piece is, and of what.

    Attributes:
        model, kind: of the model.
        measurement, norm: of the measurement.
        attack: whether it is one.
        start, stop: the shard of images.
        file: in the store.
    """

    model: str
    kind: str
    measurement: str
    norm: str | None
    attack: bool
    start: int
    stop: int
    file: str


@dataclass(frozen=True)
class Piece:
    """One measurement of one model on a shard of the images: all that a worker needs.

    Attributes:
        model: how to make the model.
        measurement: what to do.
        key: under which the result is stored.
        images: of the shard, on the CPU.
        labels: likewise.
    """

    model: ModelSpec
    measurement: Measurement
    key: PieceKey
    images: Tensor
    labels: Tensor

    @property
    def record(self) -> Record:
        """What is needed to read the result."""
        measurement = self.measurement
        return Record(
            self.model.name,
            self.model.kind,
            measurement.name,
            measurement.norm,
            isinstance(measurement, AttackSpec),
            self.key.start,
            self.key.stop,
            self.key.file,
        )

    def __str__(self) -> str:
        return f"{self.model.name}: {self.measurement.name}, images {self.key.start} to {self.key.stop - 1}"

    def run(self, model: nn.Module, device: str | torch.device, on_queries: OnQueries | None = None) -> Arrays:
        """Compute the result with the model, which is on the device."""
        x, y = self.images.to(device), self.labels.to(device)
        return measure(self.measurement, model, x, y, self.key.seed, on_queries, start=self.key.start)


@dataclass(frozen=True)
class Failure:
    """Why a piece has no result."""

    reason: str


PIECES = "pieces"
_NOT_RECORDED = '{"device": "not recorded"}'  # by earlier versions
Outcome = tuple[Piece, Arrays | Failure]
Executor = Callable[[Sequence[Piece]], Iterable[Outcome]]


@dataclass(frozen=True)
class Plan:
    """All the work of an evaluation.

    Attributes:
        pieces: in the order of models and measurements.
        models: in use, by name, on the device.
        store: with the finished pieces.
        device: where to compute.
        data: all images.
    """

    pieces: list[Piece]
    models: dict[str, nn.Module]
    store: Store
    device: torch.device
    data: ImageSet

    def missing(self) -> list[Piece]:
        """Pieces without a result."""
        return [piece for piece in self.pieces if self.store.load(piece.key) is None]

    def speeds(self, pieces: Sequence[Piece]) -> dict[str, Speed]:
        """Of the models of some pieces, measured now."""
        return {
            name: probe(self.models[name], next(p.images for p in pieces if p.model.name == name))
            for name in dict.fromkeys(piece.model.name for piece in pieces)
        }


@dataclass(frozen=True)
class Result:
    """What one measurement of one model gave on all images.

    Attributes:
        model: name of the model.
        attack: name of the measurement.
        norm: of distances or radii, None for none.
        arrays: per image, see ``measure``; empty if a piece failed or is not computed yet. But in an attack that failed
            on some pieces only, their images have an infinite distance, or 0 if they are misclassified as they are.
        seconds: of computing, summed over pieces.
        errors: of the pieces that failed.
        hardware: what the pieces were computed on, each once, as JSON.
    """

    model: str
    attack: str
    norm: str | None
    arrays: Arrays
    seconds: float
    errors: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ()


def make_plan(
    models: Sequence[ModelSpec],
    measurements: Sequence[Measurement],
    data: ImageSet,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Plan:
    """Cut the work into pieces: every model, every measurement that serves its kind, shards of the images.

    Raises:
        ValueError: two models or two measurements have the same name, or one that can't be part of a file's; a label
            is not a class of a model; a model or an attack can't be made from its settings.
        OSError: the folder cannot be written.
    """
    for what, names in {"models": [m.name for m in models], "measurements": [m.name for m in measurements]}.items():
        if len(set(names)) < len(names):
            raise ValueError(f"{what}: expected different names, got {', '.join(names)}")
        for name in names:
            if not name or set(name) & set("/\\\0"):
                raise ValueError(f"{what}: expected names that can be part of a file's, got {name!r}")
    for m in measurements:
        if m.name == CLEAN.name and type(m) is not type(CLEAN):
            raise ValueError(f"measurements: {m.name!r} is the name of the clean accuracy")
    settings = {m.name: m.identity() | (_code(m.resolve()) if isinstance(m, AttackSpec) else {}) for m in measurements}
    store = Store(require_writable_folder(Path(out) / PIECES))
    device = torch.device(device)
    built: dict[str, nn.Module] = {}
    pieces = []
    for spec in models:
        model = built[spec.name] = spec.make().to(device)
        check_labels(data.labels, getattr(model, "num_classes", None), spec.name)
        described = describe(spec, model) | _code(spec.resolve(), *(type(part) for part in model.modules()))
        for measurement in measurements:
            if not measurement.serves(spec.kind):
                continue
            if isinstance(measurement, AttackSpec):
                with contextlib.suppress(ImportError):  # of an extra that is not installed; fails piece by piece
                    measurement.make()
            images, labels = data.images, data.labels
            if isinstance(measurement, DistalSpec):
                images, labels = images.new_zeros(measurement.images, 1, 28, 28), labels.new_zeros(measurement.images)
            piece = measurement.piece_for(spec.kind)
            for start in range(0, len(images), piece):
                part = slice(start, min(start + piece, len(images)))
                shard = ImageSet(images[part], labels[part], data.name)
                key = PieceKey(
                    model=spec.name,
                    model_settings=described,
                    attack=measurement.name,
                    attack_settings=settings[measurement.name],
                    images_sha256=shard.sha256(),
                    start=part.start,
                    stop=part.stop,
                    seed=seed,
                    versions=versions(),
                )
                pieces.append(Piece(spec, measurement, key, shard.images, shard.labels))
    return Plan(pieces, built, store, device, data)


def run_plan(
    plan: Plan,
    *,
    executor: Executor | None = None,
    progress: bool = True,
    on_piece: Callable[[Piece, Arrays], None] | None = None,
) -> list[Result]:
    """Compute what is missing, keep every piece as soon as it is finished, and gather the results.

    A piece that fails is reported and does not stop the rest; it is tried again by the next call. After a kill or an
    error of the disk, a later call with the same plan computes only what is missing.

    Args:
        plan: the work.
        executor: computes pieces elsewhere, in any order; by default here, one after the other.
        progress: show a progress bar with the time that is left.
        on_piece: called with each piece, finished before or now.

    Raises:
        OSError: a piece cannot be written.
    """
    failures: dict[str, str] = {}
    missing = plan.missing()
    if on_piece is not None:
        waiting = {piece.key.file for piece in missing}
        for piece in plan.pieces:
            arrays = None if piece.key.file in waiting else plan.store.load(piece.key)
            if arrays is not None:
                on_piece(piece, arrays)
    with _Progress(plan, missing, progress) as bar:
        outcomes = _here(plan, missing, bar) if executor is None else executor(missing)
        for piece, outcome in outcomes:
            if isinstance(outcome, Failure):
                failures[piece.key.file] = f"{piece}: {outcome.reason}"
                tqdm.write(f"failed: {failures[piece.key.file]}")
            else:
                plan.store.save(piece.key, outcome)
                if on_piece is not None:
                    on_piece(piece, outcome)
            bar.finish(piece)
    records = [piece.record for piece in plan.pieces]
    return gather(records, list(plan.models), plan.store, plan.data, failures)


def evaluate(
    models: Sequence[ModelSpec],
    measurements: Sequence[Measurement],
    data: ImageSet,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> list[Result]:
    """``make_plan`` and ``run_plan``.

    Raises:
        ValueError, OSError: see there.
    """
    plan = make_plan(models, measurements, data, out, device=device, seed=seed)
    return run_plan(plan, executor=executor, progress=progress)


def _code(*objects: object) -> dict[str, dict[str, str]]:
    digests = code_digests(*objects)
    return {CODE: digests} if digests else {}


def check_labels(labels: Tensor, num_classes: int | None, name: str) -> None:
    if num_classes is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: expected classes 0 to {num_classes - 1} of model {name!r}, "
            f"got values from {int(labels.min())} to {int(labels.max())}"
        )


class _Progress:
    """A bar in seconds of expected work, which moves with every model query and is put right after every piece."""

    def __init__(self, plan: Plan, missing: Sequence[Piece], show: bool) -> None:
        speeds = plan.speeds(missing) if show else {}
        self._expected: Mapping[str, float] = {
            p.key.file: len(p.images) * speeds[p.model.name].of(p.measurement) if show else 1.0 for p in missing
        }
        self._done = 0.0
        self._bar = tqdm(
            total=sum(self._expected.values()) or 1.0,
            disable=not show or not missing,
            bar_format="{desc} {percentage:3.0f} %|{bar}| {elapsed}, left {remaining}",
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *args: object) -> None:
        self._bar.close()

    def counting(self, piece: Piece) -> OnQueries:
        """To be called with the model queries of the piece that is computed now."""
        self._bar.set_description_str(f"{piece.model.name}: {piece.measurement.name}")
        share = self._expected[piece.key.file] / (len(piece.images) * max(1.0, piece.measurement.queries))
        limit = self._done + self._expected[piece.key.file]

        def count(queries: int) -> None:
            self._bar.update(min(share * queries, max(0.0, limit - self._bar.n)))

        return count

    def finish(self, piece: Piece) -> None:
        self._done += self._expected[piece.key.file]
        self._bar.update(self._done - self._bar.n)


def _here(plan: Plan, pieces: Sequence[Piece], bar: _Progress) -> Iterator[Outcome]:
    for piece in pieces:
        yield piece, attempt(piece, plan.models[piece.model.name], plan.device, bar.counting(piece))


def attempt(
    piece: Piece, model: nn.Module, device: str | torch.device, on_queries: OnQueries | None = None
) -> Arrays | Failure:
    """The result of a piece; whatever an attack of a third party raises is a failure of this piece only."""
    try:
        return piece.run(model, device, on_queries)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


def gather(
    records: Sequence[Record],
    models: Sequence[str],
    store: Store,
    data: ImageSet,
    failures: Mapping[str, str] | None = None,
) -> list[Result]:
    """The results of all pieces: those in the store; for the others the ``failures`` by file say why they have none.

    A piece that is not computed yet says nothing about its images, so its measurement has no result.
    """
    failures = failures or {}
    groups: dict[tuple[str, str], list[Record]] = {(model, CLEAN.name): [] for model in models}
    for record in records:
        groups.setdefault((record.model, record.measurement), []).append(record)
    results: list[Result] = []
    misclassified = dict.fromkeys(models, np.zeros(len(data), dtype=bool))
    for (model, name), group in groups.items():
        found = [store.load_file(record.file) for record in group]
        absent = [record for record, arrays in zip(group, found, strict=True) if arrays is None]
        errors = tuple(failures.get(record.file, _not_computed(record)) for record in absent)
        unknown = any(record.file not in failures for record in absent)
        usable = len(absent) < len(group) and (not absent or (group[0].attack and not unknown))
        parts = [
            _nothing_found(data, misclassified[model], slice(record.start, record.stop)) if arrays is None else arrays
            for record, arrays in zip(group, found, strict=True)
        ]
        seconds = sum(float(part.pop("seconds").sum()) for part in parts if "seconds" in part)
        machines = {text for part in found if part is not None for text in part.pop("hardware", (_NOT_RECORDED,))}
        joined = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]} if usable else {}
        if name == CLEAN.name and usable:
            misclassified[model] = joined["predictions"] != data.labels.numpy()
        results.append(
            Result(model, name, group[0].norm if group else None, joined, seconds, errors, tuple(sorted(machines)))
        )
    return results


def computed_on(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The machines and devices of all pieces, each once."""
    return [json.loads(text) for text in sorted({text for result in results for text in result.hardware})]


def _not_computed(record: Record) -> str:
    return f"{record.model}: {record.measurement}, images {record.start} to {record.stop - 1}: not computed yet"


def _nothing_found(data: ImageSet, misclassified: npt.NDArray[np.bool_], part: slice) -> Arrays:
    images = data.images[part].numpy()
    return {
        "distances": np.where(misclassified[part], 0.0, np.inf).astype(np.float32),
        "adversarials": images,
        "queries": np.zeros(len(images)),
        "gradients": np.zeros(len(images)),
    }
