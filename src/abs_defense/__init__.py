"""The Analysis-by-Synthesis classifier of Schott et al. 2018 for foolbox and ART."""

from abs_defense.certificates import Certificate, certify
from abs_defense.inference import Inference
from abs_defense.models import ABS, BinaryABS, load_model

__all__ = ["ABS", "BinaryABS", "Certificate", "Inference", "certify", "load_model"]
__version__ = "0.1.0"
