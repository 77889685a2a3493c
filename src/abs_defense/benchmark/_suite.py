"""The suite: which models are measured how. Presets, and additions from Python or a TOML file."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import foolbox
from foolbox import attacks as fa
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from torch import nn

from abs_defense._checks import check_choices
from abs_defense.attacks import (
    ARTAttack,
    EpsilonSearchAttack,
    L0BisectorAttack,
    L2BisectorAttack,
    LatentDescentAttack,
    LInfBisectorAttack,
    PointwiseAttack,
    StartedAttack,
)
from abs_defense.certificates import NORM_NAMES, Method, Norm
from abs_defense.inference import Solver
from abs_defense.models import ABS_NAMES, MODEL_NAMES, PROTOTYPE_NAMES, load_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Factory = str | Callable[..., Any]


@dataclass(frozen=True)
class NormSpec:
    """How distances of a norm are shown: its symbol, the paper's threshold, and how to measure it."""

    label: str
    threshold: float
    distance: Any


NORMS: dict[Norm, NormSpec] = {
    "l2": NormSpec("L2", 1.5, foolbox.distances.l2),
    "linf": NormSpec("L∞", 0.3, foolbox.distances.linf),
    "l0": NormSpec("L0", 12.0, foolbox.distances.l0),
}


def _check_entry(what: str, spec: ModelSpec | AttackSpec, settings: object) -> None:
    if not isinstance(spec.name, str):
        raise ValueError(f"{what} {spec.name!r}: name: expected a text, got {type(spec.name).__name__}")
    if not isinstance(settings, dict):
        raise ValueError(f"{what} {spec.name!r}: settings: expected a table of arguments, got {settings!r}")
    if not callable(spec.factory) and not (isinstance(spec.factory, str) and ":" in spec.factory):
        raise ValueError(f"{what} {spec.name!r}: factory: expected 'package.module:attribute', got {spec.factory!r}")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the evaluation.

    Attributes:
        name: used in files and tables.
        factory: gives a module of images in [0, 1] that returns logits; or ``"package.module:attribute"``.
        settings: keyword arguments of the factory.
        kind: which of the suite's measurements apply; one of our models' names, or anything else for those that serve
            every network.
    """

    name: str
    factory: Factory
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "other"

    def __post_init__(self) -> None:
        _check_entry("model", self, settings=self.settings)

    def resolve(self) -> Callable[..., Any]:
        """The factory.

        Raises:
            ValueError: it can't be found.
        """
        return _resolve(self.factory)

    def make(self) -> nn.Module:
        """The model, in evaluation mode.

        Raises:
            ValueError: the factory can't be found, or refuses the settings.
        """
        try:
            model: nn.Module = self.resolve()(**self.settings)
        except TypeError as error:
            raise ValueError(f"model {self.name!r}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model {self.name!r}: expected a torch module from its factory, got {type(model).__name__}"
            )
        return model.eval()


@dataclass(frozen=True)
class Measurement:
    """Something to find out about a model and images.

    Attributes:
        name: used in files and tables.
        norm: of the distances or radii; None if there are none.
        settings: part of every result.
        models: kinds that it serves; empty for all.
        queries: expected an image, for estimates of the time.
        gradients: likewise.
        piece: the most images of one piece of work; see ``piece_for``.

    Raises:
        ValueError: a field is out of its range.
    """

    name: str
    norm: Norm | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()
    queries: float = 1
    gradients: float = 0
    piece: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.models, str):
            raise ValueError(f"{self.name}: models: expected a list of kinds, got {self.models!r}")
        if not (self.queries >= 0 and self.gradients >= 0):
            raise ValueError(
                f"{self.name}: queries, gradients: expected numbers of at least 0, got {self.queries}, {self.gradients}"
            )
        if self.piece < 1:
            raise ValueError(f"{self.name}: piece: expected at least 1 image, got {self.piece}")

    def serves(self, kind: str) -> bool:
        return not self.models or kind in self.models or ("other" in self.models and kind not in MODEL_NAMES)

    def piece_for(self, kind: str) -> int:
        """The most images of a piece on a model of this kind: fewer where latent descent makes queries dear."""
        if kind not in ABS_WITH_DESCENT:
            return self.piece
        return min(self.piece, max(1, int(_QUERIES_OF_A_PIECE_WITH_DESCENT / max(1.0, self.queries))))

    def identity(self) -> dict[str, Any]:
        """What its results depend on, besides the model, the images and the seed."""
        return self.settings


@functools.cache
def _surrogate(name: str) -> tuple[nn.Module, str]:
    model = load_model(name)
    return model, model.weights_sha256()


@dataclass(frozen=True)
class AttackSpec(Measurement):
    """A foolbox attack.

    Attributes:
        factory: makes the attack from the settings; or ``"package.module:attribute"``.
        epsilons: for attacks of a fixed epsilon: those to try, see ``EpsilonSearchAttack``.
        gradient: the model's own, or ``"estimated"`` by coordinate-wise finite differences (2 * 784 queries each).
        surrogate: name of the model on which an attack of a fixed epsilon is crafted, for a transfer attack.

    Raises:
        ValueError: a field is out of its range; from ``identity``, the factory has no name that others could find.
    """

    factory: Factory = ""
    epsilons: Sequence[float] = ()
    gradient: Literal["model", "estimated"] = "model"
    surrogate: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_entry("attack", self, settings=self.settings)
        if self.norm not in NORM_NAMES:
            raise ValueError(f"attack {self.name!r}: norm: expected l2, linf or l0, got {self.norm!r}")
        if self.surrogate not in (None, *MODEL_NAMES):
            raise ValueError(f"attack {self.name!r}: no model {self.surrogate!r} to craft on")
        if isinstance(self.epsilons, (str, int, float)):
            raise ValueError(f"attack {self.name!r}: epsilons: expected a list of numbers, got {self.epsilons!r}")
        if self.gradient not in ("model", "estimated"):
            raise ValueError(f"{self.name}: gradient: expected 'model' or 'estimated', got {self.gradient!r}")

    def identity(self) -> dict[str, Any]:
        name = factory_name(self.factory)
        if "<" in name:  # <lambda>, <locals>, <... object at 0x...>
            raise ValueError(
                f"attack {self.name!r}: factory: expected a class or function at the top of a module, or "
                f"'package.module:attribute', got {name!r}; results are kept under its name"
            )
        return {
            **self.settings,
            "factory": name,
            "epsilons": list(self.epsilons),
            "gradient": self.gradient,
            "surrogate": None if self.surrogate is None else [self.surrogate, _surrogate(self.surrogate)[1]],
        }

    def resolve(self) -> Callable[..., Any]:
        """The factory.

        Raises:
            ValueError: it can't be found.
        """
        return _resolve(self.factory)

    def make(self, device: Any = "cpu", seed: int = 0) -> MinimizationAttack:
        """The attack; one that takes a ``seed`` gets it, unless the settings have their own.

        Raises:
            ValueError: the factory can't be found, or refuses the settings; an attack of a fixed epsilon has no
                epsilons.
        """
        factory = self.resolve()
        try:
            own = {"seed": seed} if "seed" in inspect.signature(factory).parameters else {}
            attack = factory(**{**own, **self.settings})
            if self.surrogate is None and not isinstance(attack, FixedEpsilonAttack):
                if self.epsilons:
                    raise ValueError(f"epsilons: {type(attack).__name__} takes none, it looks for the smallest itself")
                return cast(MinimizationAttack, attack)
            surrogate = None
            if self.surrogate is not None:
                model = copy.deepcopy(_surrogate(self.surrogate)[0]).to(device)
                surrogate = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
            return EpsilonSearchAttack(attack, self.epsilons, surrogate=surrogate)
        except (TypeError, ValueError) as error:
            raise ValueError(f"attack {self.name!r}: {error}") from error


@dataclass(frozen=True)
class CertificateSpec(Measurement):
    """Certified radii of an ABS model.

    Attributes:
        method: of ``certify``.
    """

    method: Method = "bisector"
    piece: int = 500

    def identity(self) -> dict[str, Any]:
        return {**self.settings, "method": self.method, "norm": self.norm}


@dataclass(frozen=True)
class DistalSpec(Measurement):
    """Distal adversarials: from noise to 90 % confidence. The noise takes the place of the first images.

    Attributes:
        images: number of noise images.
    """

    images: int = 5


CLEAN = Measurement("clean")
DISTAL = DistalSpec("distal", settings={"steps": 60}, queries=31, gradients=30)

ABS_WITH_DESCENT = ("abs", "binary-abs")
NETWORK_KINDS = ("cnn", "binary-cnn", "nearest-neighbor", "madry", "other")

_QUERIES_OF_A_PIECE = 1e6
_QUERIES_OF_A_PIECE_WITH_DESCENT = 280_000  # an hour or two on one core
_L2_EPSILONS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)
_LINF_EPSILONS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


def _started(attack: Callable[..., MinimizationAttack], **settings: Any) -> MinimizationAttack:
    return StartedAttack(attack(**settings))


def _pointwise_from_bisector(*, seed: int = 0, **settings: Any) -> MinimizationAttack:
    return PointwiseAttack(init_attack=L0BisectorAttack(), seed=seed, **settings)


BOUNDARY = partial(_started, fa.BoundaryAttack)
HOP_SKIP_JUMP = partial(_started, fa.HopSkipJumpAttack)
L2_BRENDEL_BETHGE = partial(_started, fa.L2BrendelBethgeAttack)
LINF_BRENDEL_BETHGE = partial(_started, fa.LinfinityBrendelBethgeAttack)
L0_BRENDEL_BETHGE = partial(_started, fa.L0BrendelBethgeAttack)
POINTWISE_FROM_BISECTOR = _pointwise_from_bisector
L2_APGD, LINF_APGD = (partial(ARTAttack, "AutoProjectedGradientDescent", norm) for norm in ("l2", "linf"))
L2_SQUARE, LINF_SQUARE = (partial(ARTAttack, "SquareAttack", norm) for norm in ("l2", "linf"))
L2_POINTWISE = partial(PointwiseAttack, norm="l2")


def _attack(
    name: str,
    norm: Norm,
    factory: Factory,
    queries: float,
    gradients: float = 0,
    models: Sequence[str] = (),
    epsilons: Sequence[float] = (),
    surrogate: str | None = None,
    **settings: Any,
) -> AttackSpec:
    return AttackSpec(
        name,
        norm,
        settings,
        models,
        queries,
        gradients,
        factory=factory,
        epsilons=epsilons,
        surrogate=surrogate,
    )


def _with_estimates(spec: AttackSpec, points: float | None = None) -> tuple[AttackSpec, AttackSpec]:
    """The attack with the model's gradient, and with the paper's estimated one, at so many different points. Since each
    image's estimates fill a batch, pieces of few images cost nothing; so a kill never loses much."""
    queries = spec.queries + 2 * 784 * (spec.gradients if points is None else points)
    estimated = replace(
        spec,
        name=f"{spec.name}-estimated",
        gradient="estimated",
        queries=queries,
        gradients=0.0,
        piece=min(spec.piece, max(1, int(_QUERIES_OF_A_PIECE / queries))),
    )
    return spec, estimated


