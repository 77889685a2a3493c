"""One whole training: VAEs, calibration, test figures, weights and their card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from abs_defense._files import replace_atomically, require_writable_folder
from abs_defense.data import ImageSet
from abs_defense.inference import DecoderStack
from abs_defense.models import (
    VAE,
    Calibration,
    Weights,
    bundled_weights,
    fold_decoders,
    load_model,
    load_weights,
    save_weights,
    state_sha256,
    unfold_decoders,
)
from abs_defense.models._weights import sha256
from abs_defense.training._calibrate import calibrate, class_energies
from abs_defense.training._card import write_card
from abs_defense.training._mean import mean_weights
from abs_defense.training._prototypes import choose_prototypes
from abs_defense.training._vaes import VAETraining, train_vaes

WEIGHTS = "abs.safetensors"
VAES = "vaes.safetensors"
PROTOTYPES = "prototypes.safetensors"
_TESTED: tuple[Literal["abs", "binary-abs", "prototype-abs"], ...] = ("abs", "binary-abs", "prototype-abs")


def train_abs(
    train: ImageSet,
    out: str | Path,
    config: VAETraining | None = None,
    *,
    init: str | Path | None = None,
    test: ImageSet | None = None,
    calibration_images: int = 10_000,
    prototypes: int = 4000,
    device: str | torch.device = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Train ABS and write ``abs.safetensors`` (decoders, calibration, prototypes), ``vaes.safetensors`` (with the
    encoders) and the card ``abs.json``. Every stage that is finished is kept; a later call continues after it.

    Args:
        train: training images; also those of the calibration.
        out: folder; made if missing.
        config: recipe of the VAEs.
        init: a ``vaes.safetensors`` of an earlier training to start from, or ``"mnist"`` or a file of ABS weights,
            which have no encoders: see ``VAETraining.encoder_epochs``.
        test: if given, all models of these weights are tested on all of it and the accuracies go into the card.
        calibration_images: how many training images the calibration looks at.
        prototypes: how many to choose for each class of the prototype classifier, see ``choose_prototypes``; 0 for
            none.
        device: where to compute.
        command: the command line, for the card.
        progress: show progress bars.

    Returns:
        The card.

    Raises:
        ValueError: see ``train_vaes``, ``calibrate`` and ``choose_prototypes``; also if ``test`` has other classes
            than ``train``.
        OSError: the folder cannot be written.
    """
    config = config or VAETraining()
    _check_classes(train, test)
    folder = require_writable_folder(out)
    init = None if init is None else bundled_weights().get(str(init), Path(init))
    start = None if init is None else load_vaes(init)
    vaes = train_vaes(train, folder, config, init=start, device=device, progress=progress)
    _save_vaes(folder / VAES, vaes, config)
    decoders = fold_decoders([vae.decoder for vae in vaes])
    return _finish(
        folder,
        decoders,
        train,
        {"recipe": asdict(config), "init": None if init is None else sha256(init)},
        test=test,
        calibration_images=calibration_images,
        prototypes=prototypes,
        seed=config.seed,
        device=device,
        progress=progress,
        command=command,
    )


