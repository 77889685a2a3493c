"""What the paper reports (Schott et al. 2018, table 1 and section 5)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from abs_defense.certificates import Norm


@dataclass(frozen=True)
class Published:
    """Under the strongest of the paper's attacks: clean accuracy, median distance, accuracy at the threshold."""

    clean: float
    median: float
    accuracy: float


def _rows(clean: float, **norms: tuple[float, float]) -> dict[str, Published]:
    return {norm: Published(clean, *values) for norm, values in norms.items()}


PUBLISHED: dict[str, dict[str, Published]] = {
    "cnn": _rows(0.991, l2=(1.09, 0.08), linf=(0.08, 0.0), l0=(9, 0.19)),
    "binary-cnn": _rows(0.985, l2=(0.86, 0.03), linf=(0.34, 0.63), l0=(11, 0.38)),
    "nearest-neighbor": _rows(0.969, l2=(1.54, 0.53), linf=(0.19, 0.22), l0=(10, 0.34)),
    "madry": _rows(0.988, l2=(1.36, 0.35), linf=(0.34, 0.87), l0=(4, 0.0)),
    "binary-abs": _rows(0.990, l2=(1.33, 0.39), linf=(0.44, 0.77), l0=(21, 0.77)),
    "abs": _rows(0.990, l2=(2.24, 0.80), linf=(0.23, 0.08), l0=(16, 0.69)),
}

PUBLISHED_BOUND = {"abs": 0.690, "binary-abs": 0.601}

_CURVE_NAMES = {
    "cnn": "CNN",
    "binary-cnn": "Binary CNN",
    "madry": "Madry et al.",
    "nearest-neighbor": "Nearest Neighbor",
    "binary-abs": "Binary ABS",
    "abs": "ABS",
}
_NORM_NAMES: dict[Norm, str] = {"l2": "L2", "linf": "Linf", "l0": "L0"}

Curve = tuple[list[float], list[float]]


def load_curves(path: str | Path) -> dict[tuple[str, Norm], Curve]:
    """The published accuracy-distance curves by kind of model and norm, from a JSON file
    ``{norm: {model: {"epsilon": [...], "accuracy_percent": [...]}}}``: distances, and accuracies, here as fractions.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        raw = json.loads(Path(path).read_text())
        return {
            (kind, norm): ([float(e) for e in curve["epsilon"]], [float(a) / 100.0 for a in curve["accuracy_percent"]])
            for norm, norm_name in _NORM_NAMES.items()
            for kind, name in _CURVE_NAMES.items()
            if (curve := raw[norm_name].get(name)) is not None
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the published curves, got {type(error).__name__}: {error}") from error
