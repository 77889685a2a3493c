"""What our attacks share: foolbox's contract kept where its base class breaks, and queries of a part of the batch."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import eagerpy as ep
import numpy as np
import numpy.typing as npt
import torch
from foolbox.attacks.base import Attack, MinimizationAttack
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from foolbox.devutils import flatten
from foolbox.distances import LpDistance
from foolbox.models import Model, PyTorchModel, ThresholdingWrapper, TransformBoundsWrapper
from foolbox.types import Bounds

from abs_defense._checks import check_counts
from abs_defense.inference import misclassification_only
from abs_defense.models import ABS, BinaryABS

T = TypeVar("T")
Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_queried_rows: ContextVar[Rows | None] = ContextVar("abs_defense_queried_rows", default=None)


@contextmanager
def query_rows(rows: Rows) -> Iterator[None]:
    """Say which images of the batch the model calls inside are about, for ``QueryCounter``."""
    token = _queried_rows.set(rows)
    try:
        yield
    finally:
        _queried_rows.reset(token)


def queried_rows() -> Rows | None:
    """Images of the batch that the current model call is about; None if nobody said."""
    return _queried_rows.get()


class L0Distance(LpDistance):
    """Number of changed values; foolbox's own refuses to clip.

    ``clip_perturbation`` keeps the ``epsilon`` largest changes of each image and undoes the others.
    """

    def __init__(self) -> None:
        super().__init__(0)

    def __repr__(self) -> str:
        return "L0Distance()"

    def clip_perturbation(self, references: T, perturbed: T, epsilon: float) -> T:
        if not epsilon >= 0:
            raise ValueError(f"epsilon: expected a number of values to change, at least 0, got {epsilon}")
        (x, y), restore_type = ep.astensors_(references, perturbed)
        change = flatten(y - x)
        size = change.abs().numpy()
        if epsilon >= size.shape[1]:
            return perturbed
        kept = int(epsilon)
        order = np.argsort(-size, axis=1, kind="stable")
        mask = np.zeros_like(size, dtype=bool)
        np.put_along_axis(mask, order[:, :kept], True, axis=1)
        clipped: T = restore_type(ep.where(ep.from_numpy(x, mask).reshape(x.shape), y, x))
        return clipped


class WrappedModel(Model):
    """A foolbox model around another one, with its bounds and data format."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def bounds(self) -> Bounds:
        return self._model.bounds

    @property
    def data_format(self) -> Any:
        return self._model.data_format  # type: ignore[attr-defined]


class DecidingModel(WrappedModel):
    """A foolbox model for callers that only let a criterion judge the outputs of the whole batch.

    Of (targeted) misclassification that is whether a label is the class of the largest logit, which ABS models tell
    sooner than all logits; see ``misclassification_only``. They are asked for no more where nothing but foolbox's
    wrappers of the input and ours are around them. The outputs may say no more than that.
    """

    def __init__(self, model: Model, criterion: Criterion) -> None:
        super().__init__(model)
        self._labels = _deciding_labels(criterion) if _passes_logits_of_abs_on(model) else None

    def __call__(self, inputs: T) -> T:
        return self.about(inputs, None)

    def about(self, inputs: T, rows: Rows | None) -> T:
        """The outputs for inputs that the criterion judges as images ``rows`` of its batch; all of them if None."""
        if self._labels is None:
            return self._model(inputs)
        with misclassification_only(self._labels if rows is None else self._labels[rows]):
            return self._model(inputs)


def _deciding_labels(criterion: Criterion) -> torch.Tensor | None:
    """The labels that an image has to lose or to get, ``(N,)``; None for other criteria."""
    if type(criterion) is Misclassification:
        return torch.tensor(criterion.labels.numpy())
    if type(criterion) is TargetedMisclassification:
        return torch.tensor(criterion.target_classes.numpy())
    return None


