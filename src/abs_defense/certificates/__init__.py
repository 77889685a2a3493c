"""Certified radii: no perturbation smaller than this changes the class."""

from abs_defense.certificates._certificate import METHODS, Certificate, Method, certify
from abs_defense.certificates._reach import NORM_NAMES, Norm

__all__ = ["METHODS", "NORM_NAMES", "Certificate", "Method", "Norm", "certify"]
