"""Versions and hardware, for manifests and cards."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

_PACKAGES = ("abs-defense", "torch", "foolbox", "adversarial-robustness-toolbox", "eagerpy", "numpy")


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the machine's kind."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cuda": str(torch.version.cuda),
    }


def hardware(device: str | torch.device) -> dict[str, Any]:
    """What this process computes on, on that device; it decides the time of a result, and its last digits."""
    return {
        "device": str(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "numba": _version("numba"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