def _passes_logits_of_abs_on(model: Model) -> bool:
    """Whether nobody but the caller sees the logits of the ABS model inside, or makes something else of them."""
    while isinstance(model, WrappedModel) or type(model) in (TransformBoundsWrapper, ThresholdingWrapper):
        model = model._model  # type: ignore[attr-defined]
    if type(model) is not PyTorchModel or not inspect.isfunction(model._model):
        return False
    module = inspect.getclosurevars(model._model).nonlocals.get("model")  # foolbox keeps it nowhere else
    if not (isinstance(module, ABS) and type(module) in (ABS, BinaryABS)) or "forward" in vars(module):
        return False
    return not (module._forward_hooks or torch.nn.modules.module._global_forward_hooks)


class ContractCall:
    """The call of a foolbox attack, before foolbox's own: also takes empty batches, labels of any integer type or numpy
    labels, and names what is wrong with its input."""

    def __call__(
        self,
        model: Model,
        inputs: Any,
        criterion: Any,
        *,
        epsilons: float | Sequence[float | None] | None,
        **kwargs: Any,
    ) -> Any:
        """Run the attack; arguments and results are those of ``foolbox.attacks.base.MinimizationAttack``.

        Raises:
            ValueError: inputs outside the model's bounds or with NaN, a criterion that the attack cannot serve, or
                labels that are not one a image.
        """
        x, restore_type = ep.astensor_(inputs)
        criterion_ = as_criterion(criterion, x)
        check_labels(criterion_, len(x))
        check_bounds(x, model)
        if len(x) == 0:
            several = isinstance(epsilons, Iterable)
            count = len(list(epsilons)) if isinstance(epsilons, Iterable) else 1
            success = ep.from_numpy(x, np.zeros((count, 0), dtype=bool))
            if several:
                return [inputs] * count, [inputs] * count, restore_type(success)
            return inputs, inputs, restore_type(success[0])
        return super().__call__(model, inputs, criterion_, epsilons=epsilons, **kwargs)  # type: ignore[misc]


