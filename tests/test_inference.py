"""Inference: decoders, prototypes, descent, energies and their gradients, against plain or closed forms."""

import math
import multiprocessing
import os
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from abs_defense.inference import (
    ClassDecoder,
    InferenceSettings,
    JointDecoder,
    Prototypes,
    _elementwise,
    descend,
    energy,
    envelope_gradient,
    infer_latents,
    kl_divergence,
    project_to_ball,
    reconstruct,
    sample_latents,
    unrolled_gradient,
)
from abs_defense.inference._elementwise import elu_of_sum
from abs_defense.inference._pairs import Pairs
from abs_defense.models import VAE, fold_decoders

SETTINGS = InferenceSettings(steps=5, lr=0.05, radius=5.0, beta=1.0)


def settings(**changes):
    return InferenceSettings(**{**vars(SETTINGS), **changes})


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def flat_images(count, seed=0, dtype=torch.float64):
    return torch.rand(count, 784, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prototypes_of(stack, count, beta=1.0, seed=0):
    """Decoded prior samples in the precision of the stack."""
    latents = sample_latents(count, stack.latent_dim, seed).to(stack.weight_0.dtype)
    return Prototypes.decode(stack.class_decoders(), latents, beta)


class LinearDecoder:
    """G(z) = W z + b, for which the best latent and the lowest energy have closed forms."""

    def __init__(self, latent_dim, seed):
        self.weight = 0.3 * normal(latent_dim, 784, seed=seed)
        self.bias = flat_images(1, seed=seed + 100)[0]

    def __call__(self, latents):
        return latents @ self.weight + self.bias

    def squared_error_gradient(self, latents, images):
        return 2.0 * (self(latents) - images) @ self.weight.T

    def best_latents(self, images, beta):
        """Solve (2 W W^T + beta I) z = 2 W (x - b)."""
        matrix = 2.0 * self.weight @ self.weight.T + beta * torch.eye(len(self.weight), dtype=torch.float64)
        return torch.linalg.solve(matrix, 2.0 * self.weight @ (images - self.bias).T).T


# Decoders


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("latent_dim", "widths"), [(8, (32, 16, 16)), (8, (5, 4, 3)), (3, (8, 6, 5)), (1, (2, 1, 1))])
def test_class_decoder_equals_transposed_convolutions(random_stack, latent_dim, widths, dtype, tolerance, count):
    stack = random_stack(2, latent_dim, widths=widths, dtype=dtype)
    latents = normal(2, count, latent_dim, dtype=dtype)
    expected = stack(latents)
    assert expected.shape == (2, count, 1, 28, 28)
    assert expected.std() > 0.05
    for decoder, z, images in zip(stack.class_decoders(), latents, expected, strict=True):
        assert_close(decoder(z), images.flatten(1), rtol=0, atol=tolerance)
    joint = JointDecoder(stack.class_decoders())
    assert_close(joint(latents), expected.flatten(2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_decoders_work_in_at_least_float32(random_stack, dtype):
    stack = random_stack(1, dtype=dtype)
    latents = normal(4, 8, dtype=torch.float32)
    decoded = stack.class_decoders()[0](latents)
    assert decoded.dtype == torch.float32
    assert_close(decoded, stack.float()(latents[None])[0].flatten(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(("latent_dim", "widths"), [(8, (32, 16, 16)), (3, (8, 6, 5))])
def test_squared_error_gradient_equals_autograd(random_stack, latent_dim, widths, count):
    stack = random_stack(2, latent_dim, widths=widths)
    latents = normal(2, count, latent_dim).requires_grad_()
    images = flat_images(count)
    errors = (stack(latents).flatten(2) - images).square().sum()
    (expected,) = torch.autograd.grad(errors, latents)
    for decoder, z, gradient in zip(stack.class_decoders(), latents.detach(), expected, strict=True):
        actual = decoder.squared_error_gradient(z, images)
        assert_close(actual, gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("own_images", [True, False])
def test_joint_decoder_equals_class_after_class(random_stack, count, own_images):
    decoders = random_stack(3, 8, widths=(8, 6, 5)).class_decoders()
    latents, images = normal(3, count, 8), flat_images(3 * count).view(3, count, -1)
    if not own_images:
        images = images[0]
    errors, slopes = JointDecoder(decoders).squared_error_and_gradient(latents, images)
    expected = [
        decoder.squared_error_and_gradient(z, x)
        for decoder, z, x in zip(decoders, latents, images.expand(3, -1, -1), strict=True)
    ]
    assert_close(errors, torch.stack([e for e, _ in expected]), rtol=1e-12, atol=0)
    assert_close(slopes, torch.stack([s for _, s in expected]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [1], [0, 4, 5], [0, 1, 5], [2, 3]])
def test_pairs_are_computed_together_as_class_by_class(random_stack, monkeypatch, rows):
    decoders, images = random_stack(3, 8, widths=(3, 2, 2)).class_decoders(), flat_images(2)
    pairs, rows = Pairs.of_all(decoders, images, 0.7), torch.tensor(rows)
    latents = normal(len(rows), 8)
    found = []
    for together in (True, False):
        monkeypatch.setattr(JointDecoder, "is_faster", staticmethod(lambda counts, together=together: together))
        found.append([*pairs.energy_and_gradient(latents, rows), pairs.energy(latents, rows)])
    for together, alone in zip(*found, strict=True):
        assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=["numba", "torch"])
def compiled(request, monkeypatch):
    """With the compiled loop and without."""
    if request.param == "numba":
        pytest.importorskip("numba")
        assert _elementwise._elu_kernel() is not None
    else:
        monkeypatch.setattr(_elementwise, "_elu_kernel", lambda: None)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize(
    ("shape", "bias_shape", "parts"),
    [
        ((1, 16, 5, 7), (16, 1, 1), 1),
        ((100, 16, 25, 25), (16, 1, 1), 1),
        ((7, 1500, 3, 3), (1500, 1, 1), 1),
        ((4, 6, 90), (4, 1, 90), 4),
        ((3, 10, 512), (3, 1, 512), 3),
        ((3, 700, 512), (3, 1, 512), 3),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_elu_of_sum(threads, shape, bias_shape, parts, channels_last, dtype, tolerance):
    a, bias = 3.0 * normal(*shape, dtype=dtype), normal(*bias_shape, seed=1, dtype=dtype)
    if channels_last and len(shape) == 4:
        a = a.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.elu((a + bias).double())
    with torch.no_grad():
        found = elu_of_sum(a.clone(), bias, parts)
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_elu_of_an_element_is_the_same_to_the_bit_wherever_it_lies(threads):
    pytest.importorskip("numba")
    channels = 16
    a, bias = 5.0 * normal(2**16, channels, dtype=torch.float32), normal(1, 1, channels, dtype=torch.float32)
    with torch.no_grad():
        whole = elu_of_sum(a.clone()[None], bias)[0]
        for rows in (1, 2, 3, 5, 63, 64, 65, 1000, 2**15 + 7):
            for start in (0, 1, 17, 2**15 - 9):
                part = elu_of_sum(a[None, start : start + rows].clone(), bias)[0]
                assert torch.equal(part, whole[start : start + rows])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("position", [0, 13, 1023, 1024, 1993])
def test_elu_of_extreme_values(position):
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, -87.0, -88.0, -1000.0, -1e-20, 0.0])
    a = torch.zeros(1, 2003, 1)
    a[0, position : position + len(values), 0] = values
    with torch.no_grad():
        found = elu_of_sum(a, torch.zeros(1, 1, 1))[0, position : position + len(values), 0]
    expected = torch.tensor([math.nan, math.inf, -1.0, 1e38, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0])
    assert_close(found, expected, rtol=0.0, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cannot cache function: no locator available"), EOFError("Ran out of input"), OSError(28, "full")],
)
def test_elu_is_compiled_anew_where_nothing_can_be_kept(monkeypatch, error):
    numba = pytest.importorskip("numba")
    compile_it = numba.njit

    def without_a_place(signature, *, cache=False, **options):
        def decorate(function):
            if cache:
                raise error
            return compile_it(signature, **options)(function)

        return decorate

    monkeypatch.setattr(numba, "njit", without_a_place)
    a = np.full(20, -1.0, np.float32)
    _elementwise._elu_kernel.__wrapped__()(a, np.zeros((1, 5), np.float32))
    np.testing.assert_allclose(a, math.expm1(-1.0), rtol=1e-6)


def test_elu_is_torchs_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert _elementwise._elu_kernel.__wrapped__() is None


def elu_on_threads(connection):
    """With nothing of torch's own: its threads do not survive a fork."""
    a, kernel = np.full(2**20, -1.0, np.float32), _elementwise._elu_kernel()
    _elementwise._run(kernel, a, np.zeros((1, 16), np.float32))
    connection.send(a.sum())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_threads_of_elu_are_there_again_after_a_fork(threads):
    pytest.importorskip("numba")
    pool = _elementwise._threads(os.getpid())
    all_threads = threading.Barrier(pool._max_workers)
    list(pool.map(lambda _: all_threads.wait(60.0), range(pool._max_workers)))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    elu_on_threads(sender)
    expected = receiver.recv()
    child = multiprocessing.get_context("fork").Process(target=elu_on_threads, args=(sender,), daemon=True)
    child.start()
    try:
        assert receiver.poll(60.0)
        assert receiver.recv() == expected
    finally:
        child.kill()
        child.join()


def test_elu_runs_where_the_interpreter_takes_no_more_threads(monkeypatch):
    pytest.importorskip("numba")

    class Closed:
        def submit(self, *_):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(_elementwise, "_threads", lambda process: Closed())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    a = np.full(2**20, -1.0, np.float32)
    _elementwise._run(_elementwise._elu_kernel(), a, np.zeros((1, 16), np.float32))
    np.testing.assert_allclose(a, math.expm1(-1.0), rtol=1e-6)


def rounds_alike_in_batches(threads):
    """Whether this CPU's products and convolutions give an image the same bits in all batches, groups and threads."""

    def single(*shape, seed=1):
        return normal(*shape, seed=seed, dtype=torch.float32)

    def last(*shape):
        return single(*shape).contiguous(memory_format=torch.channels_last)

    image, kernel = last(128, 32, 11, 11), last(32, 16, 5, 5)
    grey, taps = single(128, 28, 28, 1), last(16, 1, 4, 4)
    flipped = taps.transpose(2, 3).repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    operands = [(single(1, 128, a), single(1, a, b, seed=2)) for a, b in ((8, 512), (512, 8))]
    pixels = single(1, 16, 16), single(128 * 625, 16, seed=2)
    conv, upwards = torch.nn.functional.conv2d, partial(torch.nn.functional.conv_transpose2d, stride=2)

    def results(rows):
        yield from ((a[:, :rows] @ b)[0] for a, b in operands)
        yield (pixels[0] @ pixels[1][: rows * 625].T)[0].T
        yield upwards(image[:rows], kernel)
        yield upwards(image[:rows].repeat(1, 2, 1, 1), kernel.repeat(2, 1, 1, 1), groups=2)[:, :16]
        yield conv(grey[:rows].permute(0, 3, 1, 2), taps)
        both = grey[:rows].transpose(1, 2).repeat(1, 1, 1, 2).permute(0, 3, 1, 2)
        yield conv(both, flipped, groups=2)[:, :16].transpose(2, 3)

    torch.set_num_threads(1)
    whole = list(results(128))
    torch.set_num_threads(threads)
    same = all(
        torch.equal(part, value[: len(part)])
        for rows in (8, 16, 24, 40, 104, 128)
        for part, value in zip(results(rows), whole, strict=True)
    )
    grouped = torch.equal(whole[3], whole[4]) and torch.equal(whole[5], whole[6])
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and same and grouped


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_a_pair_is_the_same_to_the_bit_whatever_is_computed_with_it(random_stack, threads):
    decoders = random_stack(10, 8, widths=(32, 16, 16)).float().class_decoders()
    joints = {classes: JointDecoder(decoders[:classes]) for classes in (2, 3, 10)}
    latents, images = normal(10, 100, 8, dtype=torch.float32), flat_images(100, dtype=torch.float32)
    if not rounds_alike_in_batches(threads):
        pytest.skip("this CPU's kernels round differently in batches of different sizes")
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = decoders[1].squared_error_and_gradient(latents[1], images)
        torch.set_num_threads(threads)
        for count in (1, 2, 5, 9, 10, 11, 17, 26, 33, 64, 99):
            found = decoders[1].squared_error_and_gradient(latents[1, :count], images[:count])
            for value, all_values in zip(found, expected, strict=True):
                assert torch.equal(value, all_values[:count])
            for classes, joint in joints.items():
                together = joint.squared_error_and_gradient(latents[:classes, :count], images[:count])
                for of_joint, all_values in zip(together, expected, strict=True):
                    assert torch.equal(of_joint[1], all_values[:count])


def test_joint_decoding_pays_for_few_images_of_many_classes():
    assert JointDecoder.is_faster([1] * 10)
    assert not JointDecoder.is_faster([50] * 10)
    assert not JointDecoder.is_faster([6] + [0] * 9)
    assert not JointDecoder.is_faster([0] * 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("latent_dim", [8, 3])
def test_folded_decoders_equal_modules_in_eval_mode(latent_dim, dtype, tolerance):
    with torch.random.fork_rng(devices=[]):
        decoders = [VAE(latent_dim).decoder.to(dtype).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    for module in (m for decoder in decoders for m in decoder if isinstance(m, torch.nn.BatchNorm2d)):
        module.running_mean.normal_(0.0, 0.3, generator=generator)
        module.running_var.uniform_(0.05, 3.0, generator=generator)
        module.weight.data.uniform_(-2.0, 2.0, generator=generator)
        module.bias.data.normal_(0.0, 0.5, generator=generator)
    latents = normal(2, 5, latent_dim, dtype=dtype)
    with torch.no_grad():
        expected = torch.stack([g(z[:, :, None, None]) for g, z in zip(decoders, latents, strict=True)])
        assert expected.std() > 0.01
        assert_close(fold_decoders(decoders)(latents), expected, rtol=0, atol=tolerance)


# Energy


def test_energy_by_hand():
    images = torch.tensor([[1.0, 0.0]])
    reconstructions = torch.tensor([[0.5, 0.25]])
    latents = torch.tensor([[3.0, 4.0]])
    assert kl_divergence(latents).tolist() == [12.5]
    assert energy(images, reconstructions, latents, beta=1.0).tolist() == [0.25 + 0.0625 + 12.5]
    assert energy(images, reconstructions, latents, beta=0.5).tolist() == [0.25 + 0.0625 + 6.25]


def test_energy_broadcasts_over_classes():
    images, reconstructions, latents = flat_images(3), flat_images(6, seed=1).view(3, 2, 784), normal(3, 2, 8)
    energies = energy(images[:, None], reconstructions, latents, beta=2.0)
    assert energies.shape == (3, 2)
    expected = ((reconstructions[1, 0] - images[1]) ** 2).sum() + (latents[1, 0] ** 2).sum()
    assert_close(energies[1, 0], expected)


# Prototypes


@pytest.mark.parametrize(("count", "latent_dim"), [(1, 8), (10, 8), (64, 3), (8000, 8)])
def test_sample_latents_has_shape_and_is_deterministic(count, latent_dim):
    latents = sample_latents(count, latent_dim, seed=7)
    assert latents.shape == (count, latent_dim)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, sample_latents(count, latent_dim, seed=7))
    assert not torch.equal(latents, sample_latents(count, latent_dim, seed=8))


def test_sample_latents_drops_the_least_likely_tenth():
    kept = sample_latents(8000, 8, seed=0).norm(dim=1)
    drawn = torch.randn(8889, 8, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    assert kept.max() < drawn.max()
    # The 90 % quantile of the chi distribution with 8 degrees of freedom is 3.655.
    assert float(kept.max()) == pytest.approx(3.655, abs=0.05)
    assert_close(kept.sort().values, drawn.sort().values[:8000])


def test_sample_latents_keeps_the_order_of_the_draw():
    """Sorted by likelihood, the first half of the prototypes would no longer be a sample of the prior."""
    norms = sample_latents(2000, 8, seed=0).norm(dim=1)
    assert float(norms[:1000].mean()) == pytest.approx(float(norms[1000:].mean()), rel=0.03)


def test_sample_latents_leaves_the_global_random_state():
    before = torch.get_rng_state()
    sample_latents(100, 8, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_latents_is_the_same_under_another_default_dtype():
    expected = sample_latents(50, 8, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        latents = sample_latents(50, 8, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)


def test_prototypes_are_decoded_latents(random_stack):
    stack = random_stack(3)
    latents = normal(150, 8)
    prototypes = Prototypes.decode(stack.class_decoders(), latents, beta=2.0)
    images = stack(latents.expand(3, -1, -1)).flatten(2)
    assert torch.equal(prototypes.latents, latents)
    assert_close(prototypes.images, images, rtol=0, atol=1e-10)
    assert_close(prototypes.offsets, images.square().sum(2) + latents.square().sum(1))


@pytest.mark.parametrize("beta", [1.0, 0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_nearest_prototype_equals_brute_force(random_stack, count, dtype, beta):
    prototypes = prototypes_of(random_stack(3, dtype=dtype), count, beta)
    images = flat_images(20, dtype=dtype)
    indices, energies = prototypes.nearest(images, beta)
    differences = prototypes.images.double()[:, None] - images.double()[None, :, None]
    every = differences.square().sum(3) + beta * 0.5 * prototypes.latents.double().square().sum(1)
    lowest = every.min(dim=2)
    assert indices.shape == (3, 20)
    assert torch.equal(indices, lowest.indices)
    assert energies.dtype == torch.float64
    assert_close(energies, lowest.values, rtol=1e-10, atol=0)
    assert count < 300 or len(indices.unique()) > 1


def test_nearest_prototype_is_exact_where_float32_cannot_tell(random_stack):
    """Three prototypes differ by less than the rounding of the matrix product that looks for them."""
    generator = torch.Generator().manual_seed(1)
    prototypes = prototypes_of(random_stack(1, dtype=torch.float32), 60)
    points = prototypes.images.clone()
    points[0, 10:13] = points[0, 10] + 1e-6 * torch.randn(3, 784, generator=generator)
    latents = prototypes.latents.clone()
    latents[10:13] = 0.0
    offsets = points.square().sum(2) + 0.5 * latents.square().sum(1)
    images = (points[0, 10] + 0.1 * torch.randn(100, 784, generator=generator)).clamp(0, 1)
    indices, _ = Prototypes(latents, points, offsets).nearest(images, 1.0)
    every = (points.double() - images.double()[:, None]).square().sum(2) + 0.5 * latents.double().square().sum(1)
    assert set(every.argmin(1).tolist()) == {10, 11, 12}
    assert torch.equal(indices[0], every.argmin(1))


def test_nearest_prototype_finds_each_prototype_itself(random_stack):
    prototypes = prototypes_of(random_stack(2, dtype=torch.float32), 200, beta=0.0)
    for c in range(2):
        indices, energies = prototypes.nearest(prototypes.images[c], 0.0)
        assert torch.equal(indices[c], torch.arange(200))
        assert energies[c].max() == 0.0


# Descent


@st.composite
def vectors(draw):
    numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
    return draw(st.lists(numbers, min_size=1, max_size=10))


@given(vectors(), st.floats(1e-3, 1e3))
def test_projection_to_ball(vector, radius):
    latents = torch.tensor([vector, [0.0] * len(vector)], dtype=torch.float64)
    projected = project_to_ball(latents, radius)
    norm = float(latents[0].norm())
    assert projected.shape == latents.shape
    assert torch.equal(projected[1], latents[1])
    assert torch.equal(projected.sign(), latents.sign())
    if norm <= radius:
        assert torch.equal(projected, latents)
    else:
        assert float(projected[0].norm()) == pytest.approx(radius, rel=1e-12)
        assert_close(projected[0] * (norm / radius), latents[0], rtol=1e-12, atol=1e-300)


def test_projection_by_hand():
    latents = torch.tensor([[[3.0, -4.0]], [[0.3, -0.4]], [[0.0, 0.0]], [[-6.0, 8.0]]])
    expected = torch.tensor([[[1.2, -1.6]], [[0.3, -0.4]], [[0.0, 0.0]], [[-1.2, 1.6]]])
    assert_close(project_to_ball(latents, 2.0), expected)


def test_projection_of_zero_has_a_finite_derivative():
    latents = torch.zeros(2, 8, requires_grad=True)
    project_to_ball(latents, 1.0).sum().backward()
    assert torch.equal(latents.grad, torch.ones(2, 8))


@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("radius", [5.0, 1.5])
def test_descent_equals_torch_adam(random_stack, radius, beta):
    stack = random_stack(3)
    images, start = flat_images(4), normal(3, 4, 8)
    steps, lr, projections = 12, 0.05, 0

    latents = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=lr)
    for _ in range(steps):
        errors = (stack(latents).flatten(2) - images).square().sum(2)
        loss = ((errors + beta * 0.5 * latents.square().sum(2)) / 784).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            norms = latents.norm(dim=2, keepdim=True)
            projections += int((norms > radius).sum())
            latents.copy_(torch.where(norms > radius, latents / norms * radius, latents))

    found = descend(stack.class_decoders(), images, start, steps=steps, lr=lr, radius=radius, beta=beta)
    assert_close(found, latents.detach(), rtol=0, atol=1e-8)
    assert (projections > 0) == (radius == 1.5)


def test_descent_of_zero_steps_returns_the_start_and_no_descent_changes_it(random_stack):
    decoders = random_stack(2).class_decoders()
    images, start = flat_images(3), normal(2, 3, 8)
    kept_images, kept_start = images.clone(), start.clone()
    arguments = {"lr": 0.05, "radius": 5.0, "beta": 1.0}
    assert torch.equal(descend(decoders, images, start, steps=0, **arguments), start)
    moved = descend(decoders, images, start, steps=3, **arguments)
    assert not torch.equal(moved, kept_start)
    assert torch.equal(images, kept_images)
    assert torch.equal(start, kept_start)


def test_descent_stays_at_a_stationary_point():
    """Both the error and the prior pull with exactly zero force at z = 0, if G does not depend on z."""
    decoder = LinearDecoder(4, seed=0)
    decoder.weight.zero_()
    found = descend([decoder], flat_images(2), torch.zeros(1, 2, 4).double(), steps=5, lr=0.05, radius=5.0, beta=1.0)
    assert torch.equal(found, torch.zeros(1, 2, 4).double())


# Inference


@pytest.mark.parametrize("images", [2, 300])
def test_descent_elsewhere_than_on_a_cpu_asks_for_no_value_and_compiles_to_one_graph(random_stack, images):
    """So a CUDA graph can record it. Tensors of the device "meta" have no values."""
    decoders = random_stack(classes=3, dtype=torch.float32).to("meta").class_decoders()
    x, z = torch.empty(images, 784, device="meta"), torch.empty(3, images, 8, device="meta")

    def run(z):
        return descend(decoders, x, z, steps=2, lr=0.05, radius=5.0, beta=1.0)

    with torch.no_grad():
        assert run(z).shape == z.shape
        assert torch.compile(run, backend="eager", fullgraph=True)(z).shape == z.shape


@pytest.mark.parametrize("classes", [1, 3, 12])
def test_inference_treats_each_class_alone(random_stack, classes):
    stack = random_stack(classes)
    decoders, prototypes, images = stack.class_decoders(), prototypes_of(stack, 40), flat_images(5)
    energies, latents = infer_latents(decoders, prototypes, images, SETTINGS)
    assert energies.shape == (5, classes)
    assert latents.shape == (5, classes, 8)
    for c in range(classes):
        one = Prototypes(prototypes.latents, prototypes.images[c : c + 1], prototypes.offsets[c : c + 1])
        energies_alone, latents_alone = infer_latents(decoders[c : c + 1], one, images, SETTINGS)
        assert_close(energies[:, c], energies_alone[:, 0], rtol=1e-10, atol=0)
        assert_close(latents[:, c], latents_alone[:, 0], rtol=0, atol=1e-8)


def test_inference_is_nearest_prototype_then_descent(random_stack):
    stack = random_stack(3)
    decoders, prototypes, images = stack.class_decoders(), prototypes_of(stack, 40), flat_images(5)
    energies, latents = infer_latents(decoders, prototypes, images, SETTINGS)
    start = prototypes.latents[prototypes.nearest(images, 1.0)[0]]
    found = descend(decoders, images, start, steps=5, lr=0.05, radius=5.0, beta=1.0)
    assert_close(latents, found.transpose(0, 1), rtol=0, atol=1e-10)
    assert_close(energies, energy(images, stack(found).flatten(2), found, 1.0).T, rtol=1e-10, atol=0)


def test_inference_of_zero_steps_is_the_nearest_prototype(random_stack):
    stack = random_stack(3)
    prototypes, images = prototypes_of(stack, 40), flat_images(5)
    energies, latents = infer_latents(stack.class_decoders(), prototypes, images, settings(steps=0))
    indices, nearest = prototypes.nearest(images, 1.0)
    assert_close(energies, nearest.T, rtol=1e-12, atol=0)
    assert torch.equal(latents, prototypes.latents[indices].transpose(0, 1))


def test_descent_lowers_the_energy(random_stack):
    stack = random_stack(3)
    decoders, prototypes, images = stack.class_decoders(), prototypes_of(stack, 40), flat_images(5)
    by_steps = [infer_latents(decoders, prototypes, images, settings(steps=s))[0] for s in (0, 5, 50)]
    assert (by_steps[1] < by_steps[0]).all()
    assert (by_steps[2] < by_steps[1]).all()


@pytest.mark.parametrize("count", [129, 300])
def test_inference_of_many_images_equals_a_loop_and_works_in_chunks(random_stack, monkeypatch, count):
    stack = random_stack(2, widths=(3, 2, 2))
    decoders, prototypes, images = stack.class_decoders(), prototypes_of(stack, 16), flat_images(count)
    expected = [infer_latents(decoders, prototypes, image[None], settings(steps=1)) for image in images]

    sizes = []
    for name in ("__call__", "squared_error_gradient"):
        original = getattr(ClassDecoder, name)

        def watched(self, latents, *args, original=original):
            sizes.append(len(latents))
            return original(self, latents, *args)

        monkeypatch.setattr(ClassDecoder, name, watched)
    energies, latents = infer_latents(decoders, prototypes, images, settings(steps=1))
    reconstructions = reconstruct(decoders, latents)
    gradient = envelope_gradient(decoders, images, latents, torch.ones_like(energies))

    assert max(sizes) <= 128
    assert_close(energies, torch.cat([e for e, _ in expected]), rtol=1e-9, atol=0)
    assert_close(latents, torch.cat([z for _, z in expected]), rtol=0, atol=1e-8)
    assert_close(reconstructions.flatten(2).transpose(0, 1), stack(latents.transpose(0, 1)).flatten(2))
    assert_close(gradient, (2.0 * (images[:, None] - reconstructions.flatten(2))).sum(1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [0, 3])
def test_inference_of_no_images(random_stack, steps):
    stack = random_stack(3)
    decoders, prototypes, images = stack.class_decoders(), prototypes_of(stack, 16), flat_images(0)
    energies, latents = infer_latents(decoders, prototypes, images, settings(steps=steps))
    assert energies.shape == (0, 3)
    assert latents.shape == (0, 3, 8)
    assert reconstruct(decoders, latents).shape == (0, 3, 1, 28, 28)
    assert envelope_gradient(decoders, images, latents, energies).shape == (0, 784)
    assert unrolled_gradient(decoders, prototypes, images, energies, settings(steps=steps)).shape == (0, 784)


@pytest.mark.parametrize("steps", [0, 20])
def test_float32_energies_agree_with_float64(random_stack, steps):
    stack = random_stack(4, widths=(32, 16, 16))
    latents = sample_latents(100, 8, seed=0)
    images = flat_images(10, dtype=torch.float32)
    energies = []
    for dtype in (torch.float64, torch.float32):
        decoders = stack.to(dtype).class_decoders()
        prototypes = Prototypes.decode(decoders, latents.to(dtype), beta=1.0)
        energies.append(infer_latents(decoders, prototypes, images.to(dtype), settings(steps=steps))[0])
    assert energies[1].dtype == torch.float32
    assert_close(energies[1].double(), energies[0], rtol=1e-4, atol=0)


# Closed forms


def test_constant_decoder_has_its_best_latent_at_zero(random_stack):
    stack = random_stack(2)
    for name, parameter in stack.named_parameters():
        if name.startswith("weight"):
            parameter.zero_()
    decoders, images = stack.class_decoders(), flat_images(4)
    prototypes = Prototypes.decode(decoders, 0.3 * normal(10, 8), beta=1.0)
    lowest = (torch.sigmoid(stack.bias_3)[None] - images[:, None]).square().sum(2)
    gaps = []
    for steps in (0, 3, 500):
        energies, latents = infer_latents(decoders, prototypes, images, settings(steps=steps, lr=0.01))
        gaps.append(energies - lowest)
        assert_close(gaps[-1], 0.5 * latents.square().sum(2), rtol=0, atol=1e-9)
    assert (gaps[0] > 0.01).all()
    assert (gaps[1] < gaps[0]).all()
    assert (gaps[2] < 1e-4).all()


@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_linear_gaussian_decoder_has_a_closed_form(beta):
    decoders = [LinearDecoder(4, seed=c) for c in range(3)]
    images = flat_images(6)
    prototypes = Prototypes.decode(decoders, sample_latents(50, 4, seed=0).double(), beta)
    found, latents = infer_latents(decoders, prototypes, images, settings(steps=1500, lr=0.02, beta=beta))
    best = torch.stack([decoder.best_latents(images, beta) for decoder in decoders], dim=1)
    assert best.norm(dim=2).max() < 5.0
    assert_close(latents, best, rtol=0, atol=1e-4)
    reconstructions = torch.stack([decoder(z) for decoder, z in zip(decoders, best.unbind(1), strict=True)], dim=1)
    assert_close(found, energy(images[:, None], reconstructions, best, beta), rtol=1e-8, atol=0)


def test_gradients_of_a_linear_gaussian_decoder_are_those_of_the_lowest_energy():
    """The envelope theorem: at the best latents, the gradient at fixed latents is that of the minimum."""
    decoders = [LinearDecoder(4, seed=c) for c in range(3)]
    images, cotangent = flat_images(2).requires_grad_(), normal(2, 3)
    best = torch.stack([decoder.best_latents(images, 1.0) for decoder in decoders], dim=1)
    decoded = torch.stack([decoder(z) for decoder, z in zip(decoders, best.unbind(1), strict=True)], dim=1)
    lowest = energy(images[:, None], decoded, best, 1.0)
    (expected,) = torch.autograd.grad((cotangent * lowest).sum(), images)

    images = images.detach()
    assert_close(envelope_gradient(decoders, images, best.detach(), cotangent), expected, rtol=0, atol=1e-9)
    prototypes = Prototypes.decode(decoders, sample_latents(20, 4, seed=0).double(), 1.0)
    many = settings(steps=600, lr=0.02)
    unrolled = unrolled_gradient(decoders, prototypes, images, cotangent, many)
    assert_close(unrolled, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# Gradients


def test_envelope_gradient_equals_autograd_at_fixed_latents(random_stack):
    stack = random_stack(3)
    latents, cotangent = normal(4, 3, 8), normal(4, 3)
    images = flat_images(4).requires_grad_()
    energies = energy(images[:, None], stack(latents.transpose(0, 1)).flatten(2).transpose(0, 1), latents, 1.0)
    (expected,) = torch.autograd.grad((cotangent * energies).sum(), images)
    actual = envelope_gradient(stack.class_decoders(), images.detach(), latents, cotangent)
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("radius", [5.0, 1.0])
def test_unrolled_gradient_equals_finite_differences(random_stack, radius):
    stack = random_stack(3)
    decoders, prototypes = stack.class_decoders(), prototypes_of(stack, 8)
    images, cotangent, few = flat_images(2), normal(2, 3), settings(steps=3, radius=radius)
    gradient = unrolled_gradient(decoders, prototypes, images, cotangent, few)
    envelope = envelope_gradient(decoders, images, infer_latents(decoders, prototypes, images, few)[1], cotangent)
    assert not torch.allclose(gradient, envelope, rtol=1e-2)

    def objective(x):
        return float((cotangent * infer_latents(decoders, prototypes, x, few)[0]).sum())

    h = 1e-6
    for seed in range(5):
        direction = normal(2, 784, seed=seed)
        difference = (objective(images + h * direction) - objective(images - h * direction)) / (2 * h)
        slope = float((gradient * direction).sum())
        assert slope == pytest.approx(difference, rel=1e-5, abs=1e-8 * float(gradient.norm()))


def test_unrolled_gradient_is_finite_where_the_force_on_a_latent_is_zero():
    """There Adam divides by the root of zero, whose derivative is infinite."""
    decoder = LinearDecoder(4, seed=0)
    decoder.weight.zero_()
    images, cotangent = flat_images(2), normal(2, 1)
    prototypes = Prototypes.decode([decoder], torch.zeros(1, 4).double(), 1.0)
    gradient = unrolled_gradient([decoder], prototypes, images, cotangent, SETTINGS)
    assert_close(gradient, 2.0 * cotangent * (images - decoder.bias))


def test_unrolled_gradient_of_many_images_equals_a_loop(random_stack):
    stack = random_stack(2, widths=(3, 2, 2))
    decoders, prototypes = stack.class_decoders(), prototypes_of(stack, 8)
    images, cotangent, few = flat_images(40), normal(40, 2), settings(steps=2)
    together = unrolled_gradient(decoders, prototypes, images, cotangent, few)
    parts = zip(images.split(1), cotangent.split(1), strict=True)
    alone = torch.cat([unrolled_gradient(decoders, prototypes, x, w, few) for x, w in parts])
    assert_close(together, alone, rtol=0, atol=1e-7 * float(alone.abs().max()))


def test_chi_quantile_used_above():
    """The share of the chi distribution (8 degrees) below 3.655 is 0.9: its closed form for even degrees."""
    half = np.square(3.655) / 2
    share = 1.0 - math.exp(-half) * sum(half**k / math.factorial(k) for k in range(4))
    assert share == pytest.approx(0.9, abs=1e-3)
