"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from abs_defense._files import replace_atomically
from abs_defense.benchmark._published import PUBLISHED, Curve
from abs_defense.benchmark._runner import Result
from abs_defense.benchmark._suite import NORMS
from abs_defense.benchmark._table import found_adversarials, largest_radii, smallest_distances
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet
from abs_defense.inference import Inference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 10
_SHOWN_THRESHOLDS = 4


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


def adversarial_figure(title: str, results: Sequence[Result], model: str, data: ImageSet) -> Figure | None:
    """The smallest adversarials of one model, a row a norm, below the originals; None if no attack was run."""
    from matplotlib.figure import Figure

    rows = [
        (spec.label, found) for norm, spec in NORMS.items() if (found := found_adversarials(results, model, norm, data))
    ]
    columns = min(MAX_COLUMNS, len(data))
    if not rows or not columns:
        return None
    figure = Figure(figsize=(0.85 * columns + 1.2, 1.05 * (len(rows) + 1)), layout="constrained")
    figure.suptitle(f"{title}: smallest adversarials found, with their distances", fontsize=10)
    axes = figure.subplots(len(rows) + 1, columns, squeeze=False)
    for j in range(columns):
        _show(axes[0, j], data.images[j, 0], str(int(data.labels[j])))
    _label(axes[0, 0], "original")
    for i, (name, (attacks, distances)) in enumerate(rows, start=1):
        best = distances.argmin(axis=0)
        for j in range(columns):
            distance = distances[best[j], j]
            image = attacks[best[j]].arrays["adversarials"][j, 0] if np.isfinite(distance) else np.ones((28, 28))
            _show(axes[i, j], image, f"{distance:.3g}" if np.isfinite(distance) else "none")
        _label(axes[i, 0], name)
    return figure


