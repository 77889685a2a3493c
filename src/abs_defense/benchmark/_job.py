"""The main job: evaluate, then write tables, pictures and the report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from abs_defense.benchmark._published import Curve
from abs_defense.benchmark._report import ReportFigure, write_report
from abs_defense.benchmark._runner import (
    PIECES,
    Executor,
    Plan,
    Record,
    Result,
    computed_on,
    gather,
    make_plan,
    run_plan,
)
from abs_defense.benchmark._store import Store
from abs_defense.benchmark._suite import Measurement, ModelSpec
from abs_defense.benchmark._table import Row, attack_rows, found_adversarials, model_rows, robustness_rows, write_table
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet
from abs_defense.inference import Inference
from abs_defense.models import ABS, device_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_IMAGES = 10
PLAN, MANIFEST, IMAGES, FIGURES = "plan.json", "manifest.json", "images.npz", "figures"
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
    as ``.csv``, ``.txt`` and ``.tex``; ``figures/`` as PNG and PDF; ``manifest.json``; and ``plan.json``,
    ``images.npz`` and ``pieces/``, from which ``rebuild_report`` makes all the others.

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
    manifest = {
        "data": {"name": data.name, "images": len(data), "sha256": data.sha256()},
        "models": {piece.model.name: piece.key.model_settings for piece in plan.pieces},
        "measurements": {m.name: {"norm": m.norm, **m.identity()} for m in measurements},
        "seed": seed,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    for stale in (folder / FIGURES).glob("*"):
        stale.unlink()
    _write_json(folder / MANIFEST, manifest)
    _write_json(folder / PLAN, [asdict(piece.record) for piece in plan.pieces])
    with replace_atomically(folder / IMAGES) as path, path.open("wb") as file:
        np.savez_compressed(file, images=data.images.numpy(), labels=data.labels.numpy())
    results = run_plan(plan, executor=executor, progress=progress)
    kinds = {spec.name: spec.kind for spec in models}
    _draw(folder, _model_figures(plan, results, data))
    return _write(folder, results, data, kinds, manifest, curves)


def rebuild_report(out: str | Path, *, curves: Mapping[tuple[str, Norm], Curve] | None = None) -> Evaluation:
    """Write tables, figures and report of an evaluation anew from its finished pieces, computing nothing; also while it
    runs or after it was stopped. What is not finished is reported as such.

    Args:
        out: folder of ``run_evaluation``.
        curves: published ones, see ``load_curves``.

    Raises:
        FileNotFoundError: the folder holds no evaluation.
        OSError: the folder cannot be written.
    """
    folder = Path(out)
    found = read_evaluation(folder)
    require_writable_folder(folder)
    return _write(folder, found.results, found.data, found.kinds, found.manifest, curves)


@dataclass(frozen=True)
class Finished:
    """What is finished of an evaluation.

    Attributes:
        results: of every measurement that was planned.
        data: images and labels.
        kinds: of the models, by name.
        manifest: settings, versions, command.
    """

    results: list[Result]
    data: ImageSet
    kinds: dict[str, str]
    manifest: dict[str, Any]


def read_evaluation(folder: str | Path) -> Finished:
    """Read a folder of ``run_evaluation``, also while it runs or after it was stopped.

    Raises:
        FileNotFoundError: the folder holds no evaluation.
    """
    folder = Path(folder)
    missing = [name for name in (PLAN, MANIFEST, IMAGES) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no evaluation: {', '.join(missing)} not found")
    records = [Record(**raw) for raw in json.loads((folder / PLAN).read_text())]
    manifest = json.loads((folder / MANIFEST).read_text())
    with np.load(folder / IMAGES) as file:
        images, labels = (torch.from_numpy(file[name]) for name in ("images", "labels"))
    data = ImageSet(images, labels, manifest["data"]["name"])
    kinds = {record.model: record.kind for record in records}
    return Finished(gather(records, list(kinds), Store(folder / PIECES), data), data, kinds, manifest)


def _write(
    folder: Path,
    results: Sequence[Result],
    data: ImageSet,
    kinds: Mapping[str, str],
    manifest: Mapping[str, Any],
    curves: Mapping[tuple[str, Norm], Curve] | None,
) -> Evaluation:
    manifest = {**manifest, "hardware": computed_on(results)}
    _write_json(folder / MANIFEST, manifest)
    tables = {
        "robustness": robustness_rows(results, data, kinds),
        "models": model_rows(results, data, kinds),
        "attacks": attack_rows(results),
    }
    for name, rows in tables.items():
        write_table(rows, folder, name)
    errors = [error for result in results for error in result.errors]
    _draw(folder, _result_figures(results, data, kinds, curves))
    titles = {
        "curves": "Accuracy against the size of the perturbation",
        **{f"adversarials-{name}": f"Smallest adversarials of {name}" for name in kinds},
        "distal": "Distal adversarials",
        **{f"path-{name}": f"The way of an attack on {name}" for name in kinds},
        **{f"reconstructions-{name}": f"Reconstructions of {name}" for name in kinds},
    }
    paths = {title: folder / FIGURES / f"{name}.png" for name, title in titles.items()}
    figures = [ReportFigure(title, path) for title, path in paths.items() if path.is_file()]
    write_report(folder / "report.html", **tables, figures=figures, manifest=manifest, errors=errors)
    return Evaluation(**tables, report=folder / "report.html", errors=errors)


def _write_json(path: Path, content: Any) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def _draw(folder: Path, figures: Iterable[tuple[str, Figure | None]]) -> None:
    pictures = require_writable_folder(folder / FIGURES)
    for name, figure in figures:
        if figure is not None:
            save_figure(figure, pictures / f"{name}.png")
        else:
            for ending in ("png", "pdf"):
                (pictures / f"{name}.{ending}").unlink(missing_ok=True)


def _result_figures(
    results: Sequence[Result],
    data: ImageSet,
    kinds: Mapping[str, str],
    curves: Mapping[tuple[str, Norm], Curve] | None,
) -> Iterator[tuple[str, Figure | None]]:
    yield "curves", curve_figure(results, data, kinds, curves)
    for name in kinds:
        yield f"adversarials-{name}", adversarial_figure(name, results, name, data)
    yield "distal", distal_figure(results)


def _model_figures(plan: Plan, results: Sequence[Result], data: ImageSet) -> Iterator[tuple[str, Figure | None]]:
    """Those for which a model is asked."""
    shown = data.head(FIGURE_IMAGES)
    for name, model in plan.models.items():
        way = _way(results, name, data) if isinstance(model, ABS) else None
        path = reconstructions = None
        if isinstance(model, ABS) and len(shown):
            reconstructions = reconstruction_figure(name, shown.images, shown.labels, _infer(model, shown.images))
        if isinstance(model, ABS) and way is not None:
            index, fractions, images = way
            title = f"{name}: from image {index} to its smallest L2 adversarial"
            path = path_figure(title, fractions, images, _infer(model, images), int(data.labels[index]))
        yield f"path-{name}", path
        yield f"reconstructions-{name}", reconstructions


def _way(results: Sequence[Result], model: str, data: ImageSet) -> tuple[int, list[float], torch.Tensor] | None:
    """The first image with an L2 adversarial, and images on the line to the smallest one."""
    found = found_adversarials(results, model, "l2", data)
    if found is None:
        return None
    attacks, distances = found
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
