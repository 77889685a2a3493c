"""Other people's attacks and tools, each called as its documentation says. ``benchmarks/compatibility.py`` runs them
all and writes docs/compatibility.md; ``tests/test_third_party.py`` runs the quick ones.

Catalogues are read from the installed libraries, so an attack that a new version adds appears by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import foolbox as fb
import numpy as np
import torch
from torch import Tensor, nn

from abs_defense import load_model
from abs_defense.models import Classifier, Clipped

BOUNDS = {"L2": 3.0, "L∞": 0.3, "L1": 40.0, "L0": None, "": None}
_NORMS = {0: "L0", 1: "L1", 2: "L2", np.inf: "L∞"}


class Bench(NamedTuple):
    """What is attacked."""

    model: Classifier
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """One attack or tool.

    Attributes:
        library, name: of the attack.
        norm: ``"L2"``, ``"L∞"``, ``"L1"``, ``"L0"``, or empty.
        bound: the largest distance allowed; None for attacks that minimise it or know none.
        run: returns the perturbed images, or a finding in words; None if the attack does not apply.
        settings: other than the library's defaults.
        reason: why it does not apply.
        binary: run it on Binary ABS instead.
    """

    library: str
    name: str
    norm: str = ""
    bound: float | None = None
    run: Callable[[Bench], Tensor | str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    binary: bool = False


def rows() -> list[Row]:
    """All rows of the installed libraries, and one that says so for each library that is missing."""
    found: list[Row] = []
    for library, catalogue in CATALOGUES.items():
        module = _MODULES[library]
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            found.append(Row(library, "all", reason="not installed"))
        else:
            found.extend(catalogue())
    return found


# foolbox

_FOOLBOX: dict[str, dict[str, Any]] = {
    "VirtualAdversarialAttack": {"settings": {"steps": 10}},
    "DDNAttack": {"settings": {"steps": 40}},
    "L1ProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "L2ProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "LinfProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "L1AdamProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "L2AdamProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "LinfAdamProjectedGradientDescentAttack": {"settings": {"steps": 30}},
    "InversionAttack": {},
    "BinarySearchContrastReductionAttack": {},
    "LinearSearchContrastReductionAttack": {"settings": {"steps": 50}},
    "L2CarliniWagnerAttack": {"settings": {"binary_search_steps": 5, "steps": 60, "initial_const": 1.0}},
    "NewtonFoolAttack": {"settings": {"steps": 40}},
    "EADAttack": {"settings": {"binary_search_steps": 4, "steps": 40, "initial_stepsize": 0.1}, "norm": "L1"},
    "L0FMNAttack": {"settings": {"steps": 40}},
    "L1FMNAttack": {"settings": {"steps": 40}},
    "L2FMNAttack": {"settings": {"steps": 40}},
    "LInfFMNAttack": {"settings": {"steps": 40}},
    "GaussianBlurAttack": {"settings": {"steps": 30}},
    "SpatialAttack": {"norm": ""},
    "SaltAndPepperNoiseAttack": {"settings": {"steps": 100}},
    "LinearSearchBlendedUniformNoiseAttack": {"settings": {"steps": 30}},
    "BinarizationRefinementAttack": {"call": "starts", "binary": True},
    "DatasetAttack": {"call": "feed"},
    "BoundaryAttack": {"settings": {"steps": 100}, "call": "starts"},
    "HopSkipJumpAttack": {
        "settings": {"steps": 2, "initial_gradient_eval_steps": 30, "max_gradient_eval_steps": 50},
        "call": "starts",
        "norm": "L2",
    },
    "L0BrendelBethgeAttack": {"settings": {"steps": 10}, "call": "starts"},
    "L1BrendelBethgeAttack": {"settings": {"steps": 10}, "call": "starts"},
    "L2BrendelBethgeAttack": {"settings": {"steps": 10}, "call": "starts"},
    "LinfinityBrendelBethgeAttack": {"settings": {"steps": 10}, "call": "starts"},
    "GenAttack": {"settings": {"steps": 10, "channel_axis": 1}, "call": "targeted"},
    "PointwiseAttack": {"settings": {"l2_binary_search": False}, "call": "starts", "norm": "L0"},
}


def _foolbox() -> Iterator[Row]:
    for name, kind in inspect.getmembers(fb.attacks, inspect.isclass):
        if not issubclass(kind, fb.attacks.base.Attack) or inspect.isabstract(kind) or name != kind.__name__:
            continue
        if not kind.__module__.startswith("foolbox."):  # ours, after register()
            continue
        known = _FOOLBOX.get(name, {})
        settings = known.get("settings", {})
        distance = getattr(kind, "distance", None)
        if isinstance(distance, property):  # some know it only when made, some leave it to the user
            with contextlib.suppress(ValueError, AttributeError):
                distance = kind(**settings).distance
        norm = known.get("norm") or _NORMS.get(getattr(distance, "p", None), "")
        fixed = issubclass(kind, fb.attacks.base.FixedEpsilonAttack)
        bound = BOUNDS[norm] if fixed else None
        run = partial(_run_foolbox, kind, settings, bound, known.get("call", ""))
        yield Row("foolbox", name, norm, bound, run, settings, binary=known.get("binary", False))


def _run_foolbox(kind: Any, settings: dict[str, Any], bound: float | None, call: str, bench: Bench) -> Tensor:
    model = fb.PyTorchModel(bench.model.eval(), bounds=(0, 1), device="cpu")
    images, labels = bench.images, bench.labels
    criterion: Any = fb.criteria.Misclassification(labels)
    attack = kind(**settings)
    extra: dict[str, Any] = {}
    if call == "feed":
        attack.feed(model, images)
    if call == "starts":
        extra["starting_points"] = others(images, labels)
    if call == "targeted":
        criterion = fb.criteria.TargetedMisclassification(others(labels, labels))
    advs, _, _ = attack(model, images, criterion, epsilons=bound, **extra)
    perturbed: Tensor = advs
    return perturbed


def others(values: Tensor, labels: Tensor) -> Tensor:
    """For each image the value of another one with another label: starting points, targets."""
    n = len(labels)
    index = [next((i + k) % n for k in range(1, n) if labels[(i + k) % n] != labels[i]) for i in range(n)]
    return values[torch.tensor(index)]


# Adversarial Robustness Toolbox

_TENSORFLOW = "needs a TensorFlow classifier"
_SPEECH = "speech recognition"
_DETECTORS = "object detectors"
_ART_REASONS = {
    "AdversarialPatchTensorFlowV2": _TENSORFLOW,
    "AdversarialPatch": "chooses AdversarialPatchPyTorch",
    "AdversarialPatchPyTorch": "needs torchvision",
    "AdversarialTexturePyTorch": "object trackers on video",
    "CarliniWagnerASR": _SPEECH,
    "CompositeAdversarialAttackPyTorch": "turns hue and saturation, which grey images have not",
    "DPatch": _DETECTORS,
    "DecisionTreeAttack": "decision trees of scikit-learn",
    "FeatureAdversariesNumpy": "asks for the activations of a hidden layer; inference has none",
    "FeatureAdversariesPyTorch": "asks for the activations of a hidden layer; inference has none",
    "FeatureAdversariesTensorFlowV2": _TENSORFLOW,
    "FrameSaliencyAttack": "video",
    "GRAPHITEBlackbox": "perspectives of colour photographs, by OpenCV",
    "GRAPHITEWhiteboxPyTorch": "perspectives of colour photographs, by OpenCV",
    "HighConfidenceLowUncertainty": "Gaussian processes of GPy",
    "ImperceptibleASR": _SPEECH,
    "ImperceptibleASRPyTorch": _SPEECH,
    "LaserAttack": "coloured beams on colour images",
    "LowProFool": "tables of features, not images",
    "MalwareGDTensorFlow": "malware",
    "OverTheAirFlickeringPyTorch": "video",
    "OverloadPyTorch": _DETECTORS,
    "ProjectedGradientDescentTensorFlowV2": _TENSORFLOW,
    "RobustDPatch": _DETECTORS,
    "SNAL": _DETECTORS,
}
_ART: dict[str, list[dict[str, Any]]] = {
    "AdversarialPatchNumpy": [{"settings": {"max_iter": 20, "scale_min": 0.4, "scale_max": 0.6}, "call": "patch"}],
    "AutoAttack": [
        {"norm": "L∞", "settings": {"norm": np.inf, "eps": 0.3, "eps_step": 0.1}},
        {"norm": "L2", "settings": {"norm": 2, "eps": 3.0, "eps_step": 0.5}},
    ],
    "AutoConjugateGradient": [{"norm": "L∞", "settings": {"eps": 0.3, "max_iter": 20, "nb_random_init": 1}}],
    "AutoProjectedGradientDescent": [
        {"norm": "L∞", "settings": {"eps": 0.3, "max_iter": 20, "nb_random_init": 1}},
        {"norm": "L2", "settings": {"norm": 2, "eps": 3.0, "eps_step": 1.0, "max_iter": 20, "nb_random_init": 1}},
    ],
    "BasicIterativeMethod": [{"norm": "L∞", "settings": {"eps": 0.3, "eps_step": 0.05, "max_iter": 20}}],
    "BoundaryAttack": [
        {"norm": "L2", "minimal": True, "settings": {"targeted": False, "max_iter": 5, "num_trial": 5}},
    ],
    "BrendelBethgeAttack": [{"norm": "L2", "minimal": True, "settings": {"norm": 2, "steps": 10, "init_size": 50}}],
    "CarliniL0Method": [
        {
            "norm": "L0",
            "minimal": True,
            "settings": {
                "max_iter": 5,
                "binary_search_steps": 2,
                "learning_rate": 0.3,
                "initial_const": 10.0,
                "batch_size": 8,
            },
        }
    ],
    "CarliniL2Method": [
        {
            "norm": "L2",
            "minimal": True,
            "settings": {
                "max_iter": 15,
                "binary_search_steps": 3,
                "learning_rate": 0.1,
                "initial_const": 10.0,
                "batch_size": 8,
            },
        }
    ],
    "CarliniLInfMethod": [
        {"norm": "L∞", "minimal": True, "settings": {"max_iter": 3, "largest_const": 1.0, "initial_const": 0.1}}
    ],
    "DeepFool": [{"norm": "L2", "minimal": True, "settings": {"max_iter": 20, "batch_size": 8}}],
    "ElasticNet": [
        {
            "norm": "L1",
            "minimal": True,
            "settings": {
                "max_iter": 30,
                "binary_search_steps": 3,
                "learning_rate": 0.1,
                "initial_const": 10.0,
                "batch_size": 8,
            },
        }
    ],
    "FastGradientMethod": [
        {"norm": "L∞", "settings": {"eps": 0.3}},
        {"norm": "L2", "settings": {"norm": 2, "eps": 3.0}},
    ],
    "GeoDA": [{"norm": "L2", "minimal": True, "settings": {"max_iter": 300}}],
    "HopSkipJump": [{"norm": "L2", "minimal": True, "settings": {"max_iter": 2, "max_eval": 50, "init_eval": 20}}],
    "MomentumIterativeMethod": [{"norm": "L∞", "settings": {"eps": 0.3, "eps_step": 0.05, "max_iter": 20}}],
    "NewtonFool": [{"norm": "L2", "minimal": True, "settings": {"max_iter": 20, "batch_size": 8}}],
    "PixelAttack": [{"norm": "L0", "minimal": True, "settings": {"th": 20, "max_iter": 1}}],
    "ProjectedGradientDescentNumpy": [{"norm": "L∞", "settings": {"eps": 0.3, "eps_step": 0.05, "max_iter": 20}}],
    "ProjectedGradientDescentPyTorch": [{"norm": "L∞", "settings": {"eps": 0.3, "eps_step": 0.05, "max_iter": 20}}],
    "ProjectedGradientDescent": [
        {"norm": "L∞", "settings": {"eps": 0.3, "eps_step": 0.05, "max_iter": 20}},
        {"norm": "L2", "settings": {"norm": 2, "eps": 3.0, "eps_step": 0.5, "max_iter": 20}},
    ],
    "RescalingAutoConjugateGradient": [{"norm": "L∞", "settings": {"eps": 0.3, "max_iter": 20, "nb_random_init": 1}}],
    "SaliencyMapMethod": [
        {"norm": "L0", "minimal": True, "settings": {"theta": 1.0, "gamma": 0.05}, "call": "targeted"},
    ],
    "ShadowAttack": [{"settings": {"nb_steps": 10}, "call": "one image"}],
    "SignOPTAttack": [
        {"norm": "L2", "minimal": True, "settings": {"targeted": False, "max_iter": 3, "num_trial": 5, "k": 10}},
    ],
    "SimBA": [
        {
            "norm": "L2",
            "minimal": True,
            "settings": {"attack": "px", "epsilon": 0.5, "max_iter": 50},
            "likely": True,
        }
    ],
    "SpatialTransformation": [
        {"settings": {"max_translation": 20, "num_translations": 3, "max_rotation": 30, "num_rotations": 3}}
    ],
    "SquareAttack": [
        {"norm": "L∞", "settings": {"eps": 0.3, "max_iter": 200}},
        {"norm": "L2", "settings": {"norm": 2, "eps": 3.0, "max_iter": 200}},
    ],
    "TargetedUniversalPerturbation": [
        {
            "norm": "L∞",
            "settings": {"eps": 0.3, "max_iter": 3, "attacker_params": {"eps": 0.3, "targeted": True}},
            "call": "targeted",
        }
    ],
    "ThresholdAttack": [{"norm": "L∞", "minimal": True, "settings": {"th": 60, "max_iter": 1}}],
    "UniversalPerturbation": [
        {"norm": "L∞", "settings": {"attacker": "fgsm", "attacker_params": {"eps": 0.3}, "eps": 0.3, "max_iter": 3}},
    ],
    "VirtualAdversarialMethod": [
        {"norm": "L2", "settings": {"eps": 3.0, "finite_diff": 0.1, "max_iter": 1, "batch_size": 8}, "likely": True}
    ],
    "Wasserstein": [
        {"settings": {"max_iter": 5, "conjugate_sinkhorn_max_iter": 20, "projected_sinkhorn_max_iter": 20, "eps": 1.0}}
    ],
    "ZooAttack": [
        {
            "norm": "L2",
            "minimal": True,
            "settings": {"max_iter": 20, "learning_rate": 0.3, "use_resize": False, "use_importance": False},
        }
    ],
}


def _art() -> Iterator[Row]:
    evasion = importlib.import_module("art.attacks.evasion")
    for name, kind in inspect.getmembers(evasion, inspect.isclass):
        if name in _ART_REASONS:
            yield Row("ART", name, reason=_ART_REASONS[name])
            continue
        for known in _ART.get(name, [{}]):
            norm, settings = known.get("norm", ""), known.get("settings", {})
            bound = None if known.get("minimal") else BOUNDS[norm]
            run = partial(_run_art, kind, settings, known.get("call", ""), known.get("likely", False))
            yield Row("ART", name, norm, bound, run, settings)
    for tool in (_art_metrics, _art_smoothing, _art_gradient_check, _art_query_efficient, _art_squeezing):
        yield Row("ART", str(inspect.getdoc(tool)), run=tool)
    for name, reason in _ART_TOOLS.items():
        yield Row("ART", name, reason=reason)


_ART_TOOLS = {
    "certification: DeepZ, interval bounds (IBP)": "walk through layers that they know; inference is no such network",
    "certification: derandomised smoothing": "needs a network trained on ablated images",
    "certification: object seeker": _DETECTORS,
    "detection: BinaryInputDetector, BinaryActivationDetector": "train a detector network of their own beside the "
    "classifier; the second asks for activations of a hidden layer",
    "detection: BeyondDetector": "needs a self-supervised network beside the classifier",
    "detection: SubsetScanningDetector": "asks for activations of a hidden layer",
}


def art_classifier(model: nn.Module, *, likely: bool = False) -> Any:
    """ART's own classifier around the module, as its documentation shows."""
    from art.estimators.classification import PyTorchClassifier

    if likely:
        from abs_defense.art import ABSClassifier

        return ABSClassifier(model, outputs="probabilities")
    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def _run_art(kind: Any, settings: dict[str, Any], call: str, likely: bool, bench: Bench) -> Tensor:
    classifier = art_classifier(bench.model, likely=likely)
    known = inspect.signature(kind.__init__).parameters
    attack = kind(classifier, **{**({"verbose": False} if "verbose" in known else {}), **settings})
    images, labels = bench.images.numpy(), np.eye(10, dtype=np.float32)[bench.labels.numpy()]
    if call == "targeted":
        labels = np.eye(10, dtype=np.float32)[others(bench.labels, bench.labels).numpy()]
    if call == "patch":
        attack.generate(images, labels)
        return torch.from_numpy(attack.apply_patch(images, scale=0.4)).float()
    if call == "one image":
        parts = [attack.generate(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
        return torch.from_numpy(np.concatenate(parts)).float()
    return torch.from_numpy(np.asarray(attack.generate(images, labels))).float()


def _art_metrics(bench: Bench) -> str:
    """metrics: empirical robustness, loss sensitivity, CLEVER"""
    from art.metrics import clever_u, empirical_robustness, loss_sensitivity

    classifier, images = art_classifier(bench.model), bench.images.numpy()
    onehot = np.eye(10, dtype=np.float32)[bench.labels.numpy()]
    distance = empirical_robustness(classifier, images, "fgsm", attack_params={"eps": 0.5, "eps_step": 0.1})
    sensitivity = loss_sensitivity(classifier, images, onehot)
    score = clever_u(classifier, images[0], nb_batches=3, batch_size=5, radius=2.0, norm=2, verbose=False)
    return f"FGM distance {float(np.mean(distance)):.3g}, sensitivity {float(sensitivity):.3g}, CLEVER {score:.3g}"


def _art_smoothing(bench: Bench) -> str:
    """certification: randomised smoothing"""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=bench.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
        sample_size=40,
        scale=0.25,
        alpha=0.05,
    )
    labels, radii = smoothed.certify(bench.images.numpy(), n=60, batch_size=60)
    correct = np.asarray(labels) == bench.labels.numpy()
    return f"{correct.sum()} of {len(correct)} certified, radius up to {np.max(radii):.2f} (of the smoothed model)"


def _art_gradient_check(bench: Bench) -> str:
    """metrics: loss gradient check"""
    from art.metrics import loss_gradient_check

    onehot = np.eye(10, dtype=np.float32)[bench.labels.numpy()]
    bad = loss_gradient_check(art_classifier(bench.model), bench.images.numpy(), onehot)
    return f"{int(np.any(bad, axis=1).sum())} of {len(bad)} images with bad gradients"


def _art_query_efficient(bench: Bench) -> str:
    """estimators: query-efficient gradient estimation"""
    from art.estimators.classification import QueryEfficientGradientEstimationClassifier

    estimator = QueryEfficientGradientEstimationClassifier(
        art_classifier(bench.model, likely=True), num_basis=20, sigma=1 / 64.0, round_samples=0.0
    )
    onehot = np.eye(10, dtype=np.float32)[bench.labels.numpy()]
    gradient = estimator.loss_gradient(bench.images.numpy()[:1], onehot[:1])
    return f"a gradient of norm {np.linalg.norm(gradient):.3g}"


def _art_squeezing(bench: Bench) -> str:
    """defences: feature squeezing before the model"""
    from art.defences.preprocessor import FeatureSqueezing
    from art.estimators.classification import PyTorchClassifier

    squeezed = PyTorchClassifier(
        model=bench.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        preprocessing_defences=FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=3),
        device_type="cpu",
    )
    correct = squeezed.predict(bench.images.numpy()).argmax(1) == bench.labels.numpy()
    return f"{correct.sum()} of {len(correct)} right"


