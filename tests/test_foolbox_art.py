"""The models inside foolbox 3.3 and ART 1.20: predictions, gradients and attacks of others, unchanged."""

import copy

import eagerpy as ep
import foolbox as fb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS

UNDO_NORMALISATION = {"mean": torch.tensor(-1.0), "std": torch.tensor(2.0)}


@pytest.fixture(params=["small_abs", "small_binary", "unrolled_abs"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def unrolled_abs(random_weights):
    return ABS(random_weights(), prototypes=64, steps=2, gradient="unrolled")


@pytest.fixture
def foolbox_model(model):
    return fb.PyTorchModel(model, bounds=(0, 1), device="cpu")


@pytest.fixture
def art_model(model):
    return PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


@pytest.fixture
def batch(own_images):
    """Mixtures of images of two classes, with the class of the greater part: recognised, but not for sure."""
    images, labels = own_images(6)
    return 0.6 * images + 0.4 * images.roll(1, dims=0), labels


def cross_entropy_gradient(model, images, labels, reduction):
    images = images.detach().clone().requires_grad_()
    loss = F.cross_entropy(model(images), labels, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss, images)[0]


# foolbox


def test_foolbox_predictions(foolbox_model, model, batch):
    images, labels = batch
    assert_close(foolbox_model(images), model(images))
    assert fb.accuracy(foolbox_model, images, labels) == 1.0


def test_foolbox_preprocessing(model, batch):
    """Images normalised to [-1, 1] reach the model in [0, 1], if the preprocessing undoes the normalisation."""
    images, _ = batch
    wrapped = fb.PyTorchModel(model, bounds=(-1, 1), device="cpu", preprocessing=UNDO_NORMALISATION)
    assert_close(wrapped(2 * images - 1), model(images), rtol=1e-4, atol=1e-4)


def test_foolbox_preprocessing_by_channel(model, batch):
    images, _ = batch
    preprocessing = {"mean": [-1.0], "std": [2.0], "axis": -3}
    wrapped = fb.PyTorchModel(model, bounds=(-1, 1), device="cpu", preprocessing=preprocessing)
    assert_close(wrapped(2 * images - 1), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bounds", [(-1, 1), (0, 255)])
@pytest.mark.parametrize("wrapper", [False, True])
def test_foolbox_transform_bounds(foolbox_model, model, batch, bounds, wrapper):
    images, _ = batch
    low, high = bounds
    wrapped = foolbox_model.transform_bounds(bounds, wrapper=wrapper)
    assert wrapped.bounds == bounds
    assert foolbox_model.bounds == (0, 1)
    assert_close(wrapped(low + (high - low) * images), model(images), rtol=1e-4, atol=1e-4)


def test_foolbox_normalised_images_without_preprocessing_are_refused(foolbox_model, batch):
    with pytest.raises(ValueError, match="normalised"):
        foolbox_model(2 * batch[0] - 1)


def test_foolbox_gradients(foolbox_model, model, batch):
    images, labels = batch
    expected_loss, expected = cross_entropy_gradient(model, images, labels, "sum")
    assert expected.abs().max() > 0

    def loss(x):
        return ep.crossentropy(foolbox_model(x), ep.astensor(labels)).sum()

    value, gradient = ep.value_and_grad(loss, ep.astensor(images))
    assert_close(value.raw.detach(), expected_loss, rtol=1e-4, atol=1e-5)
    assert_close(gradient.raw, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_foolbox_gradients_after_transform_bounds(foolbox_model, model, batch):
    images, labels = batch
    _, expected = cross_entropy_gradient(model, images, labels, "sum")
    transformed = foolbox_model.transform_bounds((-1, 1))

    def loss(x):
        return ep.crossentropy(transformed(x), ep.astensor(labels)).sum()

    _, gradient = ep.value_and_grad(loss, ep.astensor(2 * images - 1))
    assert_close(gradient.raw, expected / 2, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.touches_random_state
@pytest.mark.parametrize(
    ("attack", "epsilon"),
    [
        (fb.attacks.L2PGD(steps=4, rel_stepsize=0.4), 8.0),
        (fb.attacks.LinfPGD(steps=4, rel_stepsize=0.4), 0.3),
        (fb.attacks.L2FastGradientAttack(), 8.0),
    ],
    ids=["L2PGD", "LinfPGD", "L2FastGradient"],
)
@pytest.mark.parametrize("transformed", [False, True])
def test_foolbox_gradient_attacks(foolbox_model, batch, attack, epsilon, transformed):
    images, labels = batch
    target, scale = foolbox_model, 1.0
    if transformed:
        target, scale, images = foolbox_model.transform_bounds((-1, 1)), 2.0, 2 * images - 1
    raw, clipped, success = attack(target, images, labels, epsilons=[0.0, scale * epsilon])
    assert success.shape == (2, 6)
    assert not success[0].any()
    assert success[1].any()
    for perturbed in clipped:
        assert perturbed.min() >= target.bounds.lower
        assert perturbed.max() <= target.bounds.upper
    assert (attack.distance(images, clipped[1]) <= scale * epsilon + 1e-4).all()
    assert torch.equal(target(clipped[1]).argmax(1) != labels, success[1])
    assert raw[1].shape == images.shape


@pytest.mark.touches_random_state
def test_foolbox_decision_based_attack(foolbox_model, batch, own_images):
    """The boundary attack, from the image of another class."""
    images, labels = batch
    starts = own_images(6)[0].roll(1, dims=0)
    attack = fb.attacks.BoundaryAttack(steps=15, tensorboard=False)
    raw, _, success = attack(foolbox_model, images, labels, epsilons=None, starting_points=starts)
    assert success.all()
    assert (fb.distances.l2(images, raw) < fb.distances.l2(images, starts)).all()
    assert (foolbox_model(raw).argmax(1) != labels).all()


@pytest.mark.touches_random_state
def test_foolbox_attack_with_many_backward_passes(foolbox_model, batch):
    """DeepFool asks for the gradient of each class."""
    images, labels = batch
    _, clipped, success = fb.attacks.L2DeepFoolAttack(steps=3, loss="logits")(
        foolbox_model, images, labels, epsilons=8.0
    )
    assert torch.equal(foolbox_model(clipped).argmax(1) != labels, success)
    assert success.any()


def test_foolbox_attack_without_gradient_raises(random_weights, own_images):
    """A model without gradients must not look robust to a gradient attack."""
    images, labels = own_images(3)
    silent = ABS(random_weights(), prototypes=16, steps=1, gradient="none")
    with pytest.raises(RuntimeError, match="does not require grad"):
        fb.attacks.L2FastGradientAttack()(fb.PyTorchModel(silent, (0, 1), "cpu"), images, labels, epsilons=1.0)


def test_foolbox_leaves_the_module_as_it_was(foolbox_model, model, batch):
    images, labels = batch
    before = copy.deepcopy(model.state_dict())
    fb.attacks.L2FastGradientAttack()(foolbox_model, images, labels, epsilons=1.0)
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


# ART


@pytest.mark.touches_random_state
def test_art_predictions(art_model, model, batch):
    images, labels = batch
    predictions = art_model.predict(images.numpy())
    assert predictions.dtype == np.float32
    np.testing.assert_allclose(predictions, model(images).numpy(), rtol=1e-4)
    assert (predictions.argmax(1) == labels.numpy()).all()


@pytest.mark.touches_random_state
def test_art_predictions_in_small_batches_and_float64(art_model, model, batch):
    images, _ = batch
    predictions = art_model.predict(images.double().numpy(), batch_size=4)
    np.testing.assert_allclose(predictions, model(images).numpy(), rtol=1e-4)


def test_art_loss_gradient(art_model, model, batch):
    images, labels = batch
    _, expected = cross_entropy_gradient(model, images, labels, "mean")
    one_hot = F.one_hot(labels, 10).float().numpy()
    gradient = art_model.loss_gradient(images.numpy(), one_hot)
    scale = float(expected.abs().max())
    assert scale > 0
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("label", [None, 3, "each"])
def test_art_class_gradient(art_model, model, batch, label):
    """Without a label ART makes ten backward passes through one graph."""
    images, labels = batch
    asked = labels.numpy() if label == "each" else label
    gradient = art_model.class_gradient(images.numpy(), label=asked)
    expected = []
    for c in range(10):
        x = images.clone().requires_grad_()
        expected.append(torch.autograd.grad(model(x)[:, c].sum(), x)[0])
    expected = torch.stack(expected, dim=1)
    if label == 3:
        expected = expected[:, 3:4]
    elif label == "each":
        expected = expected[torch.arange(len(labels)), labels][:, None]
    scale = float(expected.abs().max())
    assert scale > 0
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=0, atol=1e-4 * scale)


@pytest.mark.touches_random_state
@pytest.mark.parametrize("norm", [2, np.inf])
@pytest.mark.parametrize("method", [FastGradientMethod, ProjectedGradientDescent])
def test_art_attacks(art_model, batch, method, norm):
    images, labels = batch
    epsilon = 8.0 if norm == 2 else 0.3
    settings = {"eps": epsilon, "norm": norm, "batch_size": 4}
    if method is ProjectedGradientDescent:
        settings |= {"eps_step": 0.4 * epsilon, "max_iter": 4, "verbose": False}
    perturbed = method(art_model, **settings).generate(images.numpy(), labels.numpy())
    assert perturbed.shape == images.shape
    assert perturbed.min() >= 0.0
    assert perturbed.max() <= 1.0
    difference = (perturbed - images.numpy()).reshape(len(images), -1)
    assert (np.linalg.norm(difference, norm, axis=1) <= epsilon + 1e-4).all()
    assert (art_model.predict(perturbed).argmax(1) != labels.numpy()).any()


@pytest.mark.touches_random_state
def test_art_leaves_the_module_in_eval_mode_and_without_gradients(art_model, model, batch):
    images, labels = batch
    art_model.predict(images.numpy())
    art_model.loss_gradient(images.numpy(), F.one_hot(labels, 10).float().numpy())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.touches_random_state
def test_both_libraries_agree_on_binary_images(random_weights, own_images):
    """Binary ABS sees no difference between an image and its binarised version, in either library."""
    images, _ = own_images(4)
    binary = BinaryABS(random_weights(), prototypes=64, steps=5)
    foolbox_logits = fb.PyTorchModel(binary, bounds=(0, 1), device="cpu")((images > 0.5).float())
    classifier = PyTorchClassifier(
        binary, torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1), device_type="cpu"
    )
    np.testing.assert_allclose(classifier.predict(images.numpy()), foolbox_logits.numpy(), rtol=1e-5)
