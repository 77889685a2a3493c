"""Models by name, for the command line and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from abs_defense.models._abs import ABS, BinaryABS, Gradient
from abs_defense.models._weights import Weights, load_weights


def _prototype_abs(weights: str | Path | Weights, **settings: Any) -> ABS:
    loaded = weights if isinstance(weights, Weights) else load_weights(weights)
    return ABS(loaded, prototypes=8000 if loaded.prototypes is None else loaded.prototypes, steps=0, **settings)


_MODELS: dict[str, Callable[..., ABS]] = {
    "abs": ABS,
    "binary-abs": BinaryABS,
    "prototype-abs": _prototype_abs,
}

MODEL_NAMES = tuple(_MODELS)


def load_model(
    name: str,
    *,
    weights: str | Path | Weights = "mnist",
    gradient: Gradient = "envelope",
    seed: int = 0,
) -> ABS:
    """A ready model by name, in evaluation mode on the CPU.

    Args:
        name: ``"abs"``, ``"binary-abs"`` or ``"prototype-abs"``: ABS without latent descent, on the
            prototypes that come with the weights, or on 8000 samples of the prior if none do.
        weights, gradient, seed: as for ``ABS``.

    Raises:
        ValueError: no model of that name.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}")
    return _MODELS[name](weights, gradient=gradient, seed=seed)