# torchattacks

_THREE_CHANNELS = "convolves with kernels of three channels; grey images have one"
_TORCHATTACKS: dict[str, dict[str, Any]] = {
    "VANILA": {},
    "GN": {"settings": {"std": 0.3}},
    "RFGSM": {"settings": {"eps": 0.3, "alpha": 0.05, "steps": 10}},
    "PGDL2": {"norm": "L2", "settings": {"eps": 3.0, "alpha": 0.5, "steps": 20}},
    "PGDRSL2": {"norm": "L2", "settings": {"eps": 3.0, "alpha": 0.5, "steps": 5, "noise_sd": 0.1}},
    "PGDRS": {"settings": {"eps": 0.3, "alpha": 0.05, "steps": 5, "noise_sd": 0.1}},
    "CW": {"norm": "L2", "minimal": True, "settings": {"c": 10, "steps": 200}},
    "DeepFool": {"norm": "L2", "minimal": True, "settings": {"steps": 20}},
    "EADL1": {
        "norm": "L1",
        "minimal": True,
        "settings": {"binary_search_steps": 3, "max_iterations": 30, "lr": 0.1, "initial_const": 10},
    },
    "EADEN": {
        "norm": "L1",
        "minimal": True,
        "settings": {"binary_search_steps": 3, "max_iterations": 30, "lr": 0.1, "initial_const": 10},
    },
    "SparseFool": {"norm": "L0", "minimal": True, "settings": {"steps": 5}},
    "OnePixel": {"norm": "L0", "minimal": True, "settings": {"pixels": 10, "steps": 3}},
    "Pixle": {"norm": "L0", "minimal": True, "settings": {"restarts": 3, "max_iterations": 5}},
    "JSMA": {"norm": "L0", "minimal": True, "settings": {"theta": 1.0, "gamma": 0.02}},
    "AutoAttack": {"settings": {"eps": 0.3}},
    "FAB": {"settings": {"eps": 0.3, "steps": 10}},
    "Square": {"settings": {"eps": 0.3, "n_queries": 200}},
    "SPSA": {"settings": {"eps": 0.3, "nb_iter": 3, "nb_sample": 16}},
    "MultiAttack": {"call": "multi"},
    "PIFGSM": {"reason": _THREE_CHANNELS},
    "PIFGSMPP": {"reason": _THREE_CHANNELS},
    "TIFGSM": {"reason": _THREE_CHANNELS},
    "LGV": {"reason": "trains copies of the model on a data loader; frozen weights have nothing to train"},
}


