"""Other people's code on our models, unchanged: each library called as its documentation says.

The table of benchmarks/third_party.py is longer; here are the rows that are quick, and what must hold of them.
"""

import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from abs_defense import ABS, BinaryABS
from abs_defense.models import Clipped

pytestmark = pytest.mark.touches_random_state

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from third_party import Bench, Row, art_classifier, autoattack_warnings, measure, rows  # noqa: E402

ROWS = rows()
QUICK = {
    "foolbox": """BinarizationRefinementAttack BinarySearchContrastReductionAttack DDNAttack DatasetAttack EADAttack
        GaussianBlurAttack InversionAttack L0FMNAttack L1FMNAttack L2FMNAttack LInfFMNAttack L1BasicIterativeAttack
        L2BasicIterativeAttack LinfBasicIterativeAttack LinfAdamBasicIterativeAttack L2DeepFoolAttack
        L2FastGradientAttack LinfFastGradientAttack NewtonFoolAttack LinfMomentumIterativeFastGradientMethod
        L2ProjectedGradientDescentAttack LinfProjectedGradientDescentAttack L2AdditiveGaussianNoiseAttack
        SparseL1DescentAttack SpatialAttack VirtualAdversarialAttack HopSkipJumpAttack""",
    "ART": """AutoProjectedGradientDescent BasicIterativeMethod DeepFool FastGradientMethod HopSkipJump
        MomentumIterativeMethod ProjectedGradientDescent SaliencyMapMethod SpatialTransformation
        UniversalPerturbation TargetedUniversalPerturbation""",
    "torchattacks": """APGD APGDT BIM CW DIFGSM EOTPGD FAB FFGSM FGSM Jitter MIFGSM MultiAttack OnePixel PGD
        PGDL2 Pixle RFGSM SINIFGSM SPSA Square TPGD UPGD VMIFGSM""",
    "adv-lib": "alma apgd apgd_targeted ddn df fab fmn pgd_linf sigma_zero tr",
    "AutoAttack": "apgd-ce apgd-dlr apgd-t fab square",
}
# Gradient attacks strong enough for every image.
STRONG = """DDNAttack L2BasicIterativeAttack LinfBasicIterativeAttack L2DeepFoolAttack LInfFMNAttack EADAttack
    AutoProjectedGradientDescent DeepFool ProjectedGradientDescent FAB MIFGSM NIFGSM PGDL2 VMIFGSM alma apgd ddn df
    sigma_zero apgd-ce"""


@pytest.fixture(scope="module")
def bench(digits):
    """Two images that the model, of few prototypes, classifies correctly."""
    return Bench(ABS(prototypes=100, steps=0), digits.images[[1, 3]].clone(), digits.labels[[1, 3]].clone())


def quick_rows():
    for row in ROWS:
        if row.run is not None and row.name in QUICK[row.library].split():
            yield pytest.param(row, id=f"{row.library}-{row.name}-{row.norm}")


@pytest.mark.parametrize("row", list(quick_rows()))
def test_attacks_run(row, bench):
    if row.binary:
        bench = bench._replace(model=BinaryABS(prototypes=100, steps=0))
    _seed()
    outcome = measure(row, bench)
    assert outcome.status == "runs", outcome.note
    if row.name in STRONG.split():
        assert outcome.success == len(bench.images)
        assert outcome.distance > 0


@pytest.mark.parametrize("library", list(QUICK))
def test_libraries_are_there(library):
    missing = [row for row in ROWS if row.library == library and row.reason == "not installed"]
    if missing:
        pytest.skip(f"{library} is not installed; see .ci/run")


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_attacks_through_latent_descent(digits, gradient):
    """The same, with a descent to differentiate."""
    bench = Bench(
        ABS(prototypes=50, steps=3, gradient=gradient), digits.images[[1]].clone(), digits.labels[[1]].clone()
    )
    for library, name in (
        ("foolbox", "LinfFastGradientAttack"),
        ("ART", "FastGradientMethod"),
        ("torchattacks", "FGSM"),
    ):
        for row in ROWS:
            if (row.library, row.name) == (library, name) and row.run is not None:
                assert measure(row, bench).status == "runs"


@pytest.mark.parametrize("name", ["certification: randomised smoothing", "metrics: loss gradient check"])
def test_arts_tools_run(name, bench):
    if "certification" in name:
        pytest.importorskip("statsmodels", reason="needs abs-defense[third-party]")
    _seed()
    (row,) = [row for row in ROWS if row.name == name]
    outcome = measure(row, bench)
    assert outcome.status == "runs", outcome.note
    assert outcome.note


def test_every_row_runs_or_has_a_reason():
    assert all(row.run is not None or row.reason for row in ROWS)
    names = [row.name for row in ROWS if row.library == "foolbox"]
    assert {"BoundaryAttack", "PointwiseAttack", "L0BrendelBethgeAttack"} <= set(names)
    assert len(names) == len(set(names)) >= 57
    assert "LatentDescentAttack" not in names


def test_measure_judges_the_images_itself(bench):
    """Neither a success outside the bound nor an image outside the box counts, whatever the attack says."""
    far = bench.images.flip(0)
    honest = measure(Row("x", "far", "L2", None, lambda b: far), bench)
    assert honest.success == len(far)
    assert honest.distance == pytest.approx(float((far - bench.images).flatten(1).norm(dim=1).median()), rel=0.2)
    assert measure(Row("x", "far", "L2", 1.0, lambda b: far), bench).success == 0
    outside = measure(Row("x", "outside", "L2", None, lambda b: b.images - 0.2), bench)
    assert "outside [0, 1] by 0.2" in outside.note
    assert measure(Row("x", "nan", "L2", None, lambda b: far * torch.nan), bench).status == "fails"
    assert measure(Row("x", "no", reason="needs sound"), bench).note == "needs sound"

    def broken(_):
        raise RuntimeError("their fault")

    assert measure(Row("x", "broken", run=broken), bench).note.startswith("RuntimeError: their fault")


