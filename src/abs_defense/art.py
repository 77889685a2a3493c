"""ABS in the Adversarial Robustness Toolbox: a classifier with everything set, and the paper's attacks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import eagerpy as ep
import foolbox
import numpy as np
import numpy.typing as npt
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import ClassifierMixin, PyTorchClassifier
from art.estimators.estimator import BaseEstimator
from art.utils import check_and_transform_label_format, get_labels_np_array
from foolbox.attacks.base import MinimizationAttack
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn
from tqdm import tqdm

from abs_defense.attacks import LatentDescentAttack, PointwiseAttack
from abs_defense.attacks._base import queried_rows
from abs_defense.inference import IMAGE_SHAPE
from abs_defense.models import Classifier, load_model

Array = npt.NDArray[Any]
T = TypeVar("T")


class ABSClassifier(PyTorchClassifier):  # type: ignore[misc]
    """An ART classifier around one of our models; every attack of ART that takes a ``PyTorchClassifier`` runs on it.

    Bounds [0, 1], input shape (1, 28, 28), the model's classes, cross entropy. The model stays as it is: ART moves it
    to the device, but does not train it.

    Args:
        model: one of our models, or the name of one: ``"abs"``, ``"binary-abs"``, ...; see ``load_model``.
        outputs: ``"logits"``, which gradient attacks need (AutoPGD refuses probabilities), or ``"probabilities"``: the
            confidence softmax, for attacks and estimators that need scores in [0, 1]; where it is the same for all
            classes, the class of the largest logit is ahead by a rounding error.
        device_type: ``"cpu"`` or ``"gpu"``.
        kwargs: further arguments of ``PyTorchClassifier``, such as ``preprocessing`` or ``optimizer``.

    Raises:
        TypeError: the model is none of ours.
        ValueError: unknown name or outputs.
    """

    def __init__(
        self,
        model: Classifier | str = "abs",
        *,
        outputs: Literal["logits", "probabilities"] = "logits",
        device_type: str = "cpu",
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model = load_model(model)
        if not isinstance(model, Classifier):
            raise TypeError(f"model: expected a model of abs_defense or its name, got {type(model).__name__}")
        if outputs not in ("logits", "probabilities"):
            raise ValueError(f"outputs: expected 'logits' or 'probabilities', got {outputs!r}")
        settings: dict[str, Any] = {
            "loss": nn.CrossEntropyLoss() if outputs == "logits" else _NegativeLogLikelihood(),
            "input_shape": IMAGE_SHAPE,
            "nb_classes": model.num_classes,
            "clip_values": (0.0, 1.0),
            "device_type": device_type,
        }
        super().__init__(model=model if outputs == "logits" else _Probabilities(model), **{**settings, **kwargs})


class _Probabilities(nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        confidences = self.model.confidence_softmax(logits)
        # Where they are equal, because eta outweighs all likelihoods, ART's argmax would be class 0.
        best = logits.argmax(1, keepdim=True)
        own, others = confidences.gather(1, best), confidences.scatter(1, best, 0.0).amax(1, keepdim=True)
        ahead = torch.nextafter(others, others + 1.0)
        return confidences.scatter_add(1, best, (ahead - own).detach().clamp_min(0.0))


class _NegativeLogLikelihood(nn.Module):
    reduction = "mean"  # ART looks for it

    def forward(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        labels = labels.argmax(1) if labels.ndim == 2 else labels
        loss: Tensor = nn.functional.nll_loss(probabilities.clamp_min(1e-30).log(), labels, reduction=self.reduction)
        return loss


class _FoolboxAttack(EvasionAttack):  # type: ignore[misc]
    """One of our foolbox attacks on an ART estimator, through its ``predict`` and so with all its preprocessing."""

    attack_params: ClassVar[list[str]] = [*EvasionAttack.attack_params, "targeted", "batch_size", "verbose"]
    _estimator_requirements = (BaseEstimator, ClassifierMixin)

    def __init__(self, estimator: Any, *, targeted: bool, batch_size: int, verbose: bool, **settings: Any) -> None:
        super().__init__(estimator=estimator)
        self._targeted = targeted
        self.batch_size = batch_size
        self.verbose = verbose
        for name, value in settings.items():
            setattr(self, name, value)
        self._check_params()

    @abstractmethod
    def _attack(self) -> MinimizationAttack:
        """The foolbox attack with the current parameters."""

    def _check_params(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if not isinstance(self.targeted, bool):
            raise ValueError(f"targeted: expected a bool, got {self.targeted!r}")
        if self.estimator.clip_values is None:
            raise ValueError("estimator: expected clip_values, the bounds of the pixels, got None")
        self._attack()

    def _generate(self, x: Array, y: Array | None, mask: Array | None, starts: Array | None) -> Array:
        if y is None:
            if self.targeted:
                raise ValueError("y: expected the target classes of a targeted attack, got None")
            y = get_labels_np_array(self.estimator.predict(x, batch_size=self.batch_size))
        labels = check_and_transform_label_format(np.asarray(y), nb_classes=self.estimator.nb_classes).argmax(1)
        kind = TargetedMisclassification if self.targeted else Misclassification
        allowed = None if mask is None else np.broadcast_to(np.asarray(mask) != 0, x.shape)
        result = np.array(x)
        attack = self._attack()
        parts = range(0, len(x), self.batch_size)
        for first in tqdm(parts, desc=type(self).__name__, unit="batch", disable=not self.verbose):
            part = slice(first, first + self.batch_size)
            inputs = torch.from_numpy(np.ascontiguousarray(x[part]))
            model = _EstimatorModel(self.estimator, inputs, None if allowed is None else allowed[part])
            extra = {} if starts is None else {"starting_points": torch.from_numpy(starts[part]).to(inputs)}
            criterion = kind(ep.astensor(torch.from_numpy(labels[part])))
            perturbed, _, success = attack(model, inputs, criterion, epsilons=None, **extra)
            perturbed = model.masked(perturbed, np.arange(len(inputs)))
            result[part] = torch.where(success[:, None, None, None], perturbed, inputs).numpy()
        return result


class _EstimatorModel(foolbox.models.base.Model):
    """An ART estimator as a foolbox model without gradients; where a mask is zero it sees the original image."""

    data_format = "channels_first"

    def __init__(self, estimator: Any, originals: Tensor, allowed: Array | None) -> None:
        self._estimator = estimator
        self._originals = originals
        self._allowed = None if allowed is None else torch.from_numpy(np.array(allowed))

    @property
    def bounds(self) -> foolbox.types.Bounds:
        low, high = self._estimator.clip_values
        return foolbox.types.Bounds(float(np.min(low)), float(np.max(high)))

    def masked(self, images: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
        """The images, of rows of the batch, with the original where the mask is zero."""
        if self._allowed is None:
            return images
        return torch.where(self._allowed[rows], images, self._originals[rows])

    def __call__(self, inputs: T) -> T:
        x, restore_type = ep.astensor_(inputs)
        images: Tensor = x.raw.detach()
        rows = queried_rows()
        if self._allowed is not None:
            images = self.masked(images, np.arange(len(images)) if rows is None else rows)
        # One batch, because a listener hears one inference a call.
        outputs = self._estimator.predict(images.cpu().numpy(), batch_size=max(1, len(images)))
        result: T = restore_type(ep.astensor(torch.from_numpy(np.asarray(outputs)).to(images.device)))
        return result


class LatentDescent(_FoolboxAttack):
    """The paper's Latent Descent attack (``abs_defense.attacks.LatentDescentAttack``) on an ART estimator. L2.

    Args:
        estimator: an ART classifier with ABS or Binary ABS inside.
        stepsize, steps, binary_search_steps: see ``LatentDescentAttack``.
        targeted: whether ``y`` are the classes to reach.
        batch_size: images attacked at once.
        verbose: show a progress bar.

    Raises:
        ValueError: a parameter is out of its range; at ``generate``, if there is no ABS inside.
        art.exceptions.EstimatorError: the estimator is no classifier.
    """

    attack_params: ClassVar[list[str]] = [
        *_FoolboxAttack.attack_params,
        "stepsize",
        "steps",
        "binary_search_steps",
    ]

    def __init__(
        self,
        estimator: Any,
        *,
        stepsize: float = 0.01,
        steps: int = 1000,
        binary_search_steps: int = 10,
        targeted: bool = False,
        batch_size: int = 128,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            estimator,
            targeted=targeted,
            batch_size=batch_size,
            verbose=verbose,
            stepsize=stepsize,
            steps=steps,
            binary_search_steps=binary_search_steps,
        )

    def _attack(self) -> MinimizationAttack:
        return LatentDescentAttack(
            stepsize=self.stepsize, steps=self.steps, binary_search_steps=self.binary_search_steps
        )

    def generate(self, x: Array, y: Array | None = None, **kwargs: Any) -> Array:
        """Adversarial images; those for which none was found come back as they are.

        Args:
            x: images in the estimator's bounds.
            y: labels or targets, ``(N,)`` or one-hot; by default the predictions.
            kwargs: none is known.

        Raises:
            TypeError: an unknown argument.
            ValueError: see the class; a targeted attack without ``y``.
        """
        _refuse(kwargs)
        return self._generate(x, y, None, None)


class Pointwise(_FoolboxAttack):
    """The paper's Pointwise attack (``abs_defense.attacks.PointwiseAttack``) on any ART classifier. Decisions only.

    Args:
        estimator: an ART classifier.
        norm, restarts, start_draws, max_queries, seed: see ``PointwiseAttack``.
        targeted: whether ``y`` are the classes to reach.
        batch_size: images attacked at once.
        verbose: show a progress bar.

    Raises:
        ValueError: a parameter is out of its range.
        art.exceptions.EstimatorError: the estimator is no classifier.
    """

    attack_params: ClassVar[list[str]] = [
        *_FoolboxAttack.attack_params,
        "norm",
        "restarts",
        "start_draws",
        "max_queries",
        "seed",
    ]

    def __init__(
        self,
        estimator: Any,
        *,
        norm: Literal["l0", "l2"] = "l0",
        restarts: int = 1,
        start_draws: int = 20,
        max_queries: int | None = None,
        seed: int = 0,
        targeted: bool = False,
        batch_size: int = 128,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            estimator,
            targeted=targeted,
            batch_size=batch_size,
            verbose=verbose,
            norm=norm,
            restarts=restarts,
            start_draws=start_draws,
            max_queries=max_queries,
            seed=seed,
        )

    def _attack(self) -> MinimizationAttack:
        return PointwiseAttack(
            norm=self.norm,
            restarts=self.restarts,
            start_draws=self.start_draws,
            max_queries=self.max_queries,
            seed=self.seed,
        )

    def generate(self, x: Array, y: Array | None = None, **kwargs: Any) -> Array:
        """Adversarial images; those for which none was found come back as they are.

        Args:
            x: images in the estimator's bounds.
            y: labels or targets, ``(N,)`` or one-hot; by default the predictions.
            kwargs: ``mask``, broadcastable to x: pixels where it is zero are not perturbed; ``x_adv_init``, images
                of the shape of x to start from.

        Raises:
            TypeError: an unknown argument.
            ValueError: a targeted attack without ``y``; see ``PointwiseAttack``.
        """
        mask, starts = kwargs.pop("mask", None), kwargs.pop("x_adv_init", None)
        _refuse(kwargs)
        return self._generate(x, y, mask, starts)


def _refuse(unknown: dict[str, Any]) -> None:
    if unknown:
        raise TypeError(f"generate: unknown arguments {', '.join(unknown)}")