def average_abs(
    sources: Sequence[str | Path],
    train: ImageSet,
    out: str | Path,
    *,
    test: ImageSet | None = None,
    calibration_images: int = 10_000,
    prototypes: int = 4000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """ABS whose decoders are the mean of others' (batch norm folded in), as of runs that continue one another. The
    mean generalises better than its parts. Calibration, prototypes, figures and card as ``train_abs`` makes them.

    Args:
        sources: weights of ABS of the same classes and architecture, as for ``ABS``.
        train: training images, for calibration and prototypes.
        out: folder; made if missing.
        seed: of the calibration's images and of the samples among which prototypes are chosen.
        test, calibration_images, prototypes, device, command, progress: as for ``train_abs``.

    Returns:
        The card.

    Raises:
        ValueError: no sources, or ones of different classes or architectures; also as ``train_abs``.
        FileNotFoundError: no such weights.
        OSError: the folder cannot be written.
    """
    decoders = mean_weights(sources).decoders
    parts = [state_sha256(load_weights(source).decoders) for source in sources]
    return _finish(
        require_writable_folder(out),
        decoders,
        train,
        {"recipe": {"mean of": parts, "seed": seed}, "init": None},
        test=test,
        calibration_images=calibration_images,
        prototypes=prototypes,
        seed=seed,
        device=device,
        progress=progress,
        command=command,
    )


def _check_classes(train: ImageSet, test: ImageSet | None) -> None:
    if test is not None and test.num_classes > train.num_classes:
        raise ValueError(f"the test images have {test.num_classes} classes, the training images {train.num_classes}")


def _finish(
    folder: Path,
    decoders: DecoderStack,
    train: ImageSet,
    origin: dict[str, Any],
    *,
    test: ImageSet | None,
    calibration_images: int,
    prototypes: int,
    seed: int,
    device: str | torch.device,
    progress: bool,
    command: str,
) -> dict[str, Any]:
    """Everything after the decoders."""
    _check_classes(train, test)
    identity: dict[str, Any] = {**origin, "images": train.sha256(), "calibration_images": calibration_images}
    calibration = _calibration(folder, identity, decoders, train, calibration_images, seed, device, progress)
    weights = Weights(decoders, calibration)
    if prototypes:
        identity = {**identity, "prototypes": prototypes}
        weights = replace(
            weights, prototypes=_prototypes(folder, identity, weights, train, prototypes, device, progress)
        )
    _save_once(folder / WEIGHTS, weights)
    figures = None
    if test is not None:
        identity = {**identity, "weights": sha256(folder / WEIGHTS), "test": test.sha256()}
        figures = _stage(folder / "figures.json", identity, lambda: _test_figures(weights, test, device, progress))
    return write_card(
        folder / WEIGHTS,
        command,
        name="ABS and Binary ABS, one VAE a class",
        data=train.name,
        data_sha256=train.sha256(),
        recipe=origin["recipe"],
        init_sha256=origin["init"],
        calibration_images=calibration_images,
        prototypes=prototypes,
        calibration={**asdict(calibration), "gamma": list(calibration.gamma)},
        seed=seed,
        test_figures=figures,
    )


def _save_once(path: Path, weights: Weights) -> None:
    """Write the weights unless the file holds them: safetensors orders its metadata at random, so the hash would
    change."""
    if path.exists():
        with contextlib.suppress(ValueError):
            saved = load_weights(path)
            pairs: list[tuple[Tensor, Tensor]] = [
                *zip(saved.decoders.parameters(), weights.decoders.parameters(), strict=True)
            ]
            if saved.prototypes is not None and weights.prototypes is not None:
                pairs.append((saved.prototypes, weights.prototypes))
            same_kind = (saved.prototypes is None, saved.prototype_beta) == (
                weights.prototypes is None,
                weights.prototype_beta,
            )
            if same_kind and saved.calibration == weights.calibration and all(a.equal(b) for a, b in pairs):
                return
    save_weights(path, weights)


def _calibration(
    folder: Path,
    identity: dict[str, Any],
    decoders: DecoderStack,
    data: ImageSet,
    images: int,
    seed: int,
    device: str | torch.device,
    progress: bool,
) -> Calibration:
    def compute() -> dict[str, Any]:
        found = calibrate(decoders, data, images=images, seed=seed, device=device, progress=progress)
        return asdict(found)

    raw = _stage(folder / "calibration.json", identity, compute)
    return Calibration(raw["alpha"], raw["eta"], tuple(raw["gamma"]))


def _prototypes(
    folder: Path,
    identity: dict[str, Any],
    weights: Weights,
    data: ImageSet,
    count: int,
    device: str | torch.device,
    progress: bool,
) -> Tensor:
    path = folder / PROTOTYPES
    expected = {"identity": json.dumps(identity, sort_keys=True)}
    if path.exists():
        with safetensors.safe_open(path, framework="pt") as file:
            if file.metadata() == expected:
                saved: Tensor = file.get_tensor("prototypes")
                return saved.float()
    seed = identity["recipe"]["seed"]
    latents = choose_prototypes(weights, data, count, seed=seed, device=device, progress=progress).prototypes
    assert latents is not None
    with replace_atomically(path) as temporary:
        safetensors.torch.save_file({"prototypes": latents.half()}, temporary, expected)
    return latents


def _stage(path: Path, identity: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a stage from its file, if that is of the same identity; else computed and written."""
    identity = json.loads(json.dumps(identity))
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["identity"] == identity:
            result: dict[str, Any] = saved["result"]
            return result
    result = compute()
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps({"identity": identity, "result": result}, indent=2) + "\n")
    return result


def _test_figures(weights: Weights, test: ImageSet, device: str | torch.device, progress: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"images": len(test), "data": test.name, "data_sha256": test.sha256()}
    for name in _TESTED:
        model = load_model(name, weights=weights)
        energies = class_energies(model.to(device), test.images, progress=progress)
        figures[name] = {"accuracy": (energies.argmin(1) == test.labels).double().mean().item()}
    return figures


def load_vaes(path: str | Path) -> list[VAE]:
    """The VAEs of a ``vaes.safetensors``, in evaluation mode. A file of ABS weights, which has decoders only, gives
    VAEs with untrained encoders.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no VAEs at {path}: expected the vaes.safetensors of a training")
    try:
        tensors = safetensors.torch.load_file(path)
        if "weight_0" in tensors:
            return [_with_new_encoder(decoder) for decoder in unfold_decoders(load_weights(path).decoders)]
        classes = 1 + max(int(name.split(".")[0]) for name in tensors)
        vaes = []
        for c in range(classes):
            own = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{c}.")}
            vae = _untrained_vae(own["decoder.conv_0.weight"].shape[0])
            vae.load_state_dict(own)
            vaes.append(vae.eval().requires_grad_(False))
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: expected the vaes.safetensors of a training, got {error}") from error
    return vaes


def _untrained_vae(latent_dim: int) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return VAE(latent_dim)


def _with_new_encoder(decoder: nn.Module) -> VAE:
    vae = _untrained_vae(decoder.get_parameter("conv_0.weight").shape[0])
    vae.decoder.load_state_dict(decoder.state_dict())
    return vae.eval().requires_grad_(False)


def _save_vaes(path: Path, vaes: list[VAE], config: VAETraining) -> None:
    tensors = {f"{c}.{name}": value for c, vae in enumerate(vaes) for name, value in vae.state_dict().items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with replace_atomically(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {"recipe": json.dumps(asdict(config))})
