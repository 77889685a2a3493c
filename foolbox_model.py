"""Foolbox's model zoo: ``foolbox.zoo.get_model(url_of_this_repository)`` clones it and calls ``create``."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import foolbox
import torch

if importlib.util.find_spec("abs_defense") is None:  # cloned, not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from abs_defense import load_model


def create(name: str = "abs", *, device: str | None = None, **settings: Any) -> foolbox.PyTorchModel:
    """A model with bundled weights in foolbox: images in [0, 1], logits.

    Args:
        name: ``"abs"``, ``"binary-abs"``, ``"prototype-abs"``, ``"cnn"``, ...; see ``abs_defense.load_model``.
        device: by default ``"cuda"`` where there is one, else ``"cpu"``.
        settings: further arguments of ``abs_defense.load_model``: ``gradient``, ``solver``, ``seed``, ``weights``.

    Raises:
        ValueError: no model of that name.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return foolbox.PyTorchModel(load_model(name, **settings), bounds=(0, 1), device=device)
