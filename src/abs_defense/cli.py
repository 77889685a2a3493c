"""The command line: parses and delegates."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from abs_defense.data import ImageSet, download_mnist, foolbox_digits, load_idx_dataset
from abs_defense.inference import Solver
from abs_defense.models import (
    ABS_NAMES,
    MODEL_NAMES,
    NEAREST_NEIGHBOR,
    available_models,
    bundled_baselines,
    bundled_weights,
    load_card,
    load_weights,
    save_weights,
)

if TYPE_CHECKING:
    from abs_defense.benchmark import Evaluation, Measurement, ModelSpec, Plan

app = typer.Typer(help="The Analysis-by-Synthesis classifier: evaluate, train, inspect.", no_args_is_help=True)
train_app = typer.Typer(help="Train models.", no_args_is_help=True)
app.add_typer(train_app, name="train")

DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the four IDX files of MNIST or a relative (gzip or raw).")
]
Download = Annotated[bool, typer.Option(help="Fetch MNIST (into the user's cache).")]
FirstImages = Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")]
WeightsSource = Annotated[str, typer.Option(help="Bundled name, .safetensors file, or folder of ABS_*.net.")]
Test = Annotated[bool, typer.Option(help="Measure the accuracy on all test images at the end.")]
BaselineOut = Annotated[Path | None, typer.Option(help="Folder for checkpoint and weights; default NAME-training.")]
AdversarySteps = Annotated[int | None, typer.Option(min=1, help="Steps of the adversary, for those that have one.")]
AdversaryStepSize = Annotated[float | None, typer.Option(help="Step of the adversary, in pixel values.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random.")]


def main() -> None:
    """Run the command line; expected errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)