def _torchattacks() -> Iterator[Row]:
    library = importlib.import_module("torchattacks")
    for name in sorted(set(library.__all__)):
        known = _TORCHATTACKS.get(name, {})
        if "reason" in known:
            yield Row("torchattacks", name, reason=known["reason"])
            continue
        kind = getattr(library, name)
        norm = known.get("norm", "" if name in ("VANILA", "GN") else "L∞")
        settings = known.get("settings")
        if settings is None:
            parameters = inspect.signature(kind.__init__).parameters
            usual = {"eps": 0.3, "alpha": 0.05, "steps": 10}
            settings = {key: value for key, value in usual.items() if key in parameters}
        bound = None if known.get("minimal") or norm == "" else BOUNDS[norm]
        run = partial(_run_torchattacks, name, settings)
        yield Row("torchattacks", name, norm, bound, run, settings)


def _run_torchattacks(name: str, settings: dict[str, Any], bench: Bench) -> Tensor:
    library = importlib.import_module("torchattacks")
    if name == "MultiAttack":
        steps = {"eps": 0.3, "alpha": 0.05, "steps": 10}
        attack = library.MultiAttack([library.FGSM(bench.model, eps=0.3), library.PGD(bench.model, **steps)])
    else:
        attack = getattr(library, name)(bench.model, **settings)
    perturbed: Tensor = attack(bench.images, bench.labels)
    return perturbed


