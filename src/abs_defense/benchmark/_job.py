"""The main job: evaluate, then write table, pictures and report."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import Module

from abs_defense._files import require_writable_folder
from abs_defense._versions import versions
from abs_defense.benchmark._figures import (
    adversarial_figure,
    curve_figure,
    reconstruction_figure,
    save_figure,
)
from abs_defense.benchmark._plan import AttackSpec
from abs_defense.benchmark._report import ReportFigure, write_report
from abs_defense.benchmark._runner import Result, evaluate
from abs_defense.benchmark._table import attack_rows, table_rows, write_csv
from abs_defense.data import ImageSet
from abs_defense.models import ABS, load_model

FIGURE_IMAGES = 10


@dataclass(frozen=True)
class Evaluation:
    """What ``run_evaluation`` found and wrote.

    Attributes:
        rows: of the table, one a model.
        attacks: of the second table, one a model and attack.
        report: the HTML file.
        errors: the pieces that failed.
    """

    rows: list[dict[str, float | str | None]]
    attacks: list[dict[str, float | str | None]]
    report: Path
    errors: list[str]


def run_evaluation(
    models: Sequence[str],
    attacks: Sequence[AttackSpec],
    data: ImageSet,
    out: str | Path,
    *,
    weights: str | Path = "mnist",
    device: str | torch.device = "cpu",
    seed: int = 0,
    command: str = "",
    progress: bool = True,
) -> Evaluation:
    """Evaluate models by name and write ``table.csv``, ``attacks.csv``, PNG figures and ``report.html`` into ``out``.

    Args:
        models: names for ``load_model``.
        attacks: to run; none for clean figures only.
        data: images and labels.
        out: folder; made if missing. Finished pieces in it are kept and used.
        weights: for all models, as for ``ABS``.
        device: where to compute.
        seed: of the prototypes and the attacks.
        command: the command line, for the report.
        progress: show progress bars.

    Raises:
        ValueError: unknown model, bad weights, or labels that the models don't have.
        OSError: the folder cannot be written.
    """
    folder = require_writable_folder(out)
    loaded: dict[str, ABS] = {}

    def load(name: str) -> ABS:
        loaded[name] = load_model(name, weights=weights, seed=seed)
        return loaded[name]

    factories = {name: partial(load, name) for name in models}
    results = evaluate(factories, attacks, data, folder, device=device, seed=seed, progress=progress)
    rows = table_rows(results, data)
    write_csv(rows, folder / "table.csv")
    attack_table = attack_rows(results)
    write_csv(attack_table, folder / "attacks.csv")
    errors = [f"{r.model}: {r.attack} failed on {r.error}" for r in results if r.error is not None]
    manifest = {
        "data": {"name": data.name, "images": len(data), "sha256": data.sha256()},
        "models": {name: str(model.extra_repr()) for name, model in loaded.items()},
        "weights": str(weights),
        "weights_sha256": {name: model.weights_sha256() for name, model in loaded.items()},
        "attacks": {a.name: {"norm": a.norm, "class": a.factory.__name__, **a.settings} for a in attacks},
        "seed": seed,
        "device": str(device),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    figures = _figures(folder, results, data, loaded)
    write_report(folder / "report.html", rows, attack_table, figures, manifest, errors)
    return Evaluation(rows, attack_table, folder / "report.html", errors)


def _figures(folder: Path, results: list[Result], data: ImageSet, models: dict[str, ABS]) -> list[ReportFigure]:
    figures = []
    for file, title, figure in (
        ("curves.png", "Accuracy against the size of the perturbation", curve_figure(results, data)),
        ("adversarials.png", "Smallest adversarials", adversarial_figure(results, data)),
    ):
        if figure is not None:
            save_figure(figure, folder / file)
            figures.append(ReportFigure(title, folder / file))
    shown = data.head(FIGURE_IMAGES)
    for name, model in models.items():
        if not len(shown):
            break
        inference = model.infer(shown.images.to(_device(model)))
        inference = type(inference)(**{key: value.cpu() for key, value in asdict(inference).items()})
        path = folder / f"reconstructions-{name}.png"
        save_figure(reconstruction_figure(name, shown.images, shown.labels, inference), path)
        figures.append(ReportFigure(f"Reconstructions of {name}", path))
    return figures


def _device(model: Module) -> torch.device:
    return next(model.parameters()).device
