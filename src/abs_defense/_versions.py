"""Versions and hardware, for manifests and cards."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

_PACKAGES = ("abs-defense", "torch", "foolbox", "numpy")


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the machine's kind."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cuda": str(torch.version.cuda),
    }
