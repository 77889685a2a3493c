"""Training of the VAEs, and calibration on training data."""

from abs_defense.training._calibrate import calibrate, calibrate_confidence, calibrate_gamma, class_energies
from abs_defense.training._run import train_abs
from abs_defense.training._vaes import VAETraining, train_vaes

__all__ = [
    "VAETraining",
    "calibrate",
    "calibrate_confidence",
    "calibrate_gamma",
    "class_energies",
    "train_abs",
    "train_vaes",
]