# What other people's code needs of the models.


@pytest.fixture(scope="module")
def beside(digits):
    """Images that leave [0, 1] a little, as those of attacks that look ahead."""
    return digits.images[:2] + torch.where(digits.images[:2] > 0.5, 0.2, -0.2)


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_attacks_may_look_ahead(kind, random_weights, beside):
    """Images outside [0, 1] are accepted where a gradient is asked for, and the gradient is right there, too."""
    model = kind(random_weights(), prototypes=64, steps=0)
    x = beside.double().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    with pytest.raises(ValueError, match=r"abs_defense\.models\.Clipped|look normalised"):
        model(beside)
    with pytest.raises(ValueError, match="expected finite"):
        model((beside * torch.nan).requires_grad_())
    with pytest.raises(ValueError, match=r"bytes in 0\.\.255"):
        model((255.0 * beside.clamp(0, 1)).requires_grad_())


def test_gradients_outside_the_box_are_exact(random_weights, beside):
    model = ABS(random_weights(), prototypes=64, steps=0).double()
    x = beside[:1].double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 1], x)
    for pixel in (0, 300, 500):
        shift = torch.zeros_like(x)
        shift.view(-1)[pixel] = 0.05
        up, down = model((x + shift).detach().requires_grad_()), model((x - shift).detach().requires_grad_())
        expected = float(up[0, 1] - down[0, 1]) / 0.1
        assert float(gradient.view(-1)[pixel]) == pytest.approx(expected, abs=2e-3)


def test_clipped_takes_what_the_model_refuses(random_weights, beside):
    model = ABS(random_weights(), prototypes=64, steps=1)
    clipped = Clipped(model)
    expected = model(beside.clamp(0, 1))
    assert torch.equal(clipped(beside), expected)
    assert torch.equal(clipped.predict_proba(beside), model.predict_proba(beside.clamp(0, 1)))
    assert clipped.num_classes == 10
    assert clipped.describe() == {**model.describe(), "clipped": True}
    assert not clipped.training
    x = beside.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped(x).sum(), x)
    assert (gradient[(beside < 0) | (beside > 1)] == 0).all()
    with pytest.raises(ValueError, match="expected finite"):
        clipped(beside * torch.nan)
    with pytest.raises(ValueError, match="expected finite"):
        clipped(beside / torch.zeros_like(beside))
    with pytest.raises(ValueError, match="floating point"):
        clipped(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_art_smoothing_certifies(bench):
    """ART's randomised smoothing, as documented, with a model that clips the noise."""
    pytest.importorskip("statsmodels", reason="needs abs-defense[third-party]")
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=Clipped(bench.model),
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
        sample_size=20,
        scale=0.1,
    )
    _seed()
    labels, radii = smoothed.certify(bench.images.numpy(), n=50)
    assert (labels == bench.labels.numpy()).all()
    assert (radii > 0).all()


def test_art_query_efficient_gradients(bench):
    from art.estimators.classification import QueryEfficientGradientEstimationClassifier

    classifier = art_classifier(Clipped(bench.model), likely=True)
    estimator = QueryEfficientGradientEstimationClassifier(classifier, num_basis=20, sigma=0.02, round_samples=0.0)
    gradient = estimator.loss_gradient(bench.images.numpy()[:1], np.eye(10)[bench.labels[:1].numpy()])
    assert gradient.shape == (1, 1, 28, 28)
    assert np.isfinite(gradient).all()


# AutoAttack's opinion of the models, as docs/compatibility.md has it.

needs_autoattack = pytest.mark.skipif(
    importlib.util.find_spec("pyautoattack") is None, reason="needs abs-defense[third-party]"
)


@needs_autoattack
@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_autoattack_sees_no_dynamic_defence(gradient, digits):
    """It looks for autograd inside forward; the descent has none. The docs say that the flag should be read as set."""
    model = ABS(prototypes=50, steps=2, gradient=gradient)
    warnings = autoattack_warnings(model, digits.images[[1, 3]], digits.labels[[1, 3]])
    assert not [message for message in warnings if "dynamic" in message or "randomized" in message]


@needs_autoattack
def test_autoattack_would_see_autograd(digits):
    """The check itself works: a model whose forward uses autograd is flagged."""

    class Dynamic(ABS):
        def forward(self, images):
            with torch.enable_grad():
                x = torch.zeros(1, requires_grad=True)
                torch.autograd.grad(x.sum(), x)
            return super().forward(images)

    warnings = autoattack_warnings(Dynamic(prototypes=50, steps=0), digits.images[[1, 3]], digits.labels[[1, 3]])
    assert any("it seems to be a dynamic defense" in message for message in warnings)


@needs_autoattack
def test_gradient_none_stops_gradient_attacks(digits):
    model = ABS(prototypes=50, steps=0, gradient="none")
    (message,) = autoattack_warnings(model, digits.images[[1, 3]], digits.labels[[1, 3]])
    assert message.startswith("stops with RuntimeError")


def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    logging.getLogger("auto-attack").setLevel(logging.WARNING)
