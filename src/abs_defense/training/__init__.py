"""Training of the VAEs and of the baselines, and calibration on training data."""

from abs_defense.training._baselines import (
    RECIPES,
    NetworkTraining,
    accuracy,
    robust_accuracy,
    train_baseline,
    train_network,
)
from abs_defense.training._calibrate import calibrate, calibrate_confidence, calibrate_gamma, class_energies
from abs_defense.training._certified import (
    CertifiedTraining,
    average_certified_abs,
    train_certified,
    train_certified_abs,
)
from abs_defense.training._prototypes import choose_prototypes
from abs_defense.training._run import average_abs, load_vaes, train_abs
from abs_defense.training._vaes import VAETraining, train_vaes

__all__ = [
    "RECIPES",
    "CertifiedTraining",
    "NetworkTraining",
    "VAETraining",
    "accuracy",
    "average_abs",
    "average_certified_abs",
    "calibrate",
    "calibrate_confidence",
    "calibrate_gamma",
    "choose_prototypes",
    "class_energies",
    "load_vaes",
    "robust_accuracy",
    "train_abs",
    "train_baseline",
    "train_certified",
    "train_certified_abs",
    "train_network",
    "train_vaes",
]
