"""The command line: parses and delegates."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from abs_defense.data import ImageSet, download_mnist, foolbox_digits, load_idx_dataset
from abs_defense.models import MODEL_NAMES, bundled_weights, load_card, load_weights, save_weights

app = typer.Typer(help="The Analysis-by-Synthesis classifier: evaluate, train, inspect.", no_args_is_help=True)
train_app = typer.Typer(help="Train models.", no_args_is_help=True)
app.add_typer(train_app, name="train")

DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the four IDX files of MNIST or a relative (gzip or raw).")
]
Download = Annotated[bool, typer.Option(help="Fetch MNIST (into the user's cache).")]
FirstImages = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
WeightsSource = Annotated[str, typer.Option(help="Bundled name, .safetensors file, or folder of ABS_*.net.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]


def main() -> None:
    """Run the command line; expected errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)


@app.command()
def evaluate(
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(MODEL_NAMES)}; may be repeated. Default: all.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    images: FirstImages = None,
    attacks: Annotated[bool, typer.Option(help="Run the attacks, or measure the clean accuracy only.")] = True,
    preset: Annotated[str, typer.Option(help="Which attacks: quick (foolbox's) or full (with ours).")] = "quick",
    attack: Annotated[list[str] | None, typer.Option(help="An attack of the presets by name; may be repeated.")] = None,
    weights: WeightsSource = "mnist",
    out: Annotated[Path, typer.Option(help="Folder for the report; a stopped run continues there.")] = Path(
        "abs-defense-report"
    ),
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Accuracy and robustness of the bundled models; by default on the 20 digits that foolbox ships."""
    from abs_defense.benchmark import choose_attacks, format_value, run_evaluation

    names = _model_names(model, MODEL_NAMES)
    data = _test_images(data_dir, download)
    result = run_evaluation(
        names,
        choose_attacks(preset, attack or ()) if attacks else (),
        data if images is None else data.head(images),
        out,
        weights=weights,
        device=_device(device),
        seed=seed,
        command=_command(),
    )
    console = Console()
    console.print(_models_table(f"{data.name}: the smallest distance over the attacks counts", result.rows))
    if result.attacks:
        details = Table(title="each attack, over the images classified correctly")
        for column in result.attacks[0]:
            is_name = column in ("model", "attack", "norm")
            details.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
        for row in result.attacks:
            details.add_row(*(format_value(column, value) for column, value in row.items()))
        console.print(details)
    for error in result.errors:
        console.print(f"[red]{_escape(error)}[/]")
    console.print(f"report: {_escape(str(result.report))}", soft_wrap=True)
    if result.errors:
        raise typer.Exit(1)


@app.command()
def certify(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(MODEL_NAMES)}; may be repeated. Default: prototype-abs."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    images: FirstImages = None,
    norm: Annotated[str, typer.Option(help="l2, linf or l0 (pixels).")] = "l2",
    method: Annotated[str, typer.Option(help="bisector, exact, lipschitz or paper.")] = "bisector",
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with prototypes of so many seeds: an error bar.")] = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Points of the true class tried, where radii are proved.")] = 20,
    starts: Annotated[int, typer.Option(min=1, help="Descents a class, where radii are estimated.")] = 4,
    weights: WeightsSource = "mnist",
    out: Annotated[Path, typer.Option(help="Folder for the results; a stopped run continues there.")] = Path(
        "abs-defense-certificates"
    ),
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Certified radii: how far images are from another class, at least; by default of foolbox's 20 digits."""
    from abs_defense.benchmark import run_certification
    from abs_defense.certificates import METHODS, NORM_NAMES

    names = _model_names(model, ("prototype-abs",))
    _require_choice(norm, NORM_NAMES, "--norm")
    _require_choice(method, METHODS, "--method")
    data = _test_images(data_dir, download)
    result = run_certification(
        names,
        data if images is None else data.head(images),
        out,
        norm=cast(Any, norm),
        method=cast(Any, method),
        seeds=seeds,
        anchors=anchors,
        starts=starts,
        weights=weights,
        device=_device(device),
        seed=seed,
        command=_command(),
    )
    console = Console()
    console.print(_models_table(f"{data.name}: certified radii", result.rows))
    console.print(f"results: {_escape(str(result.folder))}", soft_wrap=True)


