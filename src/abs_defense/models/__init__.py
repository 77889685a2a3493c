"""ABS models as PyTorch modules, their weights and the import of the authors' checkpoints."""

from abs_defense.models._abs import ABS, BinaryABS, Gradient
from abs_defense.models._registry import MODEL_NAMES, load_model
from abs_defense.models._vae import VAE
from abs_defense.models._weights import (
    Calibration,
    Weights,
    bundled_weights,
    fold_decoders,
    load_card,
    load_weights,
    save_weights,
    unfold_decoders,
)

__all__ = [
    "ABS",
    "MODEL_NAMES",
    "VAE",
    "BinaryABS",
    "Calibration",
    "Gradient",
    "Weights",
    "bundled_weights",
    "fold_decoders",
    "load_card",
    "load_model",
    "load_weights",
    "save_weights",
    "unfold_decoders",
]
