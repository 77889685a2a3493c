"""ABS in ART: the classifier under ART's own attacks, and our attacks in ART's contract."""

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod, HopSkipJump, SquareAttack
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError

from abs_defense import ABS, BinaryABS
from abs_defense.art import ABSClassifier, LatentDescent, Pointwise
from abs_defense.attacks import LatentDescentAttack, PointwiseAttack

pytestmark = pytest.mark.touches_random_state  # ART's predict shuffles nothing, but draws


@pytest.fixture(scope="module")
def model():
    return ABS(prototypes=200, steps=0)


@pytest.fixture(scope="module")
def estimator(model):
    return ABSClassifier(model)


@pytest.fixture(scope="module")
def images(digits):
    """A 2, a 0 and a 1."""
    return digits.images[[1, 3, 5]].numpy()


@pytest.fixture(scope="module")
def labels(estimator, images):
    return estimator.predict(images).argmax(1)


def test_everything_is_set(estimator, model):
    assert isinstance(estimator, PyTorchClassifier)
    assert estimator.nb_classes == 10
    assert estimator.input_shape == (1, 28, 28)
    assert tuple(estimator.clip_values) == (0.0, 1.0)
    assert estimator.channels_first
    assert ABSClassifier("prototype-abs").nb_classes == 10


def test_logits_and_probabilities(estimator, model, images):
    with torch.no_grad():
        x = torch.from_numpy(images)
        np.testing.assert_allclose(estimator.predict(images), model(x), rtol=1e-5)
        likely = ABSClassifier(model, outputs="probabilities")
        np.testing.assert_allclose(likely.predict(images), model.predict_proba(x), rtol=1e-5)
    np.testing.assert_allclose(likely.predict(images).sum(1), 1.0, rtol=1e-5)
    assert not model.training


def test_classes_are_those_of_the_logits_even_where_the_confidence_is_uniform(model, images):
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 0.7, images.shape), 0, 1).astype(np.float32)
    likely = ABSClassifier(model, outputs="probabilities").predict(noisy)
    with torch.no_grad():
        x = torch.from_numpy(noisy)
        assert (model.predict_proba(x) == 0.1).all()
        assert likely.argmax(1).tolist() == model(x).argmax(1).tolist() != [0, 0, 0]


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_loss_gradient_points_uphill(model, images, labels, outputs):
    estimator = ABSClassifier(model, outputs=outputs)
    onehot = np.eye(10, dtype=np.float32)[labels]
    gradient = estimator.loss_gradient(images, onehot)
    assert gradient.shape == images.shape
    assert np.isfinite(gradient).all()
    step = 1e-2 * gradient / np.linalg.norm(gradient)
    inside = np.clip(images + step, 0, 1)
    before, after = (estimator.compute_loss(x, onehot, reduction="none") for x in (images, inside))
    assert after.sum() > before.sum()


def test_wrong_settings_are_refused(model):
    with pytest.raises(TypeError, match="got Linear"):
        ABSClassifier(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="expected 'logits' or 'probabilities', got 'scores'"):
        ABSClassifier(model, outputs="scores")
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        ABSClassifier("resnet")


@pytest.mark.parametrize(
    "make",
    [
        lambda e: FastGradientMethod(e, eps=0.4),
        lambda e: AutoProjectedGradientDescent(e, eps=0.4, max_iter=5, nb_random_init=1, verbose=False),
        lambda e: SquareAttack(e, eps=0.5, max_iter=50, verbose=False),
        lambda e: HopSkipJump(e, max_iter=1, max_eval=50, init_eval=10, verbose=False),
    ],
    ids=["fgm", "auto-pgd", "square", "hop-skip-jump"],
)
def test_arts_attacks_run(estimator, images, labels, make):
    perturbed = make(estimator).generate(images, np.eye(10, dtype=np.float32)[labels])
    assert perturbed.shape == images.shape
    assert (estimator.predict(perturbed).argmax(1) != labels).any()


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_latent_descent_is_the_foolbox_attack(images, kind):
    import foolbox as fb

    model = kind(prototypes=200, steps=0)
    estimator = ABSClassifier(model)
    labels = estimator.predict(images).argmax(1)
    settings = {"stepsize": 0.2, "steps": 30}
    perturbed = LatentDescent(estimator, **settings, verbose=False).generate(images, labels)
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    expected, _, success = LatentDescentAttack(**settings)(
        wrapped, torch.from_numpy(images), torch.from_numpy(labels), epsilons=None
    )
    assert success.any()
    np.testing.assert_allclose(perturbed[success], expected[success], atol=1e-5)
    np.testing.assert_array_equal(perturbed[~success], images[~success])


def test_pointwise_is_the_foolbox_attack(estimator, model, images, labels):
    import foolbox as fb

    perturbed = Pointwise(estimator, max_queries=60, verbose=False).generate(images, labels)
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    expected, _, _ = PointwiseAttack(max_queries=60)(
        wrapped, torch.from_numpy(images), torch.from_numpy(labels), epsilons=None
    )
    np.testing.assert_allclose(perturbed, expected, atol=1e-6)


