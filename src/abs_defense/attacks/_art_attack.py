"""Attacks of ART on foolbox models."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import eagerpy as ep
import foolbox
import numpy as np
import torch
from foolbox.attacks.base import FixedEpsilonAttack, raise_if_kwargs
from foolbox.criteria import TargetedMisclassification
from foolbox.distances import Distance
from foolbox.models import Model
from torch import Tensor, nn

from abs_defense.attacks._base import ContractCall, as_criterion, check_labels, some_images

T = TypeVar("T")

_DISTANCES: dict[str, Distance] = {"l2": foolbox.distances.l2, "linf": foolbox.distances.linf}
_NORMS = {"l2": 2, "linf": np.inf}


class ARTAttack(ContractCall, FixedEpsilonAttack):  # type: ignore[misc]
    """An evasion attack of ART with a ``norm`` and an ``eps``, as a foolbox attack of a fixed epsilon.

    So the parts of AutoAttack that foolbox lacks run on any foolbox model over PyTorch:
    ``ARTAttack("AutoProjectedGradientDescent", "l2", loss_type="difference_logits_ratio", max_iter=50)`` and
    ``ARTAttack("SquareAttack", "linf", max_iter=500)``. With ``EpsilonSearchAttack`` around it, it is minimal.

    Args:
        attack: name of the attack in ``art.attacks.evasion``.
        norm: ``"l2"`` or ``"linf"``.
        seed: of the attack's random numbers; by default drawn from torch's global ones, from which foolbox's attacks
            draw. The global random states that ART uses are left as they were.
        settings: of ART's attack, other than ``norm`` and ``eps``. ``eps_step`` is twice the epsilon unless given, as
            in AutoAttack.

    Raises:
        ValueError: no such attack or norm, or one without ``norm`` and ``eps``; at the call, a criterion other than
            (targeted) misclassification, a targeted one where ART's attack has none, or a model not of PyTorch.
    """

    def __init__(
        self, attack: str, norm: Literal["l2", "linf"] = "l2", *, seed: int | None = None, **settings: Any
    ) -> None:
        if norm not in _DISTANCES:
            raise ValueError(f"norm: expected l2 or linf, got {norm!r}")
        if taken := {"norm", "eps", "targeted"} & settings.keys():
            raise ValueError(f"settings: {', '.join(sorted(taken))} comes from norm, epsilon and criterion")
        self.attack = attack
        self.norm = norm
        self.seed = seed
        self.settings = settings
        known = set(_art_attack(attack).attack_params)
        if not {"norm", "eps"} <= known:
            raise ValueError(f"attack: expected one with norm and eps, got {attack!r}")
        if unknown := settings.keys() - known:
            raise ValueError(f"settings: {attack} knows {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")

    @property
    def distance(self) -> Distance:
        """That of ``norm``."""
        return _DISTANCES[self.norm]

    def run(self, model: Model, inputs: T, criterion: Any, *, epsilon: float, **kwargs: Any) -> T:
        """Perturbed inputs at a distance of at most ``epsilon``; arguments are those of foolbox's attacks."""
        from art.estimators.classification import PyTorchClassifier

        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        if not isinstance(x, ep.PyTorchTensor):
            raise ValueError(f"inputs: ART attacks need PyTorch tensors here, got {type(inputs).__name__}")
        criterion = as_criterion(criterion, x)
        check_labels(criterion, len(x))
        targeted = type(criterion) is TargetedMisclassification
        some_images(criterion, np.arange(0))
        if len(x) == 0 or epsilon == 0:
            return inputs
        kind = _art_attack(self.attack)
        settings: dict[str, Any] = {"norm": _NORMS[self.norm], "eps": float(epsilon), **self.settings}
        if "eps_step" in kind.attack_params:
            settings.setdefault("eps_step", 2.0 * float(epsilon))
        if "verbose" in kind.attack_params:
            settings.setdefault("verbose", False)
        if targeted:
            if "targeted" not in kind.attack_params:
                raise ValueError(f"criterion: ART's {self.attack} has no targeted form")
            settings["targeted"] = True
        labels = criterion.target_classes if targeted else criterion.labels
        with torch.no_grad():
            classes = model(x[:1].raw).shape[-1]
        estimator = PyTorchClassifier(
            _Logits(model, x.raw.device),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=classes,
            clip_values=(model.bounds.lower, model.bounds.upper),
            device_type="gpu" if x.raw.is_cuda else "cpu",
        )
        seed = int(torch.randint(2**31, ())) if self.seed is None else self.seed
        with _seeded(seed):
            found = kind(estimator, **settings).generate(x.raw.detach().cpu().numpy(), labels.numpy())
        perturbed = ep.from_numpy(x, found).astype(x.dtype).clip(*model.bounds)
        return restore_type(perturbed)


class _Logits(nn.Module):
    """ART only knows the current GPU; the model may be on another one."""

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        self._model = model
        self._device = device

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self._model(images.to(self._device))
        return outputs.to(images.device)


def _art_attack(name: str) -> Any:
    from art.attacks import evasion

    found = getattr(evasion, name, None)
    if not hasattr(found, "attack_params"):
        raise ValueError(f"attack: expected the name of an attack in art.attacks.evasion, got {name!r}")
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random states as ART wants them, and afterwards as they were (its data loaders draw, too)."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
