"""The authors' released weights: our inference against the logits of their code, and the rules at full size."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS
from abs_defense.data import load_idx_dataset
from abs_defense.inference import DecoderStack, Prototypes, _descent, infer_latents, project_to_ball
from abs_defense.models import Calibration, Weights, load_weights

UPDATES = 49  # The authors' 50 iterations make 49 updates.


def authors_projection(latents, radius):
    """The authors' ``clip_to_sphere``, which loses the signs of the latents it clips."""
    norms = latents.norm(dim=-1, keepdim=True)
    return torch.where(norms > radius, (latents.square() * (radius / norms).square()).sqrt(), latents)


@pytest.fixture(scope="module")
def reference(shared_data):
    with np.load(shared_data / "schott2018" / "reference_logits.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def images(shared_data, reference):
    test_set = load_idx_dataset(shared_data / "mnist").head(100)
    assert torch.equal(test_set.labels, reference["labels"].long())
    return test_set.images


@pytest.fixture(scope="module")
def models(shared_data, reference):
    """Both models with the prototypes the authors drew, which are decoded once."""
    weights = load_weights(shared_data / "schott2018")
    models = {
        "abs": ABS(weights, prototypes=1, steps=UPDATES, solver="adam"),
        "binary": BinaryABS(weights, prototypes=1, steps=UPDATES, solver="adam"),
    }
    latents = reference["latents"].float()
    decoded = Prototypes.decode(weights.decoders.class_decoders(), latents, beta=1.0)
    for model in models.values():
        model.prototype_latents = latents
        model._prototype_images, model.prototype_offsets = decoded.images, decoded.offsets
    return models


@pytest.fixture(scope="module")
def few_prototypes(shared_data):
    """Both models as a user has them, but for a smaller number of prototypes."""
    weights = load_weights(shared_data / "schott2018")
    return {
        "abs": ABS(weights, prototypes=500, solver="adam"),
        "binary": BinaryABS(weights, prototypes=500, solver="adam"),
    }


@pytest.mark.parametrize("name", ["abs", "binary"])
def test_energies_equal_the_authors_with_their_slip(models, images, reference, monkeypatch, name):
    monkeypatch.setattr(_descent, "project_to_ball", authors_projection)
    energies = models[name].infer(images).energy
    assert_close(energies.double(), -784 * reference[name].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["abs", "binary"])
def test_energies_equal_the_authors_where_nothing_was_clipped(models, images, reference, monkeypatch, name):
    clipped = torch.zeros(10, 100, dtype=torch.bool)

    def watched(latents, radius):
        clipped.logical_or_(latents.norm(dim=-1) > radius)
        return project_to_ball(latents, radius)

    monkeypatch.setattr(_descent, "project_to_ball", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # all classes in one call
    energies, published = models[name].infer(images).energy.double(), -784 * reference[name].double()
    untouched = ~clipped.T
    assert 0.02 < clipped.float().mean() < 0.3
    assert_close(energies[untouched], published[untouched], rtol=1e-5, atol=0)
    # The slip makes energies too high, never too low.
    assert (energies[~untouched] < published[~untouched] * (1 + 1e-5)).float().mean() > 0.9
    assert torch.equal(energies.argmin(1), published.argmin(1))


@pytest.mark.parametrize("name", ["abs", "binary"])
def test_digits_are_recognised_whatever_the_batch(few_prototypes, digits, name):
    model = few_prototypes[name]
    together = model(digits.images)
    assert (together.argmax(1) == digits.labels).sum() >= 19
    alone = torch.cat([model(image[None]) for image in digits.images[::4]])
    assert_close(alone, together[::4], rtol=1e-4, atol=0)
    assert_close(model(digits.images.flip(0)).flip(0), together, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["abs", "binary"])
def test_float32_agrees_with_float64(few_prototypes, digits, name):
    model, x = few_prototypes[name], digits.images[:4]
    decoders = copy.deepcopy(model.decoders).double().class_decoders()
    latents = model.prototype_latents.double()
    prototypes = Prototypes.decode(decoders, latents, beta=1.0)
    seen = (x > 0.5).double() if name == "binary" else x.double()
    gamma = model.gamma.double() if name == "binary" else 1.0
    expected = gamma * infer_latents(decoders, prototypes, seen.flatten(1), model.settings)[0]
    assert_close(model.infer(x).energy.double(), expected, rtol=1e-4, atol=0)


def test_envelope_gradient_equals_finite_differences_where_latents_are_stationary(shared_data, digits):
    """The envelope theorem, for each class energy of a seven and a two, in two directions."""
    decoders = load_weights(shared_data / "schott2018").decoders
    state, classes = decoders.state_dict(), [1, 2, 3, 7]
    subset = DecoderStack(
        [state[f"weight_{i}"][classes] for i in range(4)], [state[f"bias_{i}"][classes] for i in range(4)]
    )
    weights = Weights(subset, Calibration(alpha=440.0, eta=3.9e-5, gamma=(1.0,) * 4))
    model = ABS(weights, prototypes=200, steps=600, lr=0.01, solver="adam").double()
    x = (0.05 + 0.9 * digits.images[:2]).double().requires_grad_()
    logits = model(x)
    gradients = torch.stack([torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)[0] for c in range(4)], dim=1)

    directions = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions[1] = gradients.sum(1) / gradients.sum(1).abs().max()
    h = 1e-4
    points = torch.stack([torch.zeros_like(directions), h * directions, -h * directions]) + x.detach()
    fast = model.decoders.class_decoders()
    prototypes = Prototypes(model.prototype_latents, model._prototype_images, model.prototype_offsets)
    energies, latents = infer_latents(fast, prototypes, points.view(-1, 784), model.settings)
    energies, latents = energies.view(3, 2, 2, 4), latents.view(3, 2, 2, 4, 8)[0, 0]
    differences = -440.0 / 784 * (energies[1] - energies[2]) / (2 * h)
    slopes = (gradients * directions[:, :, None]).sum((3, 4, 5))

    flat = x.detach().flatten(1)
    forces = [d.squared_error_gradient(z, flat) + z for d, z in zip(fast, latents.unbind(1), strict=True)]
    stationary = torch.stack(forces, dim=1).norm(dim=2) < 1e-3
    assert stationary.sum() >= 5
    assert_close(slopes[:, stationary], differences[:, stationary], rtol=0.01, atol=0)