# name, norm, attack, expected queries and gradients an image, settings.
QUICK: Sequence[Measurement] = (
    CLEAN,
    _attack("l2-bisector", "l2", L2BisectorAttack, 18, models=ABS_NAMES, steps=8, rivals=1),
    _attack("ddn", "l2", fa.DDNAttack, 32, 30, models=NETWORK_KINDS, steps=30),
    _attack("linf-bisector", "linf", LInfBisectorAttack, 18, models=ABS_NAMES, steps=8, rivals=1),
    _attack("linf-fmn", "linf", fa.LInfFMNAttack, 32, 30, models=NETWORK_KINDS, steps=30),
    _attack("l0-bisector", "l0", L0BisectorAttack, 10, models=ABS_NAMES, steps=8, rivals=1),
    _attack("l0-fmn", "l0", fa.L0FMNAttack, 32, 30, models=NETWORK_KINDS, steps=30),
    # Without gradients; nearest neighbour is slow.
    _attack("pointwise-l2", "l2", L2_POINTWISE, 350, models=("cnn", "binary-cnn", "madry", "other"), start_draws=20),
    _attack("pointwise", "l0", PointwiseAttack, 300, models=("cnn", "binary-cnn", "madry", "other"), start_draws=20),
    CertificateSpec("bisector-l2", "l2", models=PROTOTYPE_NAMES),
    replace(DISTAL, settings={"steps": 25}, images=3),
)

