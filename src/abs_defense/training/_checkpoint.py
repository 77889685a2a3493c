"""Checkpoints that belong to one recipe."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from abs_defense._files import replace_atomically

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, recipe: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace ``folder/checkpoint.pt`` atomically."""
    with replace_atomically(folder / CHECKPOINT) as path:
        torch.save({**state, "recipe": recipe}, path)


def load_checkpoint(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The state in ``folder/checkpoint.pt``, None if there is none.

    Raises:
        ValueError: it is damaged, or belongs to another recipe.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); remove it to start again") from error
    if state["recipe"] != recipe:
        different = sorted(k for k in recipe if state["recipe"].get(k) != recipe[k])
        raise ValueError(
            f"{path} belongs to another run: {', '.join(different) or 'the recipe'} differ. "
            "Continue with the same settings and data, or choose another output folder."
        )
    return state
