"""What an attack that knows ABS sees of the model behind a foolbox model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import eagerpy as ep
import numpy as np
import torch
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from foolbox.models import Model
from torch import Tensor

from abs_defense.attacks._base import Flags, Oracle, Rows
from abs_defense.attacks._programs import Setting, seen_images
from abs_defense.inference import Observation, listen


@dataclass(frozen=True)
class Goal:
    """Which classes an attack wants: away from ``label``, or to ``target``."""

    labels: Tensor | None
    targets: Tensor | None

    @classmethod
    def of(cls, criterion: Criterion, attack: object) -> Goal:
        """Raises ``ValueError`` for criteria other than (targeted) misclassification."""
        if isinstance(criterion, Misclassification):
            return cls(criterion.labels.raw.long(), None)
        if isinstance(criterion, TargetedMisclassification):
            return cls(None, criterion.target_classes.raw.long())
        raise ValueError(
            f"{type(attack).__name__}: expected Misclassification or TargetedMisclassification, "
            f"got {type(criterion).__name__}"
        )

    def rivals(self, energies: Tensor, rows: Tensor) -> Tensor:
        """The class to go to: the target, else the one of lowest energy that is not the label, ``(N,)``."""
        if self.targets is not None:
            return self.targets[rows]
        return _without(energies, self._labels[rows]).argmin(dim=1)

    def defenders(self, energies: Tensor, rows: Tensor) -> Tensor:
        """The class to get away from: the label, else the one of lowest energy that is not the target, ``(N,)``."""
        if self.targets is not None:
            return _without(energies, self.targets[rows]).argmin(dim=1)
        return self._labels[rows]

    @property
    def _labels(self) -> Tensor:
        assert self.labels is not None
        return self.labels


def _without(energies: Tensor, classes: Tensor) -> Tensor:
    return energies.scatter(1, classes[:, None], torch.inf)


class Insight:
    """Queries a foolbox model and hears what the ABS model inside it inferred.

    Creating it queries every image once as it is, and three constant images, which show how the preprocessing maps
    the attack's pixels to the model's.

    Attributes:
        clean: which images are adversarial as they are, ``(N,)``.
        clean_observation: what the model inferred for them.
        scale, shift: the model sees ``scale * x + shift``, each ``(1, 28, 28)``.

    Raises:
        ValueError: no ABS model was heard during the call, or the preprocessing is not an affine map of each pixel.
    """

    def __init__(self, model: Model, criterion: Criterion, x: ep.Tensor) -> None:
        self._x: Tensor = x.raw.detach()
        self._bounds = lower, upper = model.bounds
        constant = ep.stack([ep.full_like(x[0], value) for value in (lower, upper, 0.5 * (lower + upper))])
        with listen() as heard:
            model(constant)
        ends = _heard(heard, len(constant)).images
        if tuple(x.shape[1:]) != tuple(ends.shape[1:]):
            raise ValueError(
                f"preprocessing: expected an affine map of each pixel, but the model makes images of shape "
                f"{tuple(ends.shape[1:])} of those of shape {tuple(x.shape[1:])}"
            )
        self.scale = (ends[1] - ends[0]) / (upper - lower)
        self.shift = ends[0] - self.scale * lower
        with listen() as heard:
            self._oracle = Oracle(model, criterion, x)
        self.clean: Flags = self._oracle.clean
        self.clean_observation = _heard(heard, len(x))
        for images, seen in ((constant.raw, ends), (x.raw, self.clean_observation.images)):
            error = (self.to_model(images) - seen).abs().max()
            if not error <= 1e-4:
                raise ValueError(
                    "preprocessing: expected an affine map of each pixel (mean, std, bounds), but the model sees "
                    f"pixels that differ from it by up to {float(error):.3g}"
                )

    def __call__(self, candidates: Tensor, rows: Tensor) -> tuple[Flags, Observation]:
        """Whether ``candidates[i]`` is adversarial for image ``rows[i]``, and what the model inferred."""
        with listen() as heard:
            flags = self._oracle(ep.astensor(candidates), rows.cpu().numpy())
        return flags, _heard(heard, len(candidates))

    def adversarial(self, candidates: Tensor, rows: Tensor) -> Tensor:
        """As a call, but the flags only, as a tensor."""
        return torch.from_numpy(self._oracle(ep.astensor(candidates), rows.cpu().numpy())).to(candidates.device)

    def to_model(self, x: Tensor) -> Tensor:
        """Pixels of the attack as the model sees them."""
        return self.scale * x + self.shift

    def setting(self, margin: float) -> Setting:
        """The problems of all images, for the programs."""
        x = self._x.double().flatten(1)
        scale, shift = self.scale.double().flatten(), self.shift.double().flatten()
        observation, margin = self.clean_observation, self.representable(margin)
        return Setting(
            x, scale * x + shift, seen_images(observation), scale, self._bounds, observation.threshold, margin
        )

    def representable(self, margin: float) -> float:
        """The margin, in the model's units, or if it is larger what the rounding of the attack's images may move."""
        spacing = torch.finfo(self._x.dtype).eps * max(abs(bound) for bound in self._bounds)
        return max(margin, 2.0 * spacing * float(self.scale.abs().max()))

    def from_model(self, images: Tensor, x: Tensor) -> Tensor:
        """Pixels of the model in the attack's space; where the model does not see them, those of ``x``."""
        seen = self.scale != 0
        scale = torch.where(seen, self.scale, 1.0)
        return torch.where(seen, ((images - self.shift) / scale).clamp(*self._bounds), x).to(x.dtype)


def _heard(heard: list[Observation], count: int) -> Observation:
    """What was heard during one call with ``count`` images, also if the model took them in several parts."""
    if not heard:
        raise ValueError(
            "model: expected one with ABS or Binary ABS inside, but no inference result was published during its call"
        )
    sizes = [len(observation.images) for observation in heard]
    if sum(sizes) != count:
        raise ValueError(
            f"model: expected one ABS model inside that is called once with every image; called with {count} images, "
            f"but ABS inside it was called with {' + '.join(map(str, sizes))}"
        )
    return heard[0] if len(heard) == 1 else Observation.concatenate(heard)


def bisect(insight: Insight, inner: Tensor, outer: Tensor, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Binary search on the segments from ``inner`` (not adversarial) to ``outer`` (adversarial).

    Returns:
        The ends after ``steps`` halvings; the outer ones are adversarial.
    """
    for _ in range(steps if len(rows) else 0):
        middle = (inner + outer) / 2
        hit = insight.adversarial(middle, rows)[:, None, None, None]
        inner, outer = torch.where(hit, inner, middle), torch.where(hit, middle, outer)
    return inner, outer


def active(flags: Flags) -> Rows:
    """Indices of the images that are not finished."""
    rows: Rows = np.flatnonzero(~flags)
    return rows


def per_image(values: Any, like: Tensor) -> Tensor:
    """Numpy flags or indices as a tensor beside ``like``."""
    return torch.from_numpy(np.asarray(values)).to(like.device)