@train_app.command("abs")
def train_abs_command(
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, losses and weights.")] = Path("abs-training"),
    download: Download = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Adam's, before its decay.")] = 3e-3,
    decay_from: Annotated[int, typer.Option(min=0, help="Epoch from which the learning rate falls (cosine).")] = 50,
    kl_epochs: Annotated[int, typer.Option(min=0, help="Epochs in which the KL weight falls from 10 to 1.")] = 50,
    encoder_epochs: Annotated[int, typer.Option(min=0, help="Epochs in which only the encoders learn.")] = 0,
    init: Annotated[
        Path | None, typer.Option(help="Start from a vaes.safetensors, from 'mnist' or from a file of ABS weights.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Light zoom, shear, skew, elastic distortion.")] = True,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Epochs between checkpoints.")] = 2,
    calibration_images: Annotated[int, typer.Option(min=1, help="Training images for alpha, eta, gamma.")] = 10_000,
    prototypes: Annotated[int, typer.Option(min=0, help="Prototypes a class to choose for prototype-abs.")] = 4000,
    test: Annotated[bool, typer.Option(help="Measure the accuracy on all test images at the end.")] = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """One VAE a class by the paper's recipe, then calibration. Continues in --out where it was stopped."""
    from abs_defense.training import VAETraining, train_abs

    train_set = _train_images(data_dir, download)
    test_set = None
    if test:
        test_set = download_mnist("test") if data_dir is None else load_idx_dataset(data_dir, "test")
    config = VAETraining(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay_from=decay_from,
        kl_epochs=kl_epochs,
        encoder_epochs=encoder_epochs,
        augment=augment,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    card = train_abs(
        train_set,
        out,
        config,
        init=init,
        test=test_set,
        calibration_images=calibration_images,
        prototypes=prototypes,
        device=_device(device),
        command=_command(),
    )
    Console().print_json(json.dumps(card))


@train_app.command("prototypes")
def train_prototypes_command(
    weights: WeightsSource = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    out: Annotated[Path, typer.Option(help="File for the weights with their prototypes.")] = Path("abs.safetensors"),
    count: Annotated[int, typer.Option(min=1, help="Prototypes a class.")] = 4000,
    samples: Annotated[int, typer.Option(min=1, help="Candidates drawn from the prior.")] = 8000,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Choose the prototypes of prototype-abs from the latents of the training images and samples of the prior."""
    from abs_defense.training import choose_prototypes

    loaded = load_weights(weights)
    latents = choose_prototypes(
        loaded, _train_images(data_dir, download), count, samples=samples, seed=seed, device=_device(device)
    )
    save_weights(out, replace(loaded, prototypes=latents))
    Console().print(f"weights: {_escape(str(out))}", soft_wrap=True)


@app.command()
def models() -> None:
    """The bundled weights and their cards."""
    console = Console()
    for name in bundled_weights():
        console.print(f"[bold]{name}[/]")
        console.print_json(json.dumps(load_card(name)))
    console.print(f"models: {', '.join(MODEL_NAMES)}")


def _train_images(data_dir: Path | None, download: bool) -> ImageSet:
    if data_dir is None and not download:
        raise typer.BadParameter("name a folder of IDX files, or pass --download", param_hint="--data-dir")
    return download_mnist("train") if data_dir is None else load_idx_dataset(data_dir, "train")


def _test_images(data_dir: Path | None, download: bool) -> ImageSet:
    if data_dir is not None:
        return load_idx_dataset(data_dir, "test")
    return download_mnist("test") if download else foolbox_digits()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} cannot be used: {error}", param_hint="--device") from error
    return device


def _model_names(chosen: list[str] | None, default: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(chosen or default))
    for name in names:
        _require_choice(name, MODEL_NAMES, "--model")
    return names


def _require_choice(value: str, choices: Sequence[str], option: str) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)


def _models_table(title: str, rows: Sequence[dict[str, float | str | None]]) -> Table:
    """A column a model."""
    from abs_defense.benchmark import format_value

    table = Table(title=title)
    table.add_column("")
    for row in rows:
        table.add_column(str(row["model"]), justify="right")
    for column in dict.fromkeys(column for row in rows for column in row):
        if column != "model":
            table.add_row(column, *(format_value(column, row[column]) if column in row else "" for row in rows))
    return table


def _command() -> str:
    return shlex.join(["abs-defense", *sys.argv[1:]])


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
