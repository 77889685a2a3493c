"""One measurement of one model on some images: the arrays of a piece."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import foolbox
import numpy as np
import torch
from torch import Tensor, nn

from abs_defense._versions import hardware
from abs_defense.attacks import DistalAttack, FiniteDifferenceModel, QueryCounter, snap_to_threshold
from abs_defense.benchmark._code import attributes_digest
from abs_defense.benchmark._store import Arrays
from abs_defense.benchmark._suite import (
    NORMS,
    AttackSpec,
    CertificateSpec,
    DistalSpec,
    Measurement,
    ModelSpec,
    factory_name,
)
from abs_defense.certificates import certify
from abs_defense.models import ABS, Classifier, device_of, state_sha256

OnQueries = Callable[[int], None]
_FINITE_DIFFERENCE_CHUNK = 1568
_PROBE_IMAGES = 20
_ROUNDING = 1e-5


def measure(
    measurement: Measurement,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    on_queries: OnQueries | None = None,
    *,
    start: int = 0,
) -> Arrays:
    """Measure. All arrays have one row an image but ``seconds``, of computing, and ``hardware``, as JSON: one row.

    - clean: ``predictions``, ``confidences``;
    - attacks: ``distances`` (0 for images that are misclassified as they are, infinity where the attack failed or left
      [0, 1]),
      ``adversarials``, which for a model with ``binary_threshold`` went through ``snap_to_threshold``;
    - certificates: ``radius``, ``correct``, ``rival``, ``proved``;
    - distal adversarials: ``adversarials``, ``confidences``, ``predictions``, ``fooled``; a row a noise image;
    - all: ``queries`` and ``gradients`` of the model, an image.

    Foolbox's attacks draw from global random states; these are seeded and put back. ``on_queries`` is called with the
    number of images of every model call; of a certificate, at the end. ``start`` is the place of the first image
    among all of them, so that no two pieces get the same noise.
    """
    started = time.perf_counter()
    certifies = isinstance(measurement, CertificateSpec)  # which refuses models with hooks before them
    with _report_queries(model, None if certifies else on_queries), _seeded(seed):
        if isinstance(measurement, AttackSpec):
            arrays = _attack(measurement, model, x, y, seed)
        elif isinstance(measurement, CertificateSpec):
            arrays = _certify(measurement, model, x, y)
        elif isinstance(measurement, DistalSpec):
            arrays = _distal(measurement, model, x, start)
        else:
            arrays = _clean(model, x)
    if certifies and on_queries is not None:
        on_queries(len(x))
    seconds = time.perf_counter() - started
    return {**arrays, "seconds": np.array([seconds]), "hardware": np.array([json.dumps(hardware(x.device))])}


def describe(spec: ModelSpec, model: nn.Module) -> dict[str, Any]:
    """What a result of a model depends on: kind, settings, threshold if it binarises its input, hash of the weights,
    and for a module that is none of ours of the numbers and texts beside them. Not its code, see ``code_digests``."""
    kind: dict[str, Any] = {"class": f"{type(model).__module__}:{type(model).__qualname__}"}
    threshold = getattr(model, "binary_threshold", None)
    if threshold is not None:
        kind["binary_threshold"] = threshold
    if isinstance(model, Classifier):
        kind |= model.describe()
    else:
        kind |= {
            "factory": factory_name(spec.factory),
            "settings": spec.settings,
            "attributes_sha256": attributes_digest(model),
        }
    return {**kind, "weights_sha256": state_sha256(model)}


@dataclass(frozen=True)
class Speed:
    """Seconds that a model takes for one image: a query, and a gradient besides the query."""

    query: float
    gradient: float

    def of(self, measurement: Measurement) -> float:
        """Expected seconds an image."""
        return measurement.queries * self.query + measurement.gradients * self.gradient


def probe(model: nn.Module, x: Tensor) -> Speed:
    """Time a model on a few images; one that fails takes no time."""
    x = x[:_PROBE_IMAGES].to(device_of(model))
    if not len(x):
        return Speed(0.0, 0.0)

    def query() -> None:
        with torch.no_grad():
            model(x)

    def gradient() -> None:
        live = x.clone().requires_grad_()
        torch.autograd.grad(model(live).logsumexp(1).sum(), live)

    try:
        query()
        forward = both = _seconds(query)
        with contextlib.suppress(Exception):  # a model without gradients
            both = _seconds(gradient)
    except Exception:
        return Speed(0.0, 0.0)
    return Speed(forward / len(x), max(0.0, both - forward) / len(x))


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _confidences(model: nn.Module, logits: Tensor) -> Tensor:
    return model.confidence_softmax(logits) if isinstance(model, Classifier) else logits.softmax(1)


def _clean(model: nn.Module, x: Tensor) -> Arrays:
    with torch.no_grad():
        logits = model(x)
        predictions, confidences = logits.argmax(dim=1), _confidences(model, logits).amax(dim=1)
    return {
        "predictions": predictions.cpu().numpy(),
        "confidences": confidences.cpu().numpy(),
        **_counts(np.ones(len(x)), np.zeros(len(x))),
    }


def _attack(spec: AttackSpec, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Arrays:
    assert spec.norm is not None
    counter = QueryCounter(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), len(x))
    attacked = (
        FiniteDifferenceModel(counter, chunk=_FINITE_DIFFERENCE_CHUNK) if spec.gradient == "estimated" else counter
    )
    adversarials, _, _ = spec.make(x.device, seed)(attacked, x, y, epsilons=None)
    adversarials = _images_only(adversarials, x)
    threshold = getattr(model, "binary_threshold", None)
    with torch.no_grad():
        fooled = model(adversarials).argmax(1) != y
        misclassified = model(x).argmax(1) != y
        if threshold is not None:
            snapped = snap_to_threshold(x, adversarials, threshold=threshold)
            still = fooled & (model(snapped).argmax(1) != y)
            adversarials = torch.where(still[:, None, None, None], snapped, adversarials)
    distances = NORMS[spec.norm].distance(x, adversarials)
    distances = torch.where(fooled, distances, torch.inf)
    distances = torch.where(misclassified, 0.0, distances)
    return {
        "distances": distances.cpu().numpy(),
        "adversarials": adversarials.cpu().numpy(),
        **_counts(counter.queries, counter.gradients),
    }


def _images_only(adversarials: Tensor, x: Tensor) -> Tensor:
    """Where an attack left [0, 1] by more than rounding, or gave NaN, it found nothing: the original."""
    inside = ((adversarials >= -_ROUNDING) & (adversarials <= 1.0 + _ROUNDING)).flatten(1).all(dim=1)
    return torch.where(inside[:, None, None, None], adversarials.clamp(0.0, 1.0), x)


def _certify(spec: CertificateSpec, model: nn.Module, x: Tensor, y: Tensor) -> Arrays:
    assert spec.norm is not None
    if not isinstance(model, ABS):
        raise ValueError(f"certificates are for ABS models, not for {type(model).__name__}")
    certificate = certify(model, x, y, spec.norm, spec.method, **spec.settings)
    return {
        "radius": certificate.radius.cpu().numpy(),
        "correct": certificate.correct.cpu().numpy(),
        "rival": certificate.rival.cpu().numpy(),
        "proved": np.full(len(x), certificate.proved),
        **_counts(np.zeros(len(x)), np.zeros(len(x))),
    }


def _distal(spec: DistalSpec, model: nn.Module, x: Tensor, start: int) -> Arrays:
    noise = torch.rand((start + len(x), *x.shape[1:]))[start:].to(x)
    counter = QueryCounter(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), len(x))
    adversarials, _, fooled = DistalAttack(steps=spec.settings["steps"])(counter, noise)
    with torch.no_grad():
        logits = model(adversarials)
        confidences = _confidences(model, logits).amax(1)
    return {
        "adversarials": adversarials.cpu().numpy(),
        "fooled": fooled.cpu().numpy(),
        "confidences": confidences.cpu().numpy(),
        "predictions": logits.argmax(1).cpu().numpy(),
        **_counts(counter.queries, counter.gradients),
    }


def _counts(queries: Any, gradients: Any) -> Arrays:
    return {"queries": np.asarray(queries, dtype=np.float64), "gradients": np.asarray(gradients, dtype=np.float64)}


@contextlib.contextmanager
def _report_queries(model: nn.Module, on_queries: OnQueries | None) -> Iterator[None]:
    """Count calls before they are made: attacks ask for whole logits where a hook could see these."""

    def report(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert on_queries is not None
        on_queries(len(args[0]))

    handle = None if on_queries is None else model.register_forward_pre_hook(report)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