class ContractAttack(ContractCall, MinimizationAttack):  # type: ignore[misc]
    """A minimisation attack of foolbox with the ``ContractCall``. Subclasses implement ``_perturb``."""

    @abstractmethod
    def _perturb(self, model: Model, x: ep.Tensor, criterion: Criterion, early_stop: float | None) -> ep.Tensor:
        """Perturbed images; those for which none was found as they are. May take more keyword arguments."""

    def run(self, model: Model, inputs: T, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> T:
        """Perturbed inputs; an image for which none was found comes back as it is.

        Args:
            model, inputs, criterion: as for all of foolbox's attacks.
            early_stop: images with a distance of at most this need not be improved further.
            kwargs: what the attack takes besides, see its description.
        """
        x, restore_type = ep.astensor_(inputs)
        criterion = as_criterion(criterion, x)
        check_labels(criterion, len(x))
        return restore_type(self._perturb(model, x, criterion, early_stop, **kwargs))

    def repeat(self, times: int) -> Attack:
        """The attack itself: it is deterministic, so a repetition finds the same.

        Raises:
            ValueError: ``times`` is less than 1.
        """
        check_counts(times=times)
        return self


def as_criterion(criterion: Any, x: ep.Tensor) -> Criterion:
    """A criterion whose labels have the type of the inputs; labels alone mean misclassification."""
    kind: type[Misclassification] | type[TargetedMisclassification] = Misclassification
    labels = criterion
    if type(criterion) is Misclassification:
        labels = criterion.labels
    elif type(criterion) is TargetedMisclassification:
        kind, labels = TargetedMisclassification, criterion.target_classes
    elif isinstance(criterion, Criterion):
        return criterion
    if isinstance(labels, (list, tuple, np.ndarray)):
        array = np.asarray(labels)
    else:
        try:
            array = ep.astensor(labels).numpy()
        except ValueError:
            raise ValueError(
                f"criterion: expected a foolbox criterion or labels, got {type(criterion).__name__}"
            ) from None
    if array.dtype.kind not in "iuf" or (array.dtype.kind == "f" and not np.equal(array, np.round(array)).all()):
        raise ValueError(f"labels: expected whole numbers, got {array.dtype}")
    return kind(ep.from_numpy(x, array.astype(np.int64)))


def some_images(criterion: Criterion, rows: Rows) -> Criterion:
    """The criterion for some images of the batch.

    Raises:
        ValueError: for criteria other than (targeted) misclassification, which cannot be taken apart.
    """
    if type(criterion) is Misclassification:
        return Misclassification(criterion.labels[rows])
    if type(criterion) is TargetedMisclassification:
        return TargetedMisclassification(criterion.target_classes[rows])
    raise ValueError(f"criterion: expected (targeted) misclassification, got {type(criterion).__name__}")


def check_labels(criterion: Criterion, count: int) -> None:
    """Raise ``ValueError`` unless the criterion has one label an image."""
    for name in ("labels", "target_classes"):
        labels = getattr(criterion, name, None)
        if labels is not None and tuple(labels.shape) != (count,):
            raise ValueError(f"{name}: expected shape ({count},), one an image, got {tuple(labels.shape)}")


def check_bounds(x: ep.Tensor, model: Model, name: str = "inputs") -> None:
    """Raise ``ValueError`` unless all values lie in the model's bounds."""
    if len(x) == 0:
        return
    lower, upper = x.min().item(), x.max().item()
    if not (lower >= model.bounds.lower and upper <= model.bounds.upper):
        raise ValueError(
            f"{name}: expected values in the model's bounds [{model.bounds.lower}, {model.bounds.upper}], "
            f"got values from {lower} to {upper}"
        )


def as_starting_points(points: Any, x: ep.Tensor, model: Model) -> ep.Tensor:
    """Starting points with the type of the inputs.

    Raises:
        ValueError: they have another shape than the inputs, or lie outside the model's bounds.
    """
    starts: ep.Tensor = ep.astensor(points)
    if not isinstance(starts, type(x)):
        starts = ep.from_numpy(x, starts.numpy())
    starts = starts.astype(x.dtype)
    if tuple(starts.shape) != tuple(x.shape):
        raise ValueError(f"starting_points: expected shape {tuple(x.shape)}, got {tuple(starts.shape)}")
    check_bounds(starts, model, "starting_points")
    return starts


def _check_classes(criterion: Criterion, outputs: ep.Tensor) -> None:
    if not isinstance(criterion, (Misclassification, TargetedMisclassification)):
        return
    for name in ("labels", "target_classes"):
        labels = getattr(criterion, name, None)
        if labels is None or not len(labels):
            continue
        lowest, highest, last = labels.min().item(), labels.max().item(), outputs.shape[1] - 1
        if lowest < 0 or highest > last:
            raise ValueError(f"{name}: expected classes 0 to {last}, got values from {lowest} to {highest}")


class Oracle:
    """Answers "is this adversarial?" for some images of a batch, so that finished ones cost no query.

    Foolbox's criteria judge whole batches; the outputs of images that are not asked about are remembered from their
    last query. Creating it queries every image once, as it is.

    Attributes:
        clean: which images are adversarial as they are, ``(N,)``.

    Raises:
        ValueError: the criterion names classes that the model does not have.
    """

    def __init__(self, model: Model, criterion: Criterion, x: ep.Tensor) -> None:
        self._model, self._criterion = DecidingModel(model, criterion), criterion
        rows = np.arange(len(x))
        self._outputs = self._ask(x, rows)
        _check_classes(criterion, self._outputs)
        self._perturbed = x
        self.clean: Flags = self._judge(rows)

    def __call__(self, candidates: ep.Tensor, rows: Rows) -> Flags:
        """Whether ``candidates[i]`` is an adversarial for image ``rows[i]``; no row may occur twice."""
        outputs = self._ask(candidates, rows)
        if len(rows) == len(self._perturbed):
            order = np.argsort(rows)
            self._outputs, self._perturbed = outputs[order], candidates[order]
        else:
            self._outputs = ep.index_update(self._outputs, rows, outputs)
            self._perturbed = ep.index_update(self._perturbed, rows, candidates)
        return self._judge(rows)

    def _ask(self, images: ep.Tensor, rows: Rows) -> ep.Tensor:
        with query_rows(rows):
            return self._model.about(images, rows)

    def _judge(self, rows: Rows) -> Flags:
        flags: Flags = self._criterion(self._perturbed, self._outputs).numpy().astype(bool)[rows]
        return flags