PAPER: Sequence[Measurement] = (
    CLEAN,
    # L2
    _attack("l2-transfer", "l2", fa.L2BasicIterativeAttack, 24, epsilons=_L2_EPSILONS, surrogate="cnn"),
    _attack(
        "gaussian-noise",
        "l2",
        fa.L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack,
        260,
        epsilons=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20),
        repeats=20,
    ),
    _attack("boundary", "l2", BOUNDARY, 27000, steps=25000),
    _attack("pointwise-l2", "l2", L2_POINTWISE, 1200, start_draws=20),
    *_with_estimates(_attack("fgm", "l2", fa.L2FastGradientAttack, 24, 12, epsilons=_L2_EPSILONS), points=1),
    *_with_estimates(_attack("l2-deepfool", "l2", fa.L2DeepFoolAttack, 50, 50, steps=50)),
    *_with_estimates(_attack("l2-bim", "l2", fa.L2BasicIterativeAttack, 130, 120, epsilons=_L2_EPSILONS)),
    _attack("latent-descent", "l2", LatentDescentAttack, 130, models=ABS_WITH_DESCENT),
    # L-infinity
    _attack("linf-transfer", "linf", fa.LinfBasicIterativeAttack, 24, epsilons=_LINF_EPSILONS, surrogate="cnn"),
    *_with_estimates(_attack("fgsm", "linf", fa.LinfFastGradientAttack, 24, 12, epsilons=_LINF_EPSILONS), points=1),
    *_with_estimates(_attack("linf-deepfool", "linf", fa.LinfDeepFoolAttack, 50, 50, steps=50)),
    *_with_estimates(_attack("linf-bim", "linf", fa.LinfBasicIterativeAttack, 130, 120, epsilons=_LINF_EPSILONS)),
    *_with_estimates(_attack("mim", "linf", fa.MIFGSM, 130, 120, epsilons=_LINF_EPSILONS)),
    # L0
    _attack("salt-and-pepper", "l0", fa.SaltAndPepperNoiseAttack, 500, steps=500),
    _attack("pointwise", "l0", PointwiseAttack, 1800, restarts=10, start_draws=20),
    # The paper's bound, as tight as it gets.
    CertificateSpec("bisector-l2", "l2", models=PROTOTYPE_NAMES),
    CertificateSpec("bisector-l2-estimated", "l2", models=ABS_WITH_DESCENT, queries=25, piece=50),
    DISTAL,
)

