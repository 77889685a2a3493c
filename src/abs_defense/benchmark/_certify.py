"""Certified radii of many images: piece by piece, to a table, a curve and one row an image."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense._versions import versions
from abs_defense.benchmark._figures import certified_figure, save_figure
from abs_defense.benchmark._plan import NORMS
from abs_defense.benchmark._runner import check_labels, model_settings
from abs_defense.benchmark._store import Arrays, PieceKey, Store
from abs_defense.benchmark._table import write_csv
from abs_defense.certificates import Certificate, Method, Norm, certify
from abs_defense.data import ImageSet
from abs_defense.models import load_model

THRESHOLDS: dict[Norm, tuple[float, ...]] = {
    "l2": (0.5, 1.0, 1.5, 2.0),
    "linf": (0.1, 0.2, 0.3, 0.4),
    "l0": (4, 8, 12, 16),
}
_PIECE_PROVED = 500
_PIECE_ESTIMATED = 50


@dataclass(frozen=True)
class Certification:
    """What ``run_certification`` found and wrote.

    Attributes:
        rows: of the table, one a model.
        radii: by model, ``(seeds, N)``.
        folder: with ``radii.csv``, ``table.csv``, ``curve.png`` and ``manifest.json``.
    """

    rows: list[dict[str, float | str | None]]
    radii: dict[str, npt.NDArray[np.float64]]
    folder: Path


def run_certification(
    models: Sequence[str],
    data: ImageSet,
    out: str | Path,
    *,
    norm: Norm = "l2",
    method: Method = "bisector",
    seeds: int = 1,
    anchors: int = 20,
    starts: int = 4,
    weights: str | Path = "mnist",
    device: str | torch.device = "cpu",
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Certification:
    """Certify images under models by name, and write the results into ``out``.

    Finished pieces (500 images where the radii are proved, 50 where they are estimated) are kept in ``out/pieces``;
    a later call continues. ``radii.csv`` has one row an image, model and seed and grows with every piece.

    Args:
        models: names for ``load_model``.
        data: images and labels.
        out: folder; made if missing.
        norm, method, anchors, starts: as for ``certify``.
        seeds: the inference of every model is repeated with prototypes drawn from so many seeds, for an error bar.
        weights: for all models, as for ``ABS``.
        device: where to compute.
        seed: the first of the seeds.
        command: the command line, for the manifest.
        progress: show progress bars.

    Raises:
        ValueError: unknown model, a method that does not serve the norm or a model, ``seeds`` less than 1, or labels
            that a model does not have.
        OSError: the folder cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    folder = require_writable_folder(out)
    store = Store(folder / "pieces")
    images_sha256 = data.sha256()
    rows: list[dict[str, float | str | None]] = []
    radii: dict[str, npt.NDArray[np.float64]] = {}
    per_image: list[dict[str, float | str | None]] = []
    described = {}
    for name in models:
        own: list[Arrays] = []
        proved = False
        for number in range(seed, seed + seeds):
            model = load_model(name, weights=weights, seed=number).to(device)
            check_labels(data.labels, model.num_classes, name)
            described[f"{name}, seed {number}"] = settings = model_settings(model)
            proved = model.settings.steps == 0
            size = _PIECE_PROVED if proved else _PIECE_ESTIMATED
            pieces = []
            description = f"{name}: {method}, {norm}" + (f", seed {number}" if seeds > 1 else "")
            with tqdm(total=len(data), desc=description, unit="img", disable=not progress) as bar:
                for start in range(0, len(data), size):
                    part = slice(start, min(start + size, len(data)))
                    key = PieceKey(
                        model=name,
                        model_settings=settings,
                        attack=f"certify-{method}",
                        attack_settings={"norm": norm, "anchors": anchors, "starts": starts},
                        images_sha256=images_sha256,
                        start=part.start,
                        stop=part.stop,
                        seed=number,
                        versions=versions(),
                    )
                    piece = store.load(key)
                    if piece is None:
                        x, y = data.images[part].to(device), data.labels[part].to(device)
                        piece = _piece(partial(certify, model, x, y, norm, method, anchors=anchors, starts=starts))
                        store.save(key, piece)
                    pieces.append(piece)
                    per_image += _image_rows(name, number, proved, data, part, piece)
                    write_csv(per_image, folder / "radii.csv")
                    bar.update(part.stop - part.start)
            own.append({field: np.concatenate([p[field] for p in pieces]) for field in pieces[0]} if pieces else {})
        radii[name] = np.stack([arrays.get("radius", np.zeros(0)) for arrays in own])
        rows.append(_table_row(name, norm, method, proved, own))
    write_csv(rows, folder / "table.csv")
    manifest = {
        "data": {"name": data.name, "images": len(data), "sha256": images_sha256},
        "models": described,
        "weights": str(weights),
        "norm": norm,
        "method": method,
        "anchors": anchors,
        "starts": starts,
        "seeds": list(range(seed, seed + seeds)),
        "device": str(device),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    with replace_atomically(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n")
    figure = certified_figure({name: values.ravel() for name, values in radii.items()}, norm, method)
    if figure is not None:
        save_figure(figure, folder / "curve.png")
    return Certification(rows, radii, folder)


def _piece(run: Callable[[], Certificate]) -> Arrays:
    started = time.perf_counter()
    certificate = run()
    return {
        "radius": certificate.radius.cpu().numpy(),
        "correct": certificate.correct.cpu().numpy(),
        "rival": certificate.rival.cpu().numpy(),
        "seconds": np.array([time.perf_counter() - started]),
    }


def _image_rows(
    name: str, seed: int, proved: bool, data: ImageSet, part: slice, piece: Arrays
) -> list[dict[str, float | str | None]]:
    return [
        {
            "model": name,
            "seed": seed,
            "image": index,
            "label": int(data.labels[index]),
            "rival": int(rival),
            "correct": str(bool(correct)).lower(),
            "radius": float(radius),
            "proved": str(proved).lower(),
        }
        for index, radius, rival, correct in zip(
            range(part.start, part.stop), piece["radius"], piece["rival"], piece["correct"], strict=True
        )
    ]


def _table_row(
    name: str, norm: Norm, method: Method, proved: bool, own: Sequence[Arrays]
) -> dict[str, float | str | None]:
    """One model's row: statistics over the images, the mean of the seeds; ``mean radius +-`` is the standard deviation
    of the mean radius over the seeds."""
    label = NORMS[norm].label
    row: dict[str, float | str | None] = {
        "model": name,
        "method": method,
        "norm": label,
        "radii are": "proved" if proved else "estimated",
    }
    radii = np.stack([arrays.get("radius", np.zeros(0)) for arrays in own])
    row["images"] = radii.shape[1]
    if not radii.size:
        return row
    row["clean accuracy"] = float(np.mean([arrays["correct"] for arrays in own]))
    row["mean radius"] = float(radii.mean())
    if len(own) > 1:
        row["mean radius +-"] = float(radii.mean(axis=1).std(ddof=1))
    row["median radius"] = float(np.median(radii, axis=1).mean())
    for threshold in THRESHOLDS[norm]:
        row[f"certified accuracy at {threshold:g}"] = float(certified(radii, threshold, norm).mean())
    row["seconds"] = float(sum(arrays["seconds"].sum() for arrays in own))
    return row


def certified(radii: npt.NDArray[np.float64], threshold: float, norm: Norm) -> npt.NDArray[np.bool_]:
    """Which images no perturbation of norm at most ``threshold`` takes to another class."""
    return radii >= threshold if norm == "l0" else radii > threshold
