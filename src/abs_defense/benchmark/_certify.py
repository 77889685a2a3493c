"""Certified radii of many images: piece by piece, to a table, a curve and one row an image."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense._versions import versions
from abs_defense.benchmark._figures import certified_figure, save_figure
from abs_defense.benchmark._runner import Piece, Result, computed_on, make_plan, run_plan
from abs_defense.benchmark._store import Arrays
from abs_defense.benchmark._suite import NORMS, CertificateSpec, our_model
from abs_defense.benchmark._table import Row, certified, write_csv
from abs_defense.certificates import Method, Norm, certify
from abs_defense.data import ImageSet
from abs_defense.models import ABS, PROTOTYPE_NAMES, default_weights, load_weights

THRESHOLDS: dict[Norm, tuple[float, ...]] = {
    "l2": (0.5, 1.0, 1.5, 2.0),
    "linf": (0.1, 0.2, 0.3, 0.4),
    "l0": (4, 8, 12, 16),
}
_PIECE_PROVED = 500
_PIECE_ESTIMATED = 50
_QUERIES_ESTIMATED = 25


@dataclass(frozen=True)
class Certification:
    """What ``run_certification`` found and wrote.

    Attributes:
        rows: of the table, one a model.
        radii: by model, ``(seeds, N)``.
        folder: with ``radii.csv``, ``table.csv``, ``curve.png`` and ``manifest.json``.
    """

    rows: list[Row]
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
    weights: str | Path | None = None,
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
        ValueError: unknown model, a method that does not serve the norm or a model, ``seeds`` less than 1, several
            seeds of a model whose prototypes are fixed, or labels that a model does not have.
        RuntimeError: a piece could not be certified; the others are kept.
        OSError: the folder cannot be written.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    for name in models if seeds > 1 else ():
        if name in PROTOTYPE_NAMES and load_weights(weights or default_weights(name)).prototypes is not None:
            raise ValueError(f"seeds: expected 1, got {seeds}: the prototypes of {name!r} come with its weights")
    folder = require_writable_folder(out)
    settings: dict[str, Any] = {"anchors": anchors, "starts": starts}
    per_image: list[Row] = []
    rows: list[Row] = []
    radii: dict[str, npt.NDArray[np.float64]] = {}
    described: dict[str, Any] = {}
    everything: list[Result] = []

    def report(piece: Piece, arrays: Arrays) -> None:
        per_image.extend(_image_rows(piece, arrays))
        write_csv(per_image, folder / "radii.csv")

    for name in models:
        results: list[Result] = []
        for number in range(seed, seed + seeds):
            model = our_model(name, weights=weights, seed=number)
            proved = name in PROTOTYPE_NAMES
            measurement = CertificateSpec(
                f"certify-{method}",
                norm,
                settings,
                queries=1 if proved else _QUERIES_ESTIMATED,
                piece=_PIECE_PROVED if proved else _PIECE_ESTIMATED,
                method=method,
            )
            plan = make_plan([model], [measurement], data, folder, device=device, seed=number)
            built = plan.models[name]
            assert isinstance(built, ABS)
            certify(built, data.images[:0].to(device), data.labels[:0].to(device), norm, method, **settings)
            described |= {f"{name}, seed {number}": piece.key.model_settings for piece in plan.pieces[:1]}
            result = run_plan(plan, progress=progress, on_piece=report)[-1]
            if result.errors:
                raise RuntimeError(f"certification failed: {'; '.join(result.errors)}")
            results.append(result)
        everything.extend(results)
        radii[name] = np.stack([r.arrays.get("radius", np.zeros(0)) for r in results])
        rows.append(_table_row(name, norm, method, results))
    write_csv(rows, folder / "table.csv")
    manifest = {
        "data": {"name": data.name, "images": len(data), "sha256": data.sha256()},
        "models": described,
        "weights": str(weights),
        "norm": norm,
        "method": method,
        **settings,
        "seeds": list(range(seed, seed + seeds)),
        "hardware": computed_on(everything),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    with replace_atomically(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2, default=str) + "\n")
    figure = certified_figure({name: values.ravel() for name, values in radii.items()}, norm, method)
    if figure is not None:
        save_figure(figure, folder / "curve.png")
    return Certification(rows, radii, folder)


def _image_rows(piece: Piece, arrays: Arrays) -> list[Row]:
    labels = piece.labels.tolist()
    return [
        {
            "model": piece.model.name,
            "seed": piece.key.seed,
            "image": piece.key.start + i,
            "label": labels[i],
            "rival": int(arrays["rival"][i]),
            "correct": str(bool(arrays["correct"][i])).lower(),
            "radius": float(arrays["radius"][i]),
            "proved": str(bool(arrays["proved"][i])).lower(),
        }
        for i in range(len(labels))
    ]


def _table_row(name: str, norm: Norm, method: Method, results: Sequence[Result]) -> Row:
    """One model's row: statistics over the images, the mean of the seeds; ``mean radius +-`` is the standard deviation
    of the mean radius over the seeds."""
    row: Row = {"model": name, "method": method, "norm": NORMS[norm].label}
    radii = np.stack([r.arrays.get("radius", np.zeros(0)) for r in results])
    row["images"] = radii.shape[1]
    if not radii.size:
        return row
    row["radii are"] = "proved" if results[0].arrays["proved"].all() else "estimated"
    row["clean accuracy"] = float(np.mean([r.arrays["correct"] for r in results]))
    row["mean radius"] = float(radii.mean())
    if len(results) > 1:
        row["mean radius +-"] = float(radii.mean(axis=1).std(ddof=1))
    row["median radius"] = float(np.median(radii, axis=1).mean())
    for threshold in THRESHOLDS[norm]:
        row[f"certified accuracy at {threshold:g}"] = float(certified(radii, threshold, norm).mean())
    row["seconds"] = sum(r.seconds for r in results)
    return row
