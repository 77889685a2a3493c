"""ABS models and the paper's baselines as PyTorch modules, their weights, the import of the authors' checkpoints."""

from abs_defense.models._abs import ABS, BinaryABS, Gradient
from abs_defense.models._baselines import (
    BASELINE_NAMES,
    NEAREST_NEIGHBOR,
    NETWORKS,
    NearestNeighbor,
    Network,
    bundled_baselines,
    compress_images,
    load_baseline,
    save_baseline,
    untrained_network,
)
from abs_defense.models._classifier import Classifier, device_of, state_sha256
from abs_defense.models._clipped import Clipped
from abs_defense.models._registry import (
    ABS_NAMES,
    MODEL_NAMES,
    PROTOTYPE_NAMES,
    available_models,
    default_weights,
    load_card,
    load_model,
)
from abs_defense.models._vae import VAE
from abs_defense.models._weights import (
    Calibration,
    Weights,
    bundled_weights,
    fold_decoders,
    load_weights,
    save_weights,
    unfold_decoders,
)

__all__ = [
    "ABS",
    "ABS_NAMES",
    "BASELINE_NAMES",
    "MODEL_NAMES",
    "NEAREST_NEIGHBOR",
    "NETWORKS",
    "PROTOTYPE_NAMES",
    "VAE",
    "BinaryABS",
    "Calibration",
    "Classifier",
    "Clipped",
    "Gradient",
    "NearestNeighbor",
    "Network",
    "Weights",
    "available_models",
    "bundled_baselines",
    "bundled_weights",
    "compress_images",
    "default_weights",
    "device_of",
    "fold_decoders",
    "load_baseline",
    "load_card",
    "load_model",
    "load_weights",
    "save_baseline",
    "save_weights",
    "state_sha256",
    "unfold_decoders",
    "untrained_network",
]
