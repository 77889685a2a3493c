"""Training of the VAEs, and calibration on training data."""

from abs_defense.training._calibrate import calibrate, calibrate_confidence, calibrate_gamma, class_energies
from abs_defense.training._prototypes import choose_prototypes
from abs_defense.training._run import load_vaes, train_abs
from abs_defense.training._vaes import VAETraining, train_vaes

__all__ = [
    "VAETraining",
    "calibrate",
    "calibrate_confidence",
    "calibrate_gamma",
    "choose_prototypes",
    "class_energies",
    "load_vaes",
    "train_abs",
    "train_vaes",
]