@app.command()
def evaluate(
    model: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(MODEL_NAMES)}; may be repeated. Default: all bundled.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    images: FirstImages = None,
    attacks: Annotated[bool, typer.Option(help="Run the suite, or measure the clean accuracy only.")] = True,
    preset: Annotated[str, typer.Option(help="quick, paper, or full (the paper's and today's attacks).")] = "quick",
    attack: Annotated[list[str] | None, typer.Option(help="Only this one of the suite; may be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Not this one of the suite; may be repeated.")] = None,
    add: Annotated[
        Path | None,
        typer.Option(help=r"TOML file with \[\[models]] and \[\[attacks]] of your own; see docs/evaluation.md."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the ABS models (but certified-abs, which is then left out by default): bundled name, .safetensors "
            "file, or folder of ABS_*.net. With one --model that is a baseline: its .safetensors file."
        ),
    ] = None,
    solver: Annotated[
        str, typer.Option(help="Of latent descent: bfgs (ours, faster), or adam (the paper's).")
    ] = "bfgs",
    nearest_neighbor_data: Annotated[
        Path | None, typer.Option(help="Folder of IDX files: nearest-neighbor stores all its training images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report; a stopped run continues there.")] = Path(
        "abs-defense-report"
    ),
    curves: Annotated[Path | None, typer.Option(help="JSON file with the published curves, drawn behind ours.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its estimated cost.")] = False,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or 'local' to start one here.")] = None,
    cpus_per_piece: Annotated[int, typer.Option(min=1, help="Cores for a piece of work, with --ray.")] = 1,
    gpus_per_piece: Annotated[float, typer.Option(min=0.0, help="GPUs (or a fraction) for a piece, with --ray.")] = 0.0,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Accuracy and robustness of all models; by default on the 20 digits that foolbox ships."""
    from abs_defense.benchmark import (
        CLEAN,
        choose_measurements,
        load_additions,
        load_curves,
        make_plan,
        our_model,
        ray_executor,
        run_evaluation,
    )

    if add is not None:
        sys.path.insert(0, str(Path.cwd()))  # the modules that the file names
    added_models, added_attacks = load_additions(add) if add is not None else ([], [])
    usual = [n for n in available_models() if weights is None or n != "certified-abs"]
    names = [] if model is None and added_models else _model_names(model, usual)
    _require_choice(solver, get_args(Solver), "--solver")
    with_abs = any(name in ABS_NAMES for name in names)
    if weights is not None and not with_abs and len(names) != 1:
        raise typer.BadParameter("expected an ABS model, or a single baseline, that it is of", param_hint="--weights")
    if solver != "bfgs" and not with_abs:
        raise typer.BadParameter("is of ABS models, and none is among the models", param_hint="--solver")
    if nearest_neighbor_data is not None and NEAREST_NEIGHBOR not in names:
        raise typer.BadParameter(f"{NEAREST_NEIGHBOR} is not among the models", param_hint="--nearest-neighbor-data")
    if not attacks and (attack or skip):
        raise typer.BadParameter("there are no attacks with --no-attacks", param_hint="--attack or --skip")
    if ray is None and (cpus_per_piece > 1 or gpus_per_piece):
        raise typer.BadParameter("is for --ray", param_hint="--cpus-per-piece or --gpus-per-piece")
    models = [
        our_model(
            name,
            weights=weights if name in ABS_NAMES or not with_abs else None,
            solver=cast(Solver, solver),
            seed=seed,
        )
        for name in names
    ]
    if nearest_neighbor_data is not None:
        stored = {"name": NEAREST_NEIGHBOR, "weights": str(nearest_neighbor_data)}
        models = [replace(m, settings=stored) if m.kind == NEAREST_NEIGHBOR else m for m in models]
    models += added_models
    chosen = choose_measurements(preset, attack or (), skip=skip or (), added=added_attacks) if attacks else (CLEAN,)
    _require_served([m for m in chosen if m.name in (attack or ()) or m in added_attacks], models)
    data = _test_images(data_dir, download)
    data = data if images is None else data.head(images)
    if dry_run:
        _print_plan(make_plan(models, chosen, data, out, device=_device(device), seed=seed))
        return
    result = run_evaluation(
        models,
        chosen,
        data,
        out,
        device=_device(device),
        seed=seed,
        executor=None if ray is None else ray_executor(ray, cpus=cpus_per_piece, gpus=gpus_per_piece),
        curves=None if curves is None else load_curves(curves),
        command=_command(),
    )
    _print_evaluation(result)


def _require_served(wanted: Sequence[Measurement], models: Sequence[ModelSpec]) -> None:
    for measurement in wanted:
        if not any(measurement.serves(model.kind) for model in models):
            raise ValueError(
                f"attack {measurement.name!r} is for models of kind {', '.join(measurement.models)}; none is among "
                f"{', '.join(f'{m.name} (kind {m.kind})' for m in models)}. Another --preset may have it for all"
            )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of an evaluation.")] = Path("abs-defense-report"),
    curves: Annotated[Path | None, typer.Option(help="JSON file with the published curves, drawn behind ours.")] = None,
) -> None:
    """Tables and report of an evaluation from what is finished of it, computing nothing."""
    from abs_defense.benchmark import load_curves, rebuild_report

    _print_evaluation(rebuild_report(folder, curves=None if curves is None else load_curves(curves)))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Of evaluations of the same images.")],
    style: Annotated[
        str, typer.Option("--format", help="Of the tables: simple, github, latex_booktabs, tsv, ... (tabulate's).")
    ] = "simple",
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="ATTACK", help="Compare others of its norm with it, image by image; may be repeated."),
    ] = None,
) -> None:
    """Evaluations side by side: the paper's table, a column a model; models of one name, image by image; attacks too,
    with --against."""
    from tabulate import tabulate, tabulate_formats

    from abs_defense.benchmark import compare_evaluations

    _require_choice(style, tabulate_formats, "--format")
    comparison = compare_evaluations(folders, against or ())
    for rows in (comparison.table, comparison.pairs, comparison.against):
        if rows:
            typer.echo(tabulate(rows, headers="keys", tablefmt=style, disable_numparse=True) + "\n")
    compared = {row["against"] for row in comparison.against}
    for attack in dict.fromkeys(against or ()):
        if attack not in compared:
            typer.echo(f"--against {attack}: no other attack of its norm met a model that it met", err=True)


def _print_evaluation(result: Evaluation) -> None:
    console = _console()
    _print_rows(console, "models", result.models)
    for norm in dict.fromkeys(row["norm"] for row in result.robustness):
        rows = [row for row in result.robustness if row["norm"] == norm]
        hidden = {"norm", "threshold", "clean accuracy"}
        radii = {c for row in rows for c in row if "certif" in c or "bound" in c}
        title = f"{norm}: the smallest adversarial of each image counts; accuracy at {rows[0]['threshold']}"
        _print_rows(console, title, [{c: v for c, v in row.items() if c not in hidden | radii} for row in rows])
        certified = [row for row in rows if "certificate" in row]
        shown = [{c: v for c, v in row.items() if c == "model" or c in radii} for row in certified]
        _print_rows(console, f"{norm}: certified radii", shown)
    _print_rows(console, "each attack, over the images classified correctly", result.attacks)
    for error in result.errors:
        console.print(f"[red]no result: {_escape(error)}[/]")
    console.print(f"report: {_escape(str(result.report))}", soft_wrap=True)
    if result.errors:
        raise typer.Exit(1)


@app.command()
def certify(
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(ABS_NAMES)}; may be repeated. Default: prototype-abs."),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    images: FirstImages = None,
    norm: Annotated[str, typer.Option(help="l2, linf or l0 (pixels).")] = "l2",
    method: Annotated[str, typer.Option(help="bisector, exact, lipschitz or paper.")] = "bisector",
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with prototypes of so many seeds: an error bar.")] = 1,
    anchors: Annotated[int, typer.Option(min=1, help="Points of the true class tried, where radii are proved.")] = 20,
    starts: Annotated[int, typer.Option(min=1, help="Descents a class, where radii are estimated.")] = 4,
    weights: Annotated[
        str | None, typer.Option(help="Bundled name, .safetensors file, or folder of ABS_*.net; default: the model's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results; a stopped run continues there.")] = Path(
        "abs-defense-certificates"
    ),
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Certified radii: how far images are from another class, at least; by default of foolbox's 20 digits."""
    from abs_defense.benchmark import run_certification
    from abs_defense.certificates import METHODS, NORM_NAMES

    names = _model_names(model, ("prototype-abs",), ABS_NAMES)
    _require_choice(norm, NORM_NAMES, "--norm")
    _require_choice(method, METHODS, "--method")
    data = _test_images(data_dir, download)
    try:
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
    except RuntimeError as error:
        raise ValueError(str(error)) from error
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
    kl_epochs: Annotated[int, typer.Option(min=0, help="Epochs in which the KL weight falls from 10.")] = 50,
    kl_end: Annotated[float, typer.Option(min=0.0, help="KL weight after that.")] = 1.0,
    encoder_epochs: Annotated[int, typer.Option(min=0, help="Epochs in which only the encoders learn.")] = 0,
    init: Annotated[
        Path | None, typer.Option(help="Start from a vaes.safetensors, from 'mnist' or from a file of ABS weights.")
    ] = None,
    augment: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Probability of each of zoom, shear, skew, elastic distortion.")
    ] = 0.1,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Epochs between checkpoints.")] = 2,
    calibration_images: Annotated[int, typer.Option(min=1, help="Training images for alpha, eta, gamma.")] = 10_000,
    prototypes: Annotated[int, typer.Option(min=0, help="Prototypes a class to choose for prototype-abs.")] = 4000,
    test: Test = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """One VAE a class by the paper's recipe, then calibration. Continues in --out where it was stopped."""
    from abs_defense.training import VAETraining, train_abs

    train_set = _train_images(data_dir, download)
    test_set = _all_test_images(data_dir, download) if test else None
    config = VAETraining(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay_from=decay_from,
        kl_epochs=kl_epochs,
        kl_end=kl_end,
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


@train_app.command("average")
def train_average_command(
    weights: Annotated[list[str], typer.Argument(help="Files of ABS weights, as of runs that continue one another.")],
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for weights and card.")] = Path("abs-average"),
    download: Download = False,
    calibration_images: Annotated[int, typer.Option(min=1, help="Training images for alpha, eta, gamma.")] = 10_000,
    prototypes: Annotated[int, typer.Option(min=0, help="Prototypes a class to choose for prototype-abs.")] = 4000,
    test: Test = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """ABS whose decoders are the mean of others', calibrated. Continues in --out where it was stopped."""
    from abs_defense.training import average_abs

    card = average_abs(
        weights,
        _train_images(data_dir, download),
        out,
        test=_all_test_images(data_dir, download) if test else None,
        calibration_images=calibration_images,
        prototypes=prototypes,
        seed=seed,
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
    samples: Annotated[int, typer.Option(min=0, help="Candidates drawn from the prior.")] = 8000,
    copies: Annotated[int, typer.Option(min=0, help="Distorted copies of each training image.")] = 0,
    augment: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability of each kind of distortion.")] = 0.5,
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the KL term, also in prototype-abs.")] = 1.0,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Choose the prototypes of prototype-abs from the latents of the training images and samples of the prior."""
    from abs_defense.training import choose_prototypes

    chosen = choose_prototypes(
        load_weights(weights),
        _train_images(data_dir, download),
        count,
        samples=samples,
        copies=copies,
        augmentation=augment,
        beta=beta,
        seed=seed,
        device=_device(device),
    )
    save_weights(out, chosen)
    Console().print(f"weights: {_escape(str(out))}", soft_wrap=True)


def _add_network_command(name: str, description: str) -> None:
    def command(
        data_dir: DataDir = None,
        out: BaselineOut = None,
        download: Download = False,
        epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
        batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
        learning_rate: Annotated[float | None, typer.Option(help="Adam's, the highest of its cycle.")] = None,
        adversary_steps: AdversarySteps = None,
        adversary_step_size: AdversaryStepSize = None,
        test: Test = True,
        device: Device = "cpu",
        seed: Seed = 0,
    ) -> None:
        from abs_defense.training import RECIPES

        given: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "adversary_steps": adversary_steps,
            "adversary_step_size": adversary_step_size,
            "seed": seed,
        }
        recipe = replace(RECIPES[name], **{key: value for key, value in given.items() if value is not None})
        _train_baseline(name, data_dir, download, out, device, test, recipe=recipe)

    train_app.command(name, help=f"{description} Continues in --out where it was stopped.")(command)


_add_network_command("cnn", "The paper's CNN.")
_add_network_command("binary-cnn", "The paper's CNN on binarised images.")
_add_network_command("madry", "Madry et al.: L-infinity adversarial training at 0.3.")


@train_app.command("nearest-neighbor")
def train_nearest_neighbor_command(
    data_dir: DataDir = None,
    out: BaselineOut = None,
    download: Download = False,
    components: Annotated[int, typer.Option(min=1, help="Principal components kept of the images.")] = 50,
    test: Test = True,
    device: Device = "cpu",
) -> None:
    """Nearest neighbour on the training images, of which it keeps the first principal components."""
    _train_baseline("nearest-neighbor", data_dir, download, out, device, test, components=components)


@train_app.command("certified")
def train_certified_command(
    weights: WeightsSource = "mnist",
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, losses and weights.")] = Path("certified-training"),
    download: Download = False,
    prototypes: Annotated[int | None, typer.Option(min=1, help="Only the first so many prototypes a class.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Adam's, of the decoders; 0 leaves them.")] = 1e-4,
    latent_learning_rate: Annotated[float, typer.Option(help="Adam's, of the latents.")] = 3e-3,
    margin: Annotated[float, typer.Option(help="L2 radius up to which a larger one is rewarded.")] = 2.5,
    power: Annotated[float, typer.Option(help="Of the hinge; above 1, small radii count more.")] = 1.0,
    augment: Annotated[float, typer.Option(help="Probability of each kind of augmentation; 0 for none.")] = 0.0,
    test: Test = True,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Fine-tune decoders and prototypes for certified radii. Continues in --out where it was stopped."""
    from abs_defense.training import CertifiedTraining, train_certified_abs

    start = load_weights(weights)
    if prototypes is not None and start.prototypes is not None:
        start = replace(start, prototypes=start.prototypes[:, :prototypes])
    config = CertifiedTraining(
        epochs=epochs,
        learning_rate=learning_rate,
        latent_learning_rate=latent_learning_rate,
        margin=margin,
        power=power,
        augment=augment,
        seed=seed,
    )
    card = train_certified_abs(
        start,
        _train_images(data_dir, download),
        out,
        config,
        test=_all_test_images(data_dir, download) if test else None,
        device=_device(device),
        command=_command(),
    )
    Console().print_json(json.dumps(card))


@train_app.command("certified-average")
def train_certified_average_command(
    weights: Annotated[list[str], typer.Argument(help="Files of train certified that continue one another.")],
    share: Annotated[
        list[float] | None, typer.Option(help="Of each file, in order, with sum 1; default: equal.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    out: Annotated[Path, typer.Option(help="Folder for weights and card.")] = Path("certified-average"),
    test: Test = True,
    device: Device = "cpu",
) -> None:
    """The mean of fine-tunings for certified radii, of decoders and prototypes."""
    from abs_defense.training import average_certified_abs

    card = average_certified_abs(
        weights,
        out,
        shares=share,
        test=_all_test_images(data_dir, download) if test else None,
        device=_device(device),
        command=_command(),
    )
    Console().print_json(json.dumps(card))


def _train_baseline(
    name: str, data_dir: Path | None, download: bool, out: Path | None, device: str, test: bool, **settings: Any
) -> None:
    from abs_defense.training import train_baseline

    card = train_baseline(
        name,
        _train_images(data_dir, download),
        out or Path(f"{name}-training"),
        test=_all_test_images(data_dir, download) if test else None,
        device=_device(device),
        command=_command(),
        **settings,
    )
    Console().print_json(json.dumps(card))


@app.command()
def models() -> None:
    """The bundled weights and their cards."""
    console = Console()
    for name in (*bundled_weights(), *bundled_baselines()):
        console.print(f"[bold]{name}[/]")
        console.print_json(json.dumps(load_card(name)))
    console.print(f"models: {', '.join(MODEL_NAMES)}")


def _train_images(data_dir: Path | None, download: bool) -> ImageSet:
    _require_source(data_dir, download)
    return download_mnist("train") if data_dir is None else load_idx_dataset(data_dir, "train")


def _require_source(data_dir: Path | None, download: bool) -> None:
    if data_dir is None and not download:
        raise typer.BadParameter("name a folder of IDX files, or pass --download", param_hint="--data-dir")
    if data_dir is not None and download:
        raise typer.BadParameter("the images are in --data-dir", param_hint="--download")


def _all_test_images(data_dir: Path | None, download: bool) -> ImageSet:
    _require_source(data_dir, download)
    return download_mnist("test") if data_dir is None else load_idx_dataset(data_dir, "test")


def _test_images(data_dir: Path | None, download: bool) -> ImageSet:
    if data_dir is not None or download:
        _require_source(data_dir, download)
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


def _model_names(chosen: list[str] | None, default: Sequence[str], choices: Sequence[str] = MODEL_NAMES) -> list[str]:
    names = list(dict.fromkeys(chosen or default))
    for name in names:
        _require_choice(name, choices, "--model")
    return names


def _require_choice(value: str, choices: Sequence[str], option: str) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)


def _print_plan(plan: Plan) -> None:
    """What is to be done, and how long it may take."""
    missing = plan.missing()
    speeds = plan.speeds(missing)
    waiting = {piece.key.file for piece in missing}
    groups: dict[tuple[str, str], list[Any]] = {}
    for piece in plan.pieces:
        groups.setdefault((piece.model.name, piece.measurement.name), []).append(piece)
    rows: list[dict[str, float | str | None]] = []
    total = 0.0
    for (model, name), pieces in groups.items():
        measurement = pieces[0].measurement
        left = [piece for piece in pieces if piece.key.file in waiting]
        seconds = sum(len(piece.images) * speeds[model].of(measurement) for piece in left)
        total += seconds
        rows.append(
            {
                "model": model,
                "measurement": name,
                "norm": measurement.norm or "",
                "images": sum(len(piece.images) for piece in pieces),
                "finished pieces": f"{len(pieces) - len(left)} of {len(pieces)}",
                "queries per image": measurement.queries,
                "gradients per image": measurement.gradients,
                "seconds": seconds,
            }
        )
    console = _console()
    _print_rows(console, "the plan, and what is left of it on this machine", rows)
    console.print(f"about {datetime.timedelta(seconds=round(total))} in all")


_NAMES = ("model", "attack", "measurement", "norm", "strongest attack")
_DETAILS = ("images", "queries per image", "gradients per image")
_WIDE = 120


def _console() -> Console:
    """In a file or a pipe, lines long enough for the tables."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)


def _print_rows(console: Console, title: str, rows: Sequence[dict[str, float | str | None]]) -> None:
    from abs_defense.benchmark import formatted

    printed = formatted(rows)
    if not printed:
        return
    wide = console.width >= _WIDE
    columns = [c for c in printed[0] if wide or c not in _DETAILS]
    style: dict[str, Any] = {} if wide else {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=title, title_justify="left", **style)
    for column in columns:
        # Headers may wrap, cells never.
        least = max(len(text) for text in (*column.split(), *(row[column] for row in printed)))
        width = None if wide else least
        table.add_column(column, justify="left" if column in _NAMES else "right", min_width=least, width=width)
    for row in printed:
        table.add_row(*(row[c] for c in columns))
    console.print(table)


def _models_table(title: str, rows: Sequence[dict[str, float | str | None]]) -> Table:
    """A column a model."""
    from abs_defense.benchmark import formatted

    table = Table(title=title)
    table.add_column("")
    printed = formatted(rows)
    for row in printed:
        table.add_column(row["model"], justify="right")
    for column in printed[0] if printed else ():
        if column != "model":
            table.add_row(column, *(row[column] for row in printed))
    return table


def _command() -> str:
    return shlex.join(["abs-defense", *sys.argv[1:]])


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