# adv-lib

_ADV_LIB: dict[str, list[dict[str, Any]]] = {
    "alma": [{"norm": "L2", "settings": {"distance": "l2", "num_steps": 60, "init_lr_distance": 1.0}}],
    "apgd": [{"norm": "L∞", "settings": {"eps": 0.3, "norm": np.inf, "n_iter": 20}}],
    "apgd_targeted": [{"norm": "L∞", "settings": {"eps": 0.3, "norm": np.inf, "n_iter": 5}}],
    "carlini_wagner_l2": [
        {
            "norm": "L2",
            "settings": {"learning_rate": 0.05, "binary_search_steps": 3, "max_iterations": 40, "initial_const": 1.0},
        }
    ],
    "carlini_wagner_linf": [
        {
            "norm": "L∞",
            "settings": {"learning_rate": 0.05, "max_iterations": 10, "initial_const": 0.1, "largest_const": 1.0},
        }
    ],
    "ddn": [{"norm": "L2", "settings": {"steps": 40}}],
    "df": [{"norm": "L2", "settings": {"steps": 20}}],
    "fab": [{"norm": "L2", "settings": {"norm": 2, "n_iter": 10}}],
    "fga": [{"norm": "L0", "settings": {"targeted": False, "max_iter": 60}}],
    "fmn": [
        {"norm": "L2", "settings": {"norm": 2, "steps": 40}},
        {"norm": "L∞", "settings": {"norm": np.inf, "steps": 40}},
        {"norm": "L0", "settings": {"norm": 0, "steps": 40}},
    ],
    "pdgd": [{"norm": "L2", "settings": {"num_steps": 60}}],
    "pdpgd": [{"norm": "L2", "settings": {"norm": 2, "num_steps": 60}}],
    "perc_al": [{"reason": "measures the difference of colours; grey images have none"}],
    "pgd_linf": [{"norm": "L∞", "settings": {"ε": 0.3, "steps": 20}}],
    "sdf": [{"norm": "L2", "settings": {"steps": 20}}],
    "sigma_zero": [{"norm": "L0", "settings": {"num_steps": 60}}],
    "str_attack": [{"norm": "L2", "settings": {"initial_const": 30, "binary_search_steps": 2, "max_iterations": 60}}],
    "tr": [{"norm": "L2", "settings": {"iter": 40}}],
    "vfga": [{"norm": "L0", "settings": {"targeted": False, "max_iter": 10, "n_samples": 5}}],
}


