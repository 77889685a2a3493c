"""The tables of an evaluation: one row a model, and one row a model and attack."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from abs_defense._files import replace_atomically
from abs_defense.benchmark._plan import NORMS
from abs_defense.benchmark._runner import CLEAN, Result
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet


def smallest_distances(results: Sequence[Result], model: str, norm: str) -> npt.NDArray[Any] | None:
    """Per image the smallest distance over all attacks of a norm (infinity where none succeeded), None if none ran."""
    found = [r.arrays["distances"] for r in results if r.model == model and r.norm == norm and r.error is None]
    return np.min(found, axis=0) if found else None


def table_rows(results: Sequence[Result], data: ImageSet) -> list[dict[str, float | str | None]]:
    """One row a model: clean accuracy, median confidence, and per norm the median distance and the accuracy left
    at the paper's threshold (1.5, 0.3, 12 pixels) under all attacks together; queries and gradients an image; seconds.

    Distances are in pixel values of [0, 1] for L2 and L-infinity, in pixels for L0. A misclassified image has
    distance 0. An image counts as robust at a threshold if its smallest adversarial distance is larger.
    """
    labels = data.labels.numpy()
    rows: list[dict[str, float | str | None]] = []
    for model in dict.fromkeys(r.model for r in results):
        own = [r for r in results if r.model == model]
        clean = next(r for r in own if r.attack == CLEAN)
        row: dict[str, float | str | None] = {"model": model, "images": len(labels)}
        if clean.error is None and len(labels):
            row["clean accuracy"] = float((clean.arrays["predictions"] == labels).mean())
            row["median confidence"] = float(np.median(clean.arrays["confidences"]))
        for norm, spec in NORMS.items():
            if not any(r.norm == norm for r in own):
                continue
            distances = smallest_distances(own, model, norm)
            median = left = None
            if distances is not None and len(distances):
                median, left = float(np.median(distances)), float((distances > spec.threshold).mean())
            row[f"{spec.label} median"] = median
            row[f"{spec.label} accuracy at {spec.threshold:g}"] = left
        for what in ("queries", "gradients"):
            row[f"{what} per image"] = sum(_mean(r, what) for r in own)
        row["seconds"] = sum(r.seconds for r in own)
        rows.append(row)
    return rows


def attack_rows(results: Sequence[Result]) -> list[dict[str, float | str | None]]:
    """One row a model and attack: norm, success rate and median distance over the images that the model classifies
    correctly, queries and gradients an image, seconds."""
    rows: list[dict[str, float | str | None]] = []
    for result in results:
        if result.attack == CLEAN or result.error is not None or not result.arrays:
            continue
        distances = result.arrays["distances"]
        attacked = distances[distances > 0]
        rows.append(
            {
                "model": result.model,
                "attack": result.attack,
                "norm": NORMS[cast(Norm, result.norm)].label,
                "success rate": float(np.isfinite(attacked).mean()) if len(attacked) else None,
                "median distance": float(np.median(attacked)) if len(attacked) else None,
                "queries per image": _mean(result, "queries"),
                "gradients per image": _mean(result, "gradients"),
                "seconds": result.seconds,
            }
        )
    return rows


def _mean(result: Result, what: str) -> float:
    return float(result.arrays[what].mean()) if result.arrays and len(result.arrays[what]) else 0.0


def format_value(column: str, value: float | str | None) -> str:
    """A cell as it is printed; an empty one says that nothing was measured."""
    if value is None:
        return "failed"
    if isinstance(value, str):
        return value
    if "accuracy" in column or "rate" in column:
        return f"{100 * value:.1f} %" if value < 0.9995 or value == 1.0 else f"{100 * value:.2f} %"
    if column in ("images", "queries per image", "gradients per image", "seconds"):
        return f"{value:.0f}"
    if "radius" in column:
        return f"{value:.3f}"
    return "none found" if np.isinf(value) else f"{value:.3g}"


def write_csv(rows: Sequence[dict[str, float | str | None]], path: str | Path) -> None:
    """The rows at full precision; the file is replaced as a whole."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replace_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