_CE, _DLR = "cross_entropy", "difference_logits_ratio"

TODAY: Sequence[Measurement] = (
    _attack("l2-bisector", "l2", L2BisectorAttack, 45, models=ABS_NAMES, steps=20, rivals=3),
    _attack("ddn", "l2", fa.DDNAttack, 102, 100, steps=100),
    _attack("l2-fmn", "l2", fa.L2FMNAttack, 102, 100, steps=100),
    _attack("l2-brendel-bethge", "l2", L2_BRENDEL_BETHGE, 300, 200, steps=200),
    # The parts of AutoAttack that are not in foolbox.
    _attack("l2-apgd-ce", "l2", L2_APGD, 800, 360, epsilons=_L2_EPSILONS, loss_type=_CE, max_iter=50, nb_random_init=1),
    _attack(
        "l2-apgd-dlr", "l2", L2_APGD, 800, 360, epsilons=_L2_EPSILONS, loss_type=_DLR, max_iter=50, nb_random_init=1
    ),
    _attack("l2-square", "l2", L2_SQUARE, 3500, epsilons=_L2_EPSILONS, max_iter=500),
    _attack("hop-skip-jump", "l2", HOP_SKIP_JUMP, 6000, steps=20, max_gradient_eval_steps=400),
    _attack("linf-bisector", "linf", LInfBisectorAttack, 45, models=ABS_NAMES, steps=20, rivals=3),
    _attack("linf-fmn", "linf", fa.LInfFMNAttack, 102, 100, steps=100),
    _attack(
        "linf-apgd-ce",
        "linf",
        LINF_APGD,
        800,
        360,
        epsilons=_LINF_EPSILONS,
        loss_type=_CE,
        max_iter=50,
        nb_random_init=1,
    ),
    _attack(
        "linf-apgd-dlr",
        "linf",
        LINF_APGD,
        800,
        360,
        epsilons=_LINF_EPSILONS,
        loss_type=_DLR,
        max_iter=50,
        nb_random_init=1,
    ),
    _attack("linf-square", "linf", LINF_SQUARE, 3500, epsilons=_LINF_EPSILONS, max_iter=500),
    _attack("linf-brendel-bethge", "linf", LINF_BRENDEL_BETHGE, 300, 200, steps=200),
    _attack("l0-bisector", "l0", L0BisectorAttack, 45, models=ABS_NAMES, steps=20, rivals=3),
    _attack("l0-bisector-pointwise", "l0", POINTWISE_FROM_BISECTOR, 110, models=ABS_NAMES, restarts=3),
    _attack("l0-fmn", "l0", fa.L0FMNAttack, 102, 100, steps=100),
    _attack("l0-brendel-bethge", "l0", L0_BRENDEL_BETHGE, 300, 200, steps=200),
    CertificateSpec("bisector-linf", "linf", models=PROTOTYPE_NAMES),
    CertificateSpec("bisector-l0", "l0", models=PROTOTYPE_NAMES),
)

