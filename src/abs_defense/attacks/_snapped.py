"""Perturbations of models that binarise their input, without what such a model does not see."""

from __future__ import annotations

from typing import TypeVar

import eagerpy as ep

from abs_defense._checks import check_positive

T = TypeVar("T")


def snap_to_threshold(images: T, perturbed: T, *, threshold: float = 0.5, margin: float = 1e-3) -> T:
    """The nearest images that look like ``perturbed`` to a model that binarises its input, as Binary ABS does.

    Pixels on the same side of the threshold as in ``images`` get the value they have there, the others go just across
    the threshold: what Latent Descent does for Binary ABS (Schott et al. 2018, section 4.3), for the result of any
    attack of foolbox or ART. An adversarial of such a model stays one, and no Lp distance grows. Models of this package
    say their threshold in ``binary_threshold``.

    Args:
        images: the originals, of any shape; arrays of torch, NumPy or what else eagerpy knows.
        perturbed: what the attack made of them, of the same shape.
        threshold: brighter pixels are one, all others zero; in the units of the images.
        margin: how far across the threshold pixels go, in the same units; none goes farther than in ``perturbed``.

    Raises:
        ValueError: the shapes differ, or ``margin`` is not positive.
    """
    check_positive(margin=margin)
    (x, y), restore_type = ep.astensors_(images, perturbed)
    if x.shape != y.shape:
        raise ValueError(f"perturbed: expected the shape of the images, {tuple(x.shape)}, got {tuple(y.shape)}")
    bright = y > threshold
    across = ep.where(bright, ep.minimum(y, threshold + margin), ep.maximum(y, threshold - margin))
    snapped: T = restore_type(ep.where(bright == (x > threshold), x, across))
    return snapped