def import_adv_lib() -> types.ModuleType:
    """``adv_lib.attacks``, unchanged; where torchvision or visdom are missing, empty modules stand in for them.

    It imports them for a perceptual distance and for live plots, which no attack here uses.
    """
    for name in ("torchvision", "torchvision.models", "visdom"):
        parent = name.partition(".")[0]
        if importlib.util.find_spec(parent) is None if parent not in sys.modules else False:
            sys.modules[parent] = types.ModuleType(parent)
    vision = sys.modules.get("torchvision")
    if vision is not None and not hasattr(vision, "models"):
        vision.models = sys.modules["torchvision.models"] = types.ModuleType("torchvision.models")  # type: ignore[attr-defined]
    return importlib.import_module("adv_lib.attacks")


def _adv_lib() -> Iterator[Row]:
    library = import_adv_lib()
    for name, function in inspect.getmembers(library, inspect.isfunction):
        for known in _ADV_LIB.get(name, [{}]):
            if "reason" in known:
                yield Row("adv-lib", name, reason=known["reason"])
                continue
            norm, settings = known.get("norm", ""), known.get("settings", {})
            fixed = "eps" in settings or "ε" in settings
            yield Row(
                "adv-lib",
                name,
                norm,
                BOUNDS[norm] if fixed else None,
                partial(_run_adv_lib, function, settings),
                settings,
            )


