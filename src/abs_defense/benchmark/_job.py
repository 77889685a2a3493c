"""The main job: evaluate, then write tables, pictures and the report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense._versions import versions
from abs_defense.benchmark._figures import (
    adversarial_figure,
    curve_figure,
    distal_figure,
    path_figure,
    reconstruction_figure,
    save_figure,
)
from abs_defense.benchmark._measure import device_of
from abs_defense.benchmark._published import Curve
from abs_defense.benchmark._report import ReportFigure, write_report
from abs_defense.benchmark._runner import Executor, Plan, Result, make_plan, run_plan
from abs_defense.benchmark._suite import Measurement, ModelSpec
from abs_defense.benchmark._table import Row, attack_rows, model_rows, of_attacks, robustness_rows, write_table
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet
from abs_defense.inference import Inference
from abs_defense.models import ABS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_IMAGES = 10
_PATH_POINTS = 13


@dataclass(frozen=True)
class Evaluation:
    """What ``run_evaluation`` found and wrote.

    Attributes:
        robustness: one row a norm and model.
        models: one row a model.
        attacks: one row a model and attack.
        report: the HTML file.
        errors: the pieces that failed.
    """

    robustness: list[Row]
    models: list[Row]
    attacks: list[Row]
    report: Path
    errors: list[str]


def run_evaluation(
    models: Sequence[ModelSpec],
    measurements: Sequence[Measurement],
    data: ImageSet,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    executor: Executor | None = None,
    curves: Mapping[tuple[str, Norm], Curve] | None = None,
    command: str = "",
    progress: bool = True,
) -> Evaluation:
    """Evaluate models and write into ``out``: ``report.html``; the tables ``robustness``, ``models`` and ``attacks``
    as ``.csv``, ``.txt`` and ``.tex``; ``figures/`` as PNG and PDF; ``manifest.json``; ``pieces/`` with all distances
    and images.

    Args:
        models: see ``our_model``; any module of images in [0, 1] that returns logits serves.
        measurements: see ``choose_measurements``.
        data: images and labels.
        out: folder; made if missing. Finished pieces in it are kept and used.
        device: where to compute.
        seed: of the attacks.
        executor: see ``run_plan`` and ``ray_executor``.
        curves: published ones, see ``load_curves``.
        command: the command line, for the report.
        progress: show a progress bar.

    Raises:
        ValueError: bad weights, or labels that a model does not have.
        OSError: the folder cannot be written.
    """
    folder = require_writable_folder(out)
    plan = make_plan(models, measurements, data, folder, device=device, seed=seed)
    results = run_plan(plan, executor=executor, progress=progress)
    kinds = {spec.name: spec.kind for spec in models}
    tables = {
        "robustness": robustness_rows(results, data, kinds),
        "models": model_rows(results, data, kinds),
        "attacks": attack_rows(results),
    }
    for name, rows in tables.items():
        write_table(rows, folder, name)
    manifest = {
        "data": {"name": data.name, "images": len(data), "sha256": data.sha256()},
        "models": {piece.model.name: piece.key.model_settings for piece in plan.pieces},
        "measurements": {m.name: {"norm": m.norm, **m.identity()} for m in measurements},
        "seed": seed,
        "device": str(device),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    with replace_atomically(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=2, default=str) + "\n")
    errors = [error for result in results for error in result.errors]
    figures = []
    pictures = require_writable_folder(folder / "figures")
    for name, title, figure in _figures(plan, results, data, kinds, curves):
        if figure is not None:
            save_figure(figure, pictures / f"{name}.png")
            figures.append(ReportFigure(title, pictures / f"{name}.png"))
    write_report(folder / "report.html", **tables, figures=figures, manifest=manifest, errors=errors)
    return Evaluation(**tables, report=folder / "report.html", errors=errors)


def _figures(
    plan: Plan,
    results: Sequence[Result],
    data: ImageSet,
    kinds: Mapping[str, str],
    curves: Mapping[tuple[str, Norm], Curve] | None,
) -> Iterator[tuple[str, str, Figure | None]]:
    yield "curves", "Accuracy against the size of the perturbation", curve_figure(results, data, kinds, curves)
    for name in plan.models:
        yield f"adversarials-{name}", f"Smallest adversarials of {name}", adversarial_figure(name, results, name, data)
    yield "distal", "Distal adversarials", distal_figure(results)
    shown = data.head(FIGURE_IMAGES)
    for name, model in plan.models.items():
        if not isinstance(model, ABS) or not len(shown):
            continue
        way = _way(results, name, data)
        if way is not None:
            index, fractions, images = way
            title = f"{name}: from image {index} to its smallest L2 adversarial"
            figure = path_figure(title, fractions, images, _infer(model, images), int(data.labels[index]))
            yield f"path-{name}", f"The way of an attack on {name}", figure
        figure = reconstruction_figure(name, shown.images, shown.labels, _infer(model, shown.images))
        yield f"reconstructions-{name}", f"Reconstructions of {name}", figure


def _way(results: Sequence[Result], model: str, data: ImageSet) -> tuple[int, list[float], torch.Tensor] | None:
    """The first image with an L2 adversarial, and images on the line to the smallest one."""
    attacks = of_attacks(results, model, "l2")
    if not attacks:
        return None
    distances = np.stack([r.arrays["distances"] for r in attacks])
    smallest = distances.min(0)
    attacked = np.flatnonzero((smallest > 0) & np.isfinite(smallest))
    if not len(attacked):
        return None
    index = int(attacked[0])
    end = torch.from_numpy(attacks[int(distances[:, index].argmin())].arrays["adversarials"][index])
    fractions = np.linspace(0.0, 1.0, _PATH_POINTS).tolist()
    images = torch.stack([torch.lerp(data.images[index], end.to(data.images), fraction) for fraction in fractions])
    return index, fractions, images


def _infer(model: ABS, images: torch.Tensor) -> Inference:
    inference = model.infer(images.to(device_of(model)))
    fields: dict[str, Any] = {key: value.cpu() for key, value in asdict(inference).items()}
    return Inference(**fields)
