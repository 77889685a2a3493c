"""Decisions only: the same classes with less work, and nobody else is affected."""

import foolbox as fb
import pytest
import torch
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import PointwiseAttack
from abs_defense.inference import ClassDecoder, JointDecoder, _infer, decisions_only, listen
from abs_defense.inference._decide import Contest

SETTINGS = [(ABS, "adam"), (ABS, "bfgs"), (BinaryABS, "adam"), (BinaryABS, "bfgs")]


@pytest.fixture(params=SETTINGS, ids=[f"{kind.__name__}-{solver}" for kind, solver in SETTINGS])
def model(request):
    """The bundled weights with few prototypes."""
    kind, solver = request.param
    return kind(prototypes=200, solver=solver)


@pytest.fixture(scope="module")
def images(digits, random_images):
    """Digits, inverted ones, noise, and images half way between digits of two classes."""
    middle = (digits.images + digits.images.flip(0)) / 2
    return torch.cat([digits.images, middle, 1.0 - digits.images[:8], random_images(4)])


@pytest.fixture
def decoded(monkeypatch):
    """How many latents were decoded with their gradient so far."""
    count = [0]
    pullback = ClassDecoder._pullback

    def counted(self, latents, gradient):
        count[0] += latents.shape[0] * latents.shape[1]
        return pullback(self, latents, gradient)

    for kind in (ClassDecoder, JointDecoder):
        monkeypatch.setattr(kind, "_pullback", counted)
    return count


def test_same_classes_with_less_work(model, images, decoded):
    with torch.no_grad():
        logits = model(images)
    full, decoded[0] = decoded[0], 0
    with torch.no_grad(), decisions_only():
        hasty = model(images)
    assert decoded[0] < full
    assert torch.equal(hasty.argmax(1), logits.argmax(1))
    assert torch.equal(model.predict(images), logits.argmax(1))
    assert_close(hasty.max(1).values, logits.max(1).values, rtol=1e-4, atol=0)
    assert not torch.allclose(hasty, logits, rtol=1e-3)


def test_without_margins_nothing_is_left_out(model, images, monkeypatch):
    monkeypatch.setattr(_infer, "_MARGINS", {"adam": (), "bfgs": ()})
    with torch.no_grad():
        logits = model(images)
        with decisions_only():
            assert_close(model(images), logits, rtol=1e-4, atol=0)


def test_hopeless_is_who_is_further_behind_than_margin_and_share():
    contest = Contest(torch.tensor([1.0, 2.0]), margins=[(2, 40.0), (4, 30.0)], share=0.3)
    energies = torch.tensor([[20.0, 20.0, 400.0, 400.0], [29.0, 31.0, 280.0, 290.0]])
    assert contest.is_open(energies, 1).all()
    assert contest.is_open(energies, 2).tolist() == [[True] * 4, [True, False, True, False]]
    assert contest.is_open(energies, 5).tolist() == [[True] * 4, [False, False, True, False]]


@pytest.mark.parametrize(("kind", "solver"), SETTINGS)
def test_few_prototypes_far_images(kind, solver, digits):
    """Descents from few prototypes, and on images that no class explains, gain more than others."""
    model = kind(prototypes=20, solver=solver)
    images = torch.cat([digits.images, 1.0 - digits.images, digits.images.new_ones(1, 1, 28, 28)])
    assert torch.equal(model.predict(images), model(images).argmax(1))


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_prototype_classifier_decides_as_ever(kind, images):
    model = kind(prototypes=200, steps=0)
    assert torch.equal(model.predict(images), model(images).argmax(1))


def test_empty_batch(model):
    assert model.predict(torch.zeros(0, 1, 28, 28)).shape == (0,)


def test_calls_that_need_more_are_not_affected(model, images):
    x = images[:2].clone().requires_grad_()
    logits = model(x)
    with decisions_only():
        live = model(x)
        assert_close(live, logits, rtol=1e-5, atol=0)
        inference = model.infer(images[:2])
        with listen() as heard, torch.no_grad():
            model(images[:2])
    assert_close(inference.energy, heard[0].inference.energy, rtol=1e-5, atol=0)
    assert_close(-float(model.alpha) / 784 * inference.energy, logits.detach(), rtol=1e-4, atol=0)


def test_the_wish_ends_with_its_block(images):
    model = ABS(prototypes=50)
    with torch.no_grad():
        before = model(images[:3])
        with pytest.raises(RuntimeError), decisions_only():
            raise RuntimeError
        assert torch.equal(model(images[:3]), before)


def test_pointwise_finds_the_same_with_less_work(digits, decoded, monkeypatch):
    wrapped = fb.PyTorchModel(ABS(prototypes=500), bounds=(0, 1), device="cpu")
    attack = PointwiseAttack(restarts=1, max_queries=25)
    found, _, success = attack(wrapped, digits.images[:2], digits.labels[:2], epsilons=None)
    hasty, decoded[0] = decoded[0], 0
    monkeypatch.setattr(_infer, "_MARGINS", {"adam": (), "bfgs": ()})
    expected, _, expected_success = attack(wrapped, digits.images[:2], digits.labels[:2], epsilons=None)
    assert torch.equal(found, expected)
    assert torch.equal(success, expected_success)
    assert bool(success.any())
    assert hasty < decoded[0]