def _run_adv_lib(function: Any, settings: dict[str, Any], bench: Bench) -> Tensor:
    perturbed: Tensor = function(model=bench.model, inputs=bench.images, labels=bench.labels, **settings)
    return perturbed


# AutoAttack

_AUTOATTACK = {"n_iter": 10, "n_restarts": 1, "n_queries": 200}


def _autoattack() -> Iterator[Row]:
    for norm, name in (("L∞", "Linf"), ("L2", "L2"), ("L1", "L1")):
        settings = {"norm": name, "eps": BOUNDS[norm], "version": "standard"}
        run = partial(_run_autoattack, settings)
        yield Row("AutoAttack", "standard", norm, BOUNDS[norm], run, {**settings, **_AUTOATTACK})
    for attack in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        settings = {"norm": "L2", "eps": BOUNDS["L2"], "version": "custom", "attacks": [attack]}
        run = partial(_run_autoattack, settings)
        yield Row("AutoAttack", attack, "L2", BOUNDS["L2"], run, {**settings, **_AUTOATTACK})


def _short_autoattack(model: nn.Module, **settings: Any) -> Any:
    from pyautoattack import AutoAttack

    adversary = AutoAttack(model, seed=0, **settings)
    for part in (adversary.apgd, adversary.apgd_targeted, adversary.fab):
        part.n_iter, part.n_restarts = _AUTOATTACK["n_iter"], _AUTOATTACK["n_restarts"]
    adversary.square.n_queries = _AUTOATTACK["n_queries"]
    return adversary