PRESETS: dict[str, Sequence[Measurement]] = {"quick": QUICK, "paper": PAPER, "full": (*PAPER, *TODAY)}


def choose_measurements(
    preset: str, names: Sequence[str] = (), *, skip: Sequence[str] = (), added: Sequence[Measurement] = ()
) -> Sequence[Measurement]:
    """The measurements of a preset and the added ones; or with ``names`` the clean figures and the named ones of all
    presets. Those in ``skip`` are left out.

    Raises:
        ValueError: no such preset or measurement, or an added one with the name of another.
    """
    check_choices(preset=(preset, PRESETS))
    everything = {m.name: m for m in (*PRESETS["quick"], *PRESETS["full"], *PRESETS[preset])}
    for measurement in added:
        if everything.setdefault(measurement.name, measurement) is not measurement:
            raise ValueError(f"attack {measurement.name!r}: there is another one of this name")
    for name in (*names, *skip):
        check_choices(measurement=(name, everything))
    chosen = [CLEAN, *(everything[name] for name in names)] if names else [*PRESETS[preset], *added]
    unique = {measurement.name: measurement for measurement in chosen}
    return [m for m in unique.values() if m.name not in skip]


def our_model(name: str, *, weights: str | Path | None = None, solver: Solver = "bfgs", seed: int = 0) -> ModelSpec:
    """One of the models of ``load_model``; ``solver`` and ``seed`` are for those of ABS."""
    settings: dict[str, Any] = {"name": name}
    if name in ABS_NAMES:
        settings |= {"weights": None if weights is None else str(weights), "solver": solver, "seed": seed}
    elif weights is not None:
        settings["weights"] = str(weights)
    return ModelSpec(name, load_model, settings, kind=name)


def load_additions(path: str | Path) -> tuple[list[ModelSpec], list[Measurement]]:
    """Models and attacks from a TOML file, with ``[[models]]`` (name, factory, settings, kind) and ``[[attacks]]``
    (name, norm, factory, settings, epsilons, gradient, surrogate, models, queries, gradients).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, or an entry is wrong.
    """
    with Path(path).open("rb") as file:
        try:
            raw = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: {error}") from error
    unknown = raw.keys() - {"models", "attacks"}
    if unknown:
        raise ValueError(f"{path}: expected [[models]] and [[attacks]], got {', '.join(sorted(unknown))}")
    for table, entries in raw.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: {table}: expected tables [[{table}]], got {entries!r}")
    models = [_entry(path, ModelSpec, entry) for entry in raw.get("models", [])]
    attacks = [_entry(path, AttackSpec, entry) for entry in raw.get("attacks", [])]
    for spec in (*models, *attacks):
        spec.resolve()
    return models, list(attacks)


def _entry(path: str | Path, kind: type[Any], raw: Mapping[str, Any]) -> Any:
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})
    except TypeError as error:
        raise ValueError(f"{path}: {raw.get('name', 'an entry without a name')}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _resolve(factory: Factory) -> Callable[..., Any]:
    if not isinstance(factory, str):
        return factory
    module, _, attribute = factory.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"factory: expected 'package.module:attribute', got {factory!r}: {error}") from error
    return cast(Callable[..., Any], found)


def factory_name(factory: Factory) -> str:
    """Where the factory is found, with the arguments that a ``partial`` fixes."""
    if isinstance(factory, str):
        return factory
    if isinstance(factory, partial):
        parts = [factory_name(part) if callable(part) else str(part) for part in (factory.func, *factory.args)]
        return ", ".join([*parts, *(f"{key}={value!r}" for key, value in sorted(factory.keywords.items()))])
    named: Any = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}:{named.__qualname__}"
