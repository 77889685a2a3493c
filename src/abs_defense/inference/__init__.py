"""Latent inference: from images to energies, latents and reconstructions. Knows no attacks."""

from abs_defense.inference._decide import asked_labels, misclassification_only
from abs_defense.inference._decoder import IMAGE_SHAPE, PIXELS, ClassDecoder, DecoderStack, JointDecoder
from abs_defense.inference._descent import adam_in_ball, descend, project_to_ball
from abs_defense.inference._energy import energy, kl_divergence
from abs_defense.inference._infer import (
    Duel,
    Inference,
    InferenceSettings,
    Solver,
    envelope_gradient,
    infer_latents,
    reconstruct,
    unrolled_gradient,
)
from abs_defense.inference._observe import Observation, listen, publish, somebody_listens
from abs_defense.inference._prototypes import Prototypes, sample_latents
from abs_defense.inference._quasi_newton import average_curvature, minimise

__all__ = [
    "IMAGE_SHAPE",
    "PIXELS",
    "ClassDecoder",
    "DecoderStack",
    "Duel",
    "Inference",
    "InferenceSettings",
    "JointDecoder",
    "Observation",
    "Prototypes",
    "Solver",
    "adam_in_ball",
    "asked_labels",
    "average_curvature",
    "descend",
    "energy",
    "envelope_gradient",
    "infer_latents",
    "kl_divergence",
    "listen",
    "minimise",
    "misclassification_only",
    "project_to_ball",
    "publish",
    "reconstruct",
    "sample_latents",
    "somebody_listens",
    "unrolled_gradient",
]