def _run_autoattack(settings: dict[str, Any], bench: Bench) -> Tensor:
    adversary = _short_autoattack(bench.model, **settings)
    perturbed, _ = adversary.run_standard_evaluation(bench.images, bench.labels, batch_size=len(bench.images))
    return perturbed


def autoattack_warnings(model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> list[str]:
    """What AutoAttack says about a model while it attacks with APGD and Square, a short run."""
    from pyautoattack import checks

    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it counts on from the model before
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger("auto-attack"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        settings = {"norm": "L2", "eps": 3.0, "attacks": ["apgd-ce", "apgd-dlr", "square"], **settings}
        adversary = _short_autoattack(model, version="custom", **settings)
        adversary.run_standard_evaluation(images, labels, batch_size=len(images))
    except RuntimeError as error:
        messages.append(f"stops with RuntimeError: {str(error).splitlines()[0]}")
    finally:
        logger.removeHandler(listener)
    return list(dict.fromkeys(messages))


CATALOGUES: dict[str, Callable[[], Iterator[Row]]] = {
    "foolbox": _foolbox,
    "ART": _art,
    "torchattacks": _torchattacks,
    "adv-lib": _adv_lib,
    "AutoAttack": _autoattack,
}
_MODULES = {
    "foolbox": "foolbox",
    "ART": "art",
    "torchattacks": "torchattacks",
    "adv-lib": "adv_lib",
    "AutoAttack": "pyautoattack",
}
DISTRIBUTIONS = {
    "foolbox": "foolbox",
    "ART": "adversarial-robustness-toolbox",
    "torchattacks": "torchattacks",
    "adv-lib": "adv-lib",
    "AutoAttack": "pyautoattack",
}


class Outcome(NamedTuple):
    """What a row came to.

    Attributes:
        status: ``"runs"``, ``"fails"``, ``"stopped"`` or ``"does not apply"``.
        success: images misclassified within the bound, or None.
        distance: the median distance of these, or None.
        queries: images that the model saw, per attacked image.
        note: the reason, the error or the finding.
    """

    status: str
    success: int | None = None
    distance: float | None = None
    queries: float | None = None
    note: str = ""


def measure(row: Row, bench: Bench) -> Outcome:
    """Run a row; success and distance are computed anew from the images it returns.

    If the attack leaves [0, 1] where the model refuses that, it runs once more on ``Clipped(model)``. If it fails, a
    plain CNN tells whose fault it is.
    """
    if row.run is None:
        return Outcome("does not apply", note=row.reason)
    outcome = _measure(row, bench)
    if outcome.status == "fails" and "images: expected values in [0, 1]" in outcome.note:
        bench = bench._replace(model=Clipped(bench.model))
        outcome = _measure(row, bench)
        outcome = outcome._replace(note="; ".join(filter(None, ["leaves [0, 1]: `Clipped(model)`", outcome.note])))
    if outcome.status == "fails" and _measure(row, bench._replace(model=load_model("cnn"))).status == "fails":
        outcome = outcome._replace(note=f"{outcome.note}; fails on a plain CNN, too")
    return outcome


def _measure(row: Row, bench: Bench) -> Outcome:
    assert row.run is not None
    seen = [0]
    hook = bench.model.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(0, seen[0] + len(inputs[0])))
    try:
        result = row.run(bench)
    except Exception as error:
        return Outcome("fails", note=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:250])
    finally:
        hook.remove()
    queries = seen[0] / len(bench.images)
    if isinstance(result, str):
        return Outcome("runs", queries=queries, note=result)
    perturbed = result.detach().float().reshape(bench.images.shape)
    if not bool(perturbed.isfinite().all()):
        return Outcome("fails", queries=queries, note="returns images with NaN")
    outside = float(torch.maximum(-perturbed, perturbed - 1).max())
    note = f"returns images outside [0, 1] by {outside:.1g}, clipped" if outside > 1e-5 else ""
    perturbed = perturbed.clamp(0, 1)
    with torch.no_grad():
        fooled = bench.model(perturbed).argmax(1) != bench.labels
    distances = distance_of(row.norm, bench.images, perturbed)
    if row.bound is not None:
        fooled &= distances <= row.bound * (1 + 1e-4) + 1e-5
    median = float(distances[fooled].median()) if bool(fooled.any()) else None
    return Outcome("runs", int(fooled.sum()), median, queries, note)


def distance_of(norm: str, images: Tensor, perturbed: Tensor) -> Tensor:
    """Distances, ``(N,)``; L2 where the attack has no norm."""
    p = {name: p for p, name in _NORMS.items()}.get(norm, 2)
    difference = (perturbed - images).flatten(1)
    return torch.linalg.vector_norm(difference, ord=p, dim=1) if p else (difference.abs() > 1e-6).sum(1).float()
