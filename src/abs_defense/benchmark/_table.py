"""The tables of an evaluation: robustness by norm and model, models, attacks; as text, CSV and LaTeX."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor

from abs_defense._files import replace_atomically
from abs_defense.benchmark._published import PUBLISHED, PUBLISHED_BOUND
from abs_defense.benchmark._runner import Result
from abs_defense.benchmark._suite import CLEAN, DISTAL, NORMS
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet

Row = dict[str, float | str | None]


def found_adversarials(
    results: Sequence[Result], model: str, norm: Norm, data: ImageSet
) -> tuple[list[Result], npt.NDArray[Any]] | None:
    """Every attack on a model, whatever it was made for, with its distances in one norm, ``(attacks, images)``: an
    adversarial is one in every norm. None if no attack was made for that norm."""
    attacks = [r for r in results if r.model == model and "distances" in r.arrays]
    if not any(r.norm == norm for r in attacks):
        return None
    return attacks, np.stack([_distances(r, norm, data) for r in attacks])


def _distances(result: Result, norm: Norm, data: ImageSet) -> npt.NDArray[Any]:
    own = result.arrays["distances"]
    if result.norm == norm:
        return own
    adversarials = torch.from_numpy(result.arrays["adversarials"])
    measured: Tensor = NORMS[norm].distance(data.images, adversarials)
    return np.where(np.isfinite(own) & (own > 0), measured.numpy(), own)


def of_certificates(results: Sequence[Result], model: str, norm: str) -> list[Result]:
    """The certificates of a model in a norm that gave radii."""
    return [r for r in results if r.model == model and r.norm == norm and "radius" in r.arrays]


def smallest_distances(results: Sequence[Result], model: str, norm: Norm, data: ImageSet) -> npt.NDArray[Any] | None:
    """Per image the smallest distance of all adversarials found, by whatever attack (infinity where none succeeded);
    None if no attack was made for that norm."""
    found = found_adversarials(results, model, norm, data)
    return None if found is None else found[1].min(axis=0)


def largest_radii(results: Sequence[Result], model: str, norm: str) -> npt.NDArray[Any] | None:
    """Per image the largest certified radius over all certificates of a norm, None if there are none."""
    found = [r.arrays["radius"] for r in of_certificates(results, model, norm)]
    return np.max(found, axis=0) if found else None


def robustness_rows(results: Sequence[Result], data: ImageSet, kinds: Mapping[str, str]) -> list[Row]:
    """One row a norm and model: the clean accuracy; the median distance and the accuracy left at the paper's threshold
    (1.5, 0.3, 12 pixels) under all attacks together, those made for another norm included; the attack that is strongest
    most often; queries and gradients an image over all attacks; mean radius and certified accuracy at the threshold;
    what the paper reports for a model of that kind.

    Distances are in pixel values of [0, 1] for L2 and L-infinity, in pixels for L0. A misclassified image has
    distance 0. An image counts as robust at a threshold if its smallest adversarial distance is larger.
    """
    rows: list[Row] = []
    for norm, spec in NORMS.items():
        for model in dict.fromkeys(r.model for r in results):
            ran = [r for r in results if r.model == model and r.norm == norm]
            if not ran or not len(data):
                continue
            row: Row = {"norm": spec.label, "model": model, "images": len(data), "threshold": f"{spec.threshold:g}"}
            clean = _clean_accuracy(results, model, data)
            if clean is not None:
                row["clean accuracy"] = clean
            attacks, distances = found_adversarials(results, model, norm, data) or ([], None)
            smallest = None if distances is None else distances.min(axis=0)
            row["median distance"] = None if smallest is None else float(np.median(smallest))
            row["accuracy at threshold"] = None if smallest is None else float((smallest > spec.threshold).mean())
            row["strongest attack"] = "" if distances is None else _strongest(attacks, distances)
            row["queries per image"] = sum(_mean(r, "queries") for r in attacks)
            row["gradients per image"] = sum(_mean(r, "gradients") for r in attacks)
            radii = largest_radii(results, model, norm)
            if radii is not None:
                certificates = of_certificates(results, model, norm)
                proved = all(bool(r.arrays["proved"].all()) for r in certificates)
                row["mean certified radius"] = float(radii.mean())
                row["certified accuracy at threshold"] = float(certified(radii, spec.threshold, norm).mean())
                row["certificate"] = "proved" if proved else "estimated"
            published = PUBLISHED.get(kinds.get(model, ""), {}).get(norm)
            if published is not None:
                row["published median"] = published.median
                row["published accuracy"] = published.accuracy
            bound = PUBLISHED_BOUND.get(kinds.get(model, ""))
            if norm == "l2" and bound is not None:
                row["published mean bound"] = bound
            rows.append(row)
    return rows


def model_rows(results: Sequence[Result], data: ImageSet, kinds: Mapping[str, str]) -> list[Row]:
    """One row a model: clean accuracy, median confidence, the published accuracy, who was fooled by noise with 90 %
    confidence, seconds over all measurements."""
    labels = data.labels.numpy()
    rows: list[Row] = []
    for model in dict.fromkeys(r.model for r in results):
        own = {r.attack: r for r in results if r.model == model}
        row: Row = {"model": model, "images": len(labels)}
        clean = own.get(CLEAN.name)
        if clean is not None and len(labels):
            done = "predictions" in clean.arrays
            row["clean accuracy"] = _clean_accuracy(results, model, data)
            row["median confidence"] = float(np.median(clean.arrays["confidences"])) if done else None
        published = PUBLISHED.get(kinds.get(model, ""))
        if published is not None:
            row["published accuracy"] = next(iter(published.values())).clean
        distal = own.get(DISTAL.name)
        if distal is not None and "fooled" in distal.arrays:
            fooled = distal.arrays["fooled"]
            row["fooled by noise"] = f"{int(fooled.sum())} of {len(fooled)}"
        row["seconds"] = sum(r.seconds for r in own.values())
        rows.append(row)
    return rows


def attack_rows(results: Sequence[Result]) -> list[Row]:
    """One row a model and attack: norm, success rate and median distance over the images that the model classifies
    correctly (if there are any), queries and gradients an image, seconds."""
    rows: list[Row] = []
    for result in results:
        if "distances" not in result.arrays:
            continue
        distances = result.arrays["distances"]
        attacked = distances[distances > 0]
        row: Row = {"model": result.model, "attack": result.attack, "norm": NORMS[cast(Norm, result.norm)].label}
        if len(attacked):
            row["success rate"] = float(np.isfinite(attacked).mean())
            row["median distance"] = float(np.median(attacked))
        row["queries per image"] = _mean(result, "queries")
        row["gradients per image"] = _mean(result, "gradients")
        row["seconds"] = result.seconds
        rows.append(row)
    return rows


def _clean_accuracy(results: Sequence[Result], model: str, data: ImageSet) -> float | None:
    """None if it was not measured, or failed."""
    for result in results:
        if result.model == model and result.attack == CLEAN.name and "predictions" in result.arrays and len(data):
            return float((result.arrays["predictions"] == data.labels.numpy()).mean())
    return None


def certified(radii: npt.NDArray[np.float64], threshold: float, norm: Norm) -> npt.NDArray[np.bool_]:
    """Which images no perturbation of norm at most ``threshold`` takes to another class."""
    return radii >= threshold if norm == "l0" else radii > threshold


def _strongest(attacks: Sequence[Result], distances: npt.NDArray[Any]) -> str:
    smallest = distances.min(axis=0)
    attacked = distances[:, (smallest > 0) & np.isfinite(smallest)]
    wins = Counter(attacks[i].attack for i in attacked.argmin(axis=0))
    return wins.most_common(1)[0][0] if wins else ""


def _mean(result: Result, what: str) -> float:
    return float(result.arrays[what].mean()) if len(result.arrays[what]) else 0.0


def format_value(column: str, value: float | str | None) -> str:
    """A cell as it is printed."""
    if value is None:
        return "no result"
    if isinstance(value, str):
        return value
    if "accuracy" in column or "rate" in column:
        return f"{100 * value:.1f} %" if value < 0.9995 or value == 1.0 else f"{100 * value:.2f} %"
    if column in ("images", "queries per image", "gradients per image", "seconds"):
        return f"{value:.0f}"
    if "radius" in column or "bound" in column:
        return f"{value:.3f}"
    return "none found" if np.isinf(value) else f"{value:.3g}"


def formatted(rows: Sequence[Mapping[str, float | str | None]]) -> list[dict[str, str]]:
    """The rows as they are printed, all with the same columns; an empty cell: nothing was measured."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{c: format_value(c, row[c]) if c in row else "" for c in columns} for row in rows]


def write_table(rows: Sequence[Row], folder: Path, name: str) -> None:
    """``name.csv`` at full precision, ``name.txt`` and ``name.tex`` (booktabs) as printed."""
    write_csv(rows, folder / f"{name}.csv")
    for ending, style in {"txt": "simple", "tex": "latex_booktabs"}.items():
        with replace_atomically(folder / f"{name}.{ending}") as path:
            text = tabulate(formatted(rows), headers="keys", tablefmt=style, disable_numparse=True)
            if ending == "tex":
                text = text.replace("L∞", r"$L_\infty$")
            path.write_text(text + "\n")


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """The rows at full precision; the file is replaced as a whole."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replace_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