def curve_figure(
    results: Sequence[Result],
    data: ImageSet,
    kinds: Mapping[str, str] | None = None,
    curves: Mapping[tuple[str, Norm], Curve] | None = None,
) -> Figure | None:
    """Accuracy against the size of the perturbation, a panel a norm; None if no attack was run.

    Solid: ours. Dashed: certified. Behind them, for models of a kind that the paper has: its curve, where ``curves``
    has it, else crosses at its median and at its threshold.
    """
    from matplotlib.figure import Figure

    kinds = kinds or {}
    norms = [norm for norm in NORMS if any(r.norm == norm and "distances" in r.arrays for r in results)]
    if not norms or not len(data):
        return None
    figure = Figure(figsize=(4.4 * len(norms), 3.6), layout="constrained")
    panels = figure.subplots(1, len(norms), squeeze=False)[0]
    for axis, norm in zip(panels, norms, strict=True):
        threshold = largest = NORMS[norm].threshold
        for number, model in enumerate(dict.fromkeys(r.model for r in results)):
            distances = smallest_distances(results, model, norm, data)
            if distances is None:
                continue
            color = f"C{number}"
            largest = max(largest, _accuracy_left(axis, distances, color, model))
            radii = largest_radii(results, model, norm)
            if radii is not None:
                _accuracy_left(axis, _first_open(radii, norm), color, None, linestyle="--")
            curve = (curves or {}).get((kinds.get(model, ""), norm))
            published = PUBLISHED.get(kinds.get(model, ""), {}).get(norm)
            if curve is not None:
                axis.plot(curve[0], 100 * np.array(curve[1]), color=color, linewidth=4, alpha=0.25)
            elif published is not None:
                points = [(published.median, 50.0), (threshold, 100 * published.accuracy)]
                axis.plot(*zip(*points, strict=True), "x", color=color, alpha=0.6)
        axis.axvline(threshold, color="0.6", linestyle=":", linewidth=1)
        shown = min(1.05 * largest, _SHOWN_THRESHOLDS * threshold)
        axis.set(xlabel=f"{NORMS[norm].label} distance", ylim=(0, 102), xlim=(0, shown))
        axis.set_title(NORMS[norm].label, fontsize=9)
    panels[0].set_ylabel("accuracy left (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    behind = "wide, pale: published" if curves else "crosses: published"
    figure.suptitle(f"solid: under attack; dashed: certified; {behind}; dotted: the paper's threshold", fontsize=8)
    return figure


def _first_open(radii: npt.NDArray[np.float64], norm: Norm) -> npt.NDArray[np.float64]:
    """The least distance at which each image is no longer certified: a radius of k pixels covers k pixels."""
    return radii + (radii > 0) if norm == "l0" else radii


def _accuracy_left(
    axis: Axes, distances: npt.NDArray[Any], color: str, label: str | None, linestyle: str = "-"
) -> float:
    """Draw one curve; the largest finite distance."""
    finite = np.sort(distances[np.isfinite(distances)])
    left = 1.0 - np.arange(1, len(finite) + 1) / len(distances)
    start = 1.0 - float((distances == 0).mean())
    x, y = np.r_[0.0, finite], 100 * np.r_[start, left]
    axis.step(x, y, where="post", label=label, color=color, linestyle=linestyle, linewidth=1.4)
    return float(finite.max(initial=0.0))


def distal_figure(results: Sequence[Result]) -> Figure | None:
    """Who is sure of garbage: a row a model, its distal adversarials with class and confidence; None if none were
    tried."""
    from matplotlib.figure import Figure

    own = [r for r in results if "fooled" in r.arrays]
    if not own:
        return None
    columns = min(MAX_COLUMNS, len(own[0].arrays["fooled"]))
    figure = Figure(figsize=(1.1 * columns + 1.4, 1.25 * len(own) + 0.6), layout="constrained")
    figure.suptitle("Distal adversarials: from noise to 90 % confidence (red: reached)", fontsize=10)
    axes = figure.subplots(len(own), columns, squeeze=False)
    for i, result in enumerate(own):
        a = result.arrays
        for j in range(columns):
            title = f"{a['predictions'][j]}: {100 * a['confidences'][j]:.0f} %"
            _show(axes[i, j], a["adversarials"][j, 0], title, "tab:red" if a["fooled"][j] else "black")
        _label(axes[i, 0], result.model)
    return figure


def path_figure(title: str, fractions: Sequence[float], images: Tensor, inference: Inference, label: int) -> Figure:
    """What ABS sees on the way from an image to its adversarial: the energies of all classes, and the best explanation
    by the true class and by the class that wins at the end."""
    from matplotlib.figure import Figure

    rival = int(inference.prediction[-1])
    shown = range(0, len(images), max(1, len(images) // 6))
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(4, len(shown), height_ratios=(3, 1, 1, 1))
    axis = figure.add_subplot(grid[0, :])
    for c in range(inference.energy.shape[1]):
        color = "tab:green" if c == label else "tab:red" if c == rival else "0.75"
        axis.plot(fractions, inference.energy[:, c], color=color, label=f"class {c}" if c in (label, rival) else None)
    axis.set(xlabel="way to the adversarial", ylabel="energy (nats)")
    axis.legend(fontsize=8)
    for j, k in enumerate(shown):
        for row, (name, image) in enumerate(
            (
                ("image", images[k, 0]),
                (f"class {label}", inference.reconstructions[k, label, 0]),
                (f"class {rival}", inference.reconstructions[k, rival, 0]),
            ),
            start=1,
        ):
            panel = figure.add_subplot(grid[row, j])
            _show(panel, image, f"{100 * fractions[k]:.0f} %" if row == 1 else "")
            if j == 0:
                _label(panel, name)
    return figure


def certified_figure(radii: Mapping[str, npt.NDArray[np.float64]], norm: Norm, method: str) -> Figure | None:
    """Certified accuracy against the radius, a line a model; None if there are no images."""
    from matplotlib.figure import Figure

    if not any(len(values) for values in radii.values()):
        return None
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axis = figure.subplots()
    largest = NORMS[norm].threshold
    for number, (model, values) in enumerate(radii.items()):
        largest = max(largest, _accuracy_left(axis, _first_open(values, norm), f"C{number}", model))
    axis.axvline(NORMS[norm].threshold, color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel=f"{NORMS[norm].label} radius", ylabel="certified accuracy (%)", ylim=(0, 102))
    axis.set_xlim(0, 1.05 * largest)
    axis.set_title(f"method: {method} (dotted: the paper's threshold)", fontsize=9)
    axis.legend(fontsize=8)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG and a PDF beside it; each appears whole or not at all."""
    for kind in ("png", "pdf"):
        with replace_atomically(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind, dpi=110)


def _show(axis: Axes, image: object, title: str, color: str = "black") -> None:
    axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=7, color=color, pad=2)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=color, linewidth=0.5 if color == "black" else 2.5)


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