def test_latent_descent_through_preprocessing(model, images, labels):
    shifted = ABSClassifier(model, clip_values=(-1.0, 1.0), preprocessing=(-1.0, 2.0))
    x = 2.0 * images - 1.0
    np.testing.assert_array_equal(shifted.predict(x).argmax(1), labels)
    perturbed = LatentDescent(shifted, stepsize=0.2, steps=30, verbose=False).generate(x, labels)
    plain = LatentDescent(ABSClassifier(model), stepsize=0.2, steps=30, verbose=False).generate(images, labels)
    assert (shifted.predict(perturbed).argmax(1) != labels).all()
    np.testing.assert_allclose(perturbed, 2.0 * plain - 1.0, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_matter(estimator, images, labels, batch_size):
    settings = {"stepsize": 0.2, "steps": 30, "verbose": False}
    whole = LatentDescent(estimator, **settings).generate(images, labels)
    parts = LatentDescent(estimator, **settings, batch_size=batch_size).generate(images, labels)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_labels_may_be_missing_or_one_hot(estimator, images, labels):
    attack = LatentDescent(estimator, stepsize=0.2, steps=30, verbose=False)
    expected = attack.generate(images, labels)
    np.testing.assert_array_equal(attack.generate(images), expected)
    np.testing.assert_array_equal(attack.generate(images, np.eye(10)[labels]), expected)


def test_targets(estimator, model, images):
    targets = estimator.predict(images).argsort(1)[:, -2]
    starts = model.prototype_images[targets, 0].view(3, 1, 28, 28).numpy()
    for attack, start in (
        (LatentDescent(estimator, stepsize=0.2, steps=30, targeted=True, verbose=False), {}),
        (Pointwise(estimator, targeted=True, max_queries=80, verbose=False), {"x_adv_init": starts}),
    ):
        perturbed = attack.generate(images, targets, **start)
        reached = estimator.predict(perturbed).argmax(1) == targets
        untouched = (perturbed == images).reshape(3, -1).all(1)
        assert (reached | untouched).all()
        assert reached.any()
        with pytest.raises(ValueError, match="expected the target classes"):
            attack.generate(images)


@pytest.mark.parametrize("shape", [(28, 28), (3, 1, 28, 28)])
def test_pointwise_honours_masks(estimator, images, labels, shape):
    mask = np.zeros(shape)
    mask[..., :, 6:22] = 1.0
    perturbed = Pointwise(estimator, max_queries=100, verbose=False).generate(images, labels, mask=mask)
    outside = np.broadcast_to(mask, images.shape) == 0
    np.testing.assert_array_equal(perturbed[outside], images[outside])
    fooled = estimator.predict(perturbed).argmax(1) != labels
    assert fooled.any()
    nothing = Pointwise(estimator, max_queries=30, verbose=False).generate(images, labels, mask=np.zeros(shape))
    np.testing.assert_array_equal(nothing, images)


def test_pointwise_starts_where_told(estimator, images, labels):
    starts = images[[1, 2, 0]]
    attack = Pointwise(estimator, max_queries=40, verbose=False)
    perturbed = attack.generate(images, labels, x_adv_init=starts)
    assert (estimator.predict(perturbed).argmax(1) != labels).all()
    changed = perturbed != images
    np.testing.assert_array_equal(perturbed[changed], starts[changed])


def test_pointwise_on_a_black_box(images, labels, estimator):
    box = BlackBoxClassifier(lambda x: estimator.predict(x), (1, 28, 28), 10, clip_values=(0.0, 1.0))
    perturbed = Pointwise(box, max_queries=60, verbose=False).generate(images, labels)
    np.testing.assert_array_equal(
        perturbed, Pointwise(estimator, max_queries=60, verbose=False).generate(images, labels)
    )
    network = torch.nn.Sequential(torch.nn.Flatten(), _linear())
    loss = torch.nn.CrossEntropyLoss()
    linear = PyTorchClassifier(network, loss, (1, 28, 28), 10, clip_values=(0, 1), device_type="cpu")
    attack = LatentDescent(linear, verbose=False)
    with pytest.raises(ValueError, match="ABS or Binary ABS inside"):
        attack.generate(images, labels)


def _linear():
    with torch.random.fork_rng(devices=[]):
        return torch.nn.Linear(784, 10)


def test_parameters(estimator, images, labels):
    attack = LatentDescent(estimator, verbose=False)
    attack.set_params(steps=7, stepsize=0.5)
    assert (attack.steps, attack.stepsize) == (7, 0.5)
    assert "steps=7" in repr(attack)
    for wrong, message in (
        ({"steps": 0}, "steps: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"targeted": 1}, "targeted: expected a bool"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentDescent(estimator, **wrong)
    with pytest.raises(ValueError, match="norm: expected 'l0' or 'l2'"):
        Pointwise(estimator, norm="l1")
    with pytest.raises(TypeError, match="unknown arguments colour"):
        attack.generate(images, labels, colour=1)
    with pytest.raises(EstimatorError):
        Pointwise(torch.nn.Linear(1, 1))
