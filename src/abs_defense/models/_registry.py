"""Models by name, for the command line and for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, overload

from abs_defense._checks import check_choices
from abs_defense.inference import Solver
from abs_defense.models._abs import ABS, BinaryABS, Gradient
from abs_defense.models._baselines import BASELINE_NAMES, bundled_baselines, load_baseline
from abs_defense.models._classifier import Classifier
from abs_defense.models._weights import Weights, bundled_weights, load_weights


def _prototype_abs(weights: str | Path | Weights, **settings: Any) -> ABS:
    loaded = weights if isinstance(weights, Weights) else load_weights(weights)
    if loaded.prototypes is None:
        return ABS(loaded, steps=0, **settings)
    return ABS(loaded, prototypes=loaded.prototypes, steps=0, beta=loaded.prototype_beta, **settings)


def _certified_abs(weights: str | Path | Weights, **settings: Any) -> ABS:
    loaded = weights if isinstance(weights, Weights) else load_weights(weights)
    if loaded.prototypes is None:
        raise ValueError(
            "weights: expected some of abs-defense train certified, with their prototypes, got weights without any; "
            "load_model('prototype-abs', weights=...) takes samples of the prior instead"
        )
    return _prototype_abs(loaded, **settings)


_ABS_MODELS: dict[str, Callable[..., ABS]] = {
    "abs": ABS,
    "binary-abs": BinaryABS,
    "prototype-abs": _prototype_abs,
    "certified-abs": _certified_abs,
}
_DEFAULT_WEIGHTS = {"certified-abs": "certified"}


ABS_NAMES = tuple(_ABS_MODELS)
PROTOTYPE_NAMES = ("prototype-abs", "certified-abs")
MODEL_NAMES = (*ABS_NAMES, *BASELINE_NAMES)


@overload
def load_model(
    name: Literal["abs", "binary-abs", "prototype-abs", "certified-abs"],
    *,
    weights: str | Path | Weights | None = None,
    gradient: Gradient = "envelope",
    solver: Solver | None = None,
    seed: int = 0,
) -> ABS: ...
@overload
def load_model(
    name: str,
    *,
    weights: str | Path | Weights | None = None,
    gradient: Gradient = "envelope",
    solver: Solver | None = None,
    seed: int = 0,
) -> Classifier: ...
def load_model(
    name: str,
    *,
    weights: str | Path | Weights | None = None,
    gradient: Gradient = "envelope",
    solver: Solver | None = None,
    seed: int = 0,
) -> Classifier:
    """A ready model by name, in evaluation mode on the CPU.

    Args:
        name: ``"abs"``, ``"binary-abs"``, ``"prototype-abs"`` (ABS without latent descent, on the prototypes that
            come with the weights, or on 8000 samples of the prior if none do), ``"certified-abs"`` (the same, on
            weights fine-tuned for certified radii), or one of the paper's baselines: ``"cnn"``, ``"binary-cnn"``,
            ``"nearest-neighbor"``, ``"madry"``.
        weights: None for the bundled ones; else as for ``ABS``, or a file of the baseline. For
            ``"nearest-neighbor"`` also a folder with MNIST's IDX files, of which all training images are stored.
        gradient: as for ``ABS``, like ``solver`` and ``seed``; of no effect on baselines.
        solver: see ``gradient``.
        seed: see ``gradient``.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: no model of that name, weights of another one, or an unknown gradient or solver.
    """
    if name in _ABS_MODELS:
        source = default_weights(name) if weights is None else weights
        if weights is None and source not in bundled_weights():
            raise FileNotFoundError(f"this installation has no weights of {name!r}: see abs-defense train --help")
        return _ABS_MODELS[name](source, gradient=gradient, solver=solver, seed=seed)
    if name not in BASELINE_NAMES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}")
    check_choices(gradient=(gradient, get_args(Gradient)), solver=(solver, (None, *get_args(Solver))))
    if isinstance(weights, Weights):
        raise ValueError(f"weights: expected a file for {name!r}, got weights of ABS")
    return load_baseline(name, weights)


def default_weights(name: str) -> str:
    """The bundled weights of a model."""
    return _DEFAULT_WEIGHTS.get(name, "mnist") if name in ABS_NAMES else name


def available_models() -> tuple[str, ...]:
    """Those of ``MODEL_NAMES`` whose weights are bundled."""
    bundled = {**bundled_weights(), **bundled_baselines()}
    return tuple(name for name in MODEL_NAMES if default_weights(name) in bundled)


def load_card(name: str) -> dict[str, Any]:
    """The card of bundled weights (``"mnist"``, ``"certified"`` or a baseline): data, recipe, command, date, sha256,
    test figures.

    Raises:
        FileNotFoundError: no such bundled weights.
    """
    bundled = {**bundled_weights(), **bundled_baselines()}
    if name not in bundled:
        raise FileNotFoundError(f"no bundled weights {name!r}: expected one of {', '.join(bundled) or 'none'}")
    card: dict[str, Any] = json.loads(bundled[name].with_suffix(".json").read_text())
    return card
