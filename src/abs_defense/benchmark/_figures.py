"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from abs_defense._files import replace_atomically
from abs_defense.benchmark._plan import NORMS
from abs_defense.benchmark._runner import CLEAN, Result
from abs_defense.benchmark._table import smallest_distances
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet
from abs_defense.inference import Inference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 10


def reconstruction_figure(title: str, images: Tensor, labels: Tensor, inference: Inference) -> Figure:
    """Digits beside every class's reconstruction with its energy; green: the prediction, red: a wrong one."""
    from matplotlib.figure import Figure

    rows, classes = len(images), inference.energy.shape[1]
    figure = Figure(figsize=(0.85 * (classes + 1), 1.0 * rows + 0.9), layout="constrained")
    figure.suptitle(f"{title}: the image, and each class's best explanation with its energy in nats", fontsize=10)
    axes = figure.subplots(rows, classes + 1, squeeze=False)
    for i in range(rows):
        predicted, label = int(inference.prediction[i]), int(labels[i])
        _show(axes[i, 0], images[i, 0], f"label {label}")
        for c in range(classes):
            axis: Axes = axes[i, c + 1]
            color = ("tab:green" if predicted == label else "tab:red") if c == predicted else "black"
            _show(axis, inference.reconstructions[i, c, 0], f"{c}: {inference.energy[i, c]:.1f}", color)
    return figure


def adversarial_figure(results: Sequence[Result], data: ImageSet) -> Figure | None:
    """Per model and norm the smallest adversarials found, below the originals; None if no attack was run."""
    from matplotlib.figure import Figure

    rows = []
    for model in dict.fromkeys(r.model for r in results):
        for norm, spec in NORMS.items():
            own = [r for r in results if r.model == model and r.norm == norm and r.error is None and r.arrays]
            if own:
                rows.append((f"{model}\n{spec.label}", own))
    columns = min(MAX_COLUMNS, len(data))
    if not rows or not columns:
        return None
    figure = Figure(figsize=(0.85 * columns + 1.2, 1.05 * (len(rows) + 1)), layout="constrained")
    figure.suptitle("Smallest adversarials found, with their distances", fontsize=10)
    axes = figure.subplots(len(rows) + 1, columns, squeeze=False)
    for j in range(columns):
        _show(axes[0, j], data.images[j, 0], str(int(data.labels[j])))
    _label(axes[0, 0], "original")
    for i, (name, own) in enumerate(rows, start=1):
        distances = np.stack([r.arrays["distances"][:columns] for r in own])
        best = distances.argmin(axis=0)
        for j in range(columns):
            distance = distances[best[j], j]
            image = own[best[j]].arrays["adversarials"][j, 0] if np.isfinite(distance) else np.ones((28, 28))
            _show(axes[i, j], image, f"{distance:.3g}" if np.isfinite(distance) else "none")
        _label(axes[i, 0], name)
    return figure


def curve_figure(results: Sequence[Result], data: ImageSet) -> Figure | None:
    """Accuracy against the size of the perturbation, a panel a norm; None if no attack was run."""
    from matplotlib.figure import Figure

    norms = [norm for norm in NORMS if any(r.norm == norm and r.error is None for r in results)]
    if not norms:
        return None
    figure = Figure(figsize=(4.2 * len(norms), 3.4), layout="constrained")
    panels = figure.subplots(1, len(norms), squeeze=False)[0]
    for axis, norm in zip(panels, norms, strict=True):
        largest = NORMS[norm].threshold
        for model in dict.fromkeys(r.model for r in results if r.attack == CLEAN):
            distances = smallest_distances(results, model, norm)
            if distances is None or not len(distances):
                continue
            finite = np.sort(distances[np.isfinite(distances)])
            accuracy = 1.0 - np.arange(1, len(finite) + 1) / len(distances)
            start = 1.0 - float((distances == 0).mean())
            axis.step(np.r_[0.0, finite], 100 * np.r_[start, accuracy], where="post", label=model)
            largest = max(largest, float(finite.max(initial=0.0)))
        axis.axvline(NORMS[norm].threshold, color="0.6", linestyle=":", linewidth=1)
        axis.set(xlabel=f"{NORMS[norm].label} distance", ylim=(0, 102), xlim=(0, 1.05 * largest))
        axis.set_title(f"{NORMS[norm].label} (dotted: the paper's threshold)", fontsize=9)
    panels[0].set_ylabel("accuracy left (%)")
    panels[0].legend(fontsize=8)
    return figure


def certified_figure(radii: Mapping[str, npt.NDArray[np.float64]], norm: Norm, method: str) -> Figure | None:
    """Certified accuracy against the radius, a line a model; None if there are no images."""
    from matplotlib.figure import Figure

    if not any(len(values) for values in radii.values()):
        return None
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    largest = NORMS[norm].threshold
    for model, values in radii.items():
        finite = np.sort(values[np.isfinite(values)])
        left = 1.0 - np.arange(1, len(finite) + 1) / len(values)
        axis.step(np.r_[0.0, finite], 100 * np.r_[1.0 - float((values == 0).mean()), left], where="post", label=model)
        largest = max(largest, float(finite.max(initial=0.0)))
    axis.axvline(NORMS[norm].threshold, color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel=f"{NORMS[norm].label} radius", ylabel="certified accuracy (%)", ylim=(0, 102))
    axis.set_xlim(0, 1.05 * largest)
    axis.set_title(f"method: {method} (dotted: the paper's threshold)", fontsize=9)
    axis.legend(fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG; it appears whole or not at all."""
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _show(axis: Axes, image: object, title: str, color: str = "black") -> None:
    axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=7, color=color, pad=2)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=0.5 if color == "black" else 2.5)


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
