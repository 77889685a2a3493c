"""Counting and capping what an attack asks of a model."""

from __future__ import annotations

from typing import TypeVar

import eagerpy as ep
import numpy as np
import numpy.typing as npt
from foolbox.models import Model

from abs_defense._checks import check_counts
from abs_defense.attacks._base import Rows, WrappedModel, queried_rows

T = TypeVar("T")


class QueryLimitExceededError(RuntimeError):
    """An attack asked for more queries or gradients of an image than the ``QueryCounter`` allows."""


class QueryCounter(WrappedModel):
    """A foolbox model that counts the queries and gradients of each image of a batch.

    A query is one image passed through the model, a gradient one image in one backward pass from the outputs
    (counted for PyTorch models). Our attacks say which images their queries are about. Other attacks don't: calls
    with as many inputs as ``images`` count once for each, other calls are shared equally among the images.

    Args:
        model: the foolbox model to ask.
        images: number of images of the batch under attack.
        max_queries: the most queries an image, None for no limit.
        max_gradients: the most gradients an image, None for no limit.

    Attributes:
        queries: ``(images,)``.
        gradients: ``(images,)``.

    Raises:
        QueryLimitExceededError: at the call, before the model is asked for more than a limit.
        ValueError: ``images`` is not a whole number of at least 1, or less than the batch of an
            attack that names its images.
    """

    def __init__(
        self, model: Model, images: int, *, max_queries: float | None = None, max_gradients: float | None = None
    ) -> None:
        check_counts(images=images)
        super().__init__(model)
        self.max_queries = max_queries
        self.max_gradients = max_gradients
        self.queries: npt.NDArray[np.float64] = np.zeros(images)
        self.gradients: npt.NDArray[np.float64] = np.zeros(images)

    def __call__(self, inputs: T) -> T:
        x, restore_type = ep.astensor_(inputs)
        rows = queried_rows()
        if rows is not None and len(rows) != len(x):
            rows = None
        self._count(self.queries, len(x), rows, self.max_queries, "queries")
        outputs = self._model(x)
        if isinstance(outputs, ep.PyTorchTensor) and outputs.raw.requires_grad:
            outputs.raw.register_hook(
                lambda _: self._count(self.gradients, len(x), rows, self.max_gradients, "gradients")
            )
        return restore_type(outputs)

    def _count(
        self, counts: npt.NDArray[np.float64], size: int, rows: Rows | None, limit: float | None, what: str
    ) -> None:
        added = np.zeros_like(counts)
        if rows is not None:
            if rows.max(initial=0) >= len(counts):
                raise ValueError(f"images: expected the size of the batch, got {len(counts)} and image {rows.max()}")
            np.add.at(added, rows, 1.0)
        else:
            added += size / len(counts)
        if limit is not None and (counts + added > limit)[added > 0].any():
            raise QueryLimitExceededError(f"the attack asked for more than {limit:g} {what} of an image")
        counts += added
