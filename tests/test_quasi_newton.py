"""The solver "bfgs": the known optimum of a linear decoder, the ball, its starts, and energies against Adam's."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS
from abs_defense.inference import (
    Prototypes,
    _quasi_newton,
    average_curvature,
    energy,
    infer_latents,
    minimise,
    sample_latents,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count, seed=0):
    return torch.rand(count, 784, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearDecoder:
    """G(z) = W z + b, so that E is quadratic."""

    def __init__(self, latent_dim, seed):
        self.weight = 0.3 * normal(latent_dim, 784, seed=seed)
        self.bias = images(1, seed=seed + 100)[0]

    def __call__(self, latents):
        return latents @ self.weight + self.bias

    def squared_error_and_gradient(self, latents, x):
        difference = self(latents) - x
        return difference.square().sum(1), 2.0 * difference @ self.weight.T

    def lowest_energy(self, x, radius, beta):
        """(H + m I) z = -g, where the multiplier m of the ball is 0 or the root of |z| = radius."""
        hessian = (2.0 * self.weight @ self.weight.T).numpy() + beta * np.eye(len(self.weight))
        slope = 2.0 * (self.weight @ (self.bias - x)).numpy()

        def point(multiplier):
            return np.linalg.solve(hessian + multiplier * np.eye(len(slope)), -slope)

        def outside(multiplier):
            return float(np.linalg.norm(point(multiplier))) - radius

        multiplier = 0.0
        if outside(0.0) > 0.0:
            multiplier = scipy.optimize.brentq(outside, 0.0, np.linalg.norm(slope) / radius, xtol=1e-13)
        z = torch.from_numpy(point(multiplier))
        return float((self(z) - x).square().sum()) + 0.5 * beta * float(z @ z)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("radius", [5.0, 0.2, 0.02])
def test_finds_the_minimum_of_a_quadratic_energy_inside_and_on_the_ball(radius, beta):
    decoders, x = [LinearDecoder(4, seed=c) for c in range(3)], images(5, seed=7)
    starts = 0.01 * normal(2, 3, 5, 4)
    curvature = average_curvature(decoders, normal(8, 4), beta) * torch.tensor([1.0, 0.3, 4.0])[:, None, None]
    found, energies = minimise(decoders, x, starts, curvature, steps=50, radius=radius, beta=beta)
    assert found.shape == (3, 5, 4)
    assert float(found.norm(dim=-1).max()) <= radius * (1 + 1e-12)
    for decoder, z, stated in zip(decoders, found, energies, strict=True):
        actual = energy(x, decoder(z), z, beta)
        assert_close(stated, actual)
        expected = torch.tensor([decoder.lowest_energy(image, radius, beta) for image in x], dtype=torch.float64)
        assert float((actual - expected).max()) < 0.02
        assert float((actual - expected).min()) > -1e-9


def test_average_curvature_of_a_linear_decoder_is_its_hessian():
    decoder = LinearDecoder(4, seed=0)
    hessian = 2.0 * decoder.weight @ decoder.weight.T + 0.5 * torch.eye(4, dtype=torch.float64)
    assert_close(average_curvature([decoder], normal(6, 4), 0.5)[0], hessian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 50])
def test_more_steps_never_raise_the_energy_and_zero_leave_the_best_start(random_stack, steps):
    stack = random_stack(3)
    decoders, x = stack.class_decoders(), images(6)
    starts = normal(2, 3, 6, 8)
    curvature = average_curvature(decoders, normal(8, 8, seed=1), 1.0)

    def energies(latents):
        return torch.stack([energy(x, g(z), z, 1.0) for g, z in zip(decoders, latents, strict=True)])

    best_start = torch.minimum(energies(starts[0]), energies(starts[1]))
    latents, stated = minimise(decoders, x, starts, curvature, steps=steps, radius=5.0, beta=1.0)
    found = energies(latents)
    assert_close(stated, found)
    assert bool((found <= best_start + 1e-9).all())
    assert steps == 0 or float((best_start - found).mean()) > 0.1
    if steps == 0:
        assert_close(found, best_start)


def test_result_of_an_image_does_not_depend_on_the_others(random_stack):
    stack = random_stack(3)
    decoders, x = stack.class_decoders(), images(70)
    starts = normal(2, 3, 70, 8)
    curvature = average_curvature(decoders, normal(8, 8, seed=1), 1.0)
    together, energies = minimise(decoders, x, starts, curvature, steps=30, radius=5.0, beta=1.0)
    for i in (0, 33, 69):
        alone, energy_alone = minimise(decoders, x[[i]], starts[:, :, [i]], curvature, steps=30, radius=5.0, beta=1.0)
        assert_close(together[:, [i]], alone, rtol=1e-8, atol=1e-8)
        assert_close(energies[:, [i]], energy_alone)


def test_two_starts_are_the_nearest_prototype_and_one_far_from_it(random_stack):
    stack = random_stack(3)
    latents = sample_latents(200, 8, 0).double()
    prototypes = Prototypes.decode(stack.class_decoders(), latents, 1.0)
    x = images(9)
    (first, second), energies = prototypes.nearest_two(x, 1.0)
    assert torch.equal(first, prototypes.nearest(x, 1.0)[0])
    assert torch.equal(energies, prototypes.nearest(x, 1.0)[1])
    scores = prototypes.offsets[:, None] - 2.0 * x @ prototypes.images.transpose(1, 2)  # (C, N, K)
    for c in range(3):
        for i in range(9):
            distance = (latents - latents[first[c, i]]).norm(dim=1)
            lowest = scores[c, i].argsort()[:32]
            far = lowest[distance[lowest] >= 2.5]
            expected = far[0] if len(far) else lowest[lowest != first[c, i]][0]
            assert second[c, i] == expected


@pytest.mark.parametrize("count", [1, 2])
def test_few_or_equal_prototypes(random_weights, random_images, count):
    one = torch.zeros(count, 8)
    logits = ABS(random_weights(3), prototypes=one, solver="bfgs")(random_images(2))
    assert logits.shape == (2, 3)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_energies_on_digits_are_no_higher_than_those_of_adam(kind, digits):
    with torch.no_grad():
        adam, bfgs = (kind(prototypes=500, solver=solver).infer(digits.images) for solver in ("adam", "bfgs"))
    assert torch.equal(adam.prediction, bfgs.prediction)
    assert float((bfgs.energy - adam.energy).mean()) < 0.0
    assert float((bfgs.energy - adam.energy).gather(1, digits.labels[:, None]).max()) < 0.2


def test_envelope_gradient_is_that_of_the_converged_energy(random_weights, random_images, monkeypatch):
    monkeypatch.setattr(_quasi_newton, "_TOLERANCE", 1e-9)
    model = ABS(random_weights(3), prototypes=64, steps=200, solver="bfgs").double()
    x = random_images(2, dtype=torch.float64).requires_grad_()
    latents = model.infer(x).latents.double()
    assert float(latents.norm(dim=-1).max()) < 4.9
    buffers = (model.prototype_latents, model._prototype_images, model.prototype_offsets, model.curvature)

    def energies(batch):
        flat = batch.detach().flatten(1)
        return infer_latents(model.decoders.class_decoders(), Prototypes(*buffers), flat, model.settings)[0]

    direction = 0.3 * normal(2, 1, 28, 28, seed=5)
    slope = (energies(x + 1e-2 * direction) - energies(x - 1e-2 * direction)) / 2e-2
    logits = model(x)
    for c in range(3):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)
        analytic = -(gradient * direction).flatten(1).sum(1) * 784 / float(model.alpha)
        assert_close(analytic, slope[:, c], rtol=0.01, atol=0.01)


def test_unknown_solver_and_unrolling_it_are_refused():
    with pytest.raises(ValueError, match="solver: expected one of adam, bfgs, got 'newton'"):
        ABS(weights=None, solver="newton")
    with pytest.raises(ValueError, match='expected solver="adam"'):
        ABS(weights=None, solver="bfgs", gradient="unrolled")
