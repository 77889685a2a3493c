"""ABS and Binary ABS as modules: what their logits are, and that they survive what libraries do to a module."""

import copy
import io
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS, Inference, load_model
from abs_defense._precision import full_precision
from abs_defense.inference import Prototypes, infer_latents
from abs_defense.models import MODEL_NAMES, Clipped, bundled_weights, load_card, save_weights
from abs_defense.models._weights import sha256

MODELS = ("tiny_abs", "tiny_binary", "small_abs", "small_binary", "bfgs_abs", "bfgs_binary")


@pytest.fixture(params=MODELS)
def model(request):
    """Each of the shared models, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[ABS, BinaryABS])
def kind(request):
    return request.param


@pytest.fixture(params=["envelope", "unrolled"])
def with_gradient(request, kind, random_weights):
    """A model of each kind, with each of the policies that yield a gradient."""
    return kind(random_weights(3), prototypes=32, steps=3, gradient=request.param)


@pytest.fixture(scope="module")
def images(digits, random_images):
    """150 images: digits, shifted digits, noisy digits and pure noise."""
    shifted = [digits.images.roll(shift, dims=(2, 3)) for shift in ((1, 0), (0, 1), (2, -1), (-2, 2), (3, 3))]
    noisy = (0.5 * digits.images + 0.5 * random_images(20)).clamp(0, 1)
    return torch.cat([digits.images, *shifted, noisy, random_images(10, seed=1)])


def assert_same_logits(actual, expected, rtol=1e-4):
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected, rtol=rtol, atol=0)


def gradient_of(model, images, cotangent=None):
    images = images.detach().clone().requires_grad_()
    logits = model(images)
    weights = torch.linspace(-1.0, 2.0, logits.shape[1]).expand_as(logits) if cotangent is None else cotangent
    return torch.autograd.grad((weights * logits).sum(), images)[0]


def exact_logits(model, images):
    """The logits of a float64 model, in float64, which ``forward`` rounds to float32."""
    buffers = (model.prototype_latents, model._prototype_images, model.prototype_offsets, model.curvature)
    prototypes = Prototypes(*buffers)
    flat = images.flatten(1)
    return (
        -float(model.alpha) / 784 * infer_latents(model.decoders.class_decoders(), prototypes, flat, model.settings)[0]
    )


# Construction


def test_bundled_weights_recognise_the_digits(digits):
    model = ABS()
    assert len(model.prototype_latents) == 8000
    assert model.settings.steps == 50
    assert (model(digits.images).argmax(1) == digits.labels).sum() >= 19


def test_new_model_is_frozen_and_in_eval_mode(model):
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert len(list(model.parameters())) == 8
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert next(model.parameters()).device == torch.device("cpu")


def test_constructing_leaves_the_global_random_states():
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    model = ABS(weights=None, prototypes=4, steps=1)
    model(torch.zeros(1, 1, 28, 28))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize("classes", [1, 3, 12])
def test_any_number_of_classes(kind, classes, random_weights, digits):
    model = kind(random_weights(classes), prototypes=16, steps=2)
    assert model.num_classes == classes
    assert model(digits.images).shape == (20, classes)
    assert model.predict_proba(digits.images).shape == (20, classes)
    assert gradient_of(model, digits.images).shape == (20, 1, 28, 28)


@pytest.mark.parametrize("latent_dim", [3, 8])
def test_any_number_of_latents(kind, latent_dim, random_weights, digits):
    model = kind(random_weights(2, latent_dim=latent_dim), prototypes=16, steps=2)
    assert model.latent_dim == latent_dim
    assert model.infer(digits.images).latents.shape == (20, 2, latent_dim)


def test_settings_stand_in_the_representation():
    text = repr(ABS(weights=None, prototypes=17, steps=3, lr=0.25, gradient="unrolled", seed=5))
    for part in ("prototypes=17", "steps=3", "lr=0.25", "radius=5.0", "beta=1.0", "gradient='unrolled'", "seed=5"):
        assert part in text


# An image's logits do not depend on its batch


def test_logits_alone_equal_logits_in_a_batch(model, images):
    together = model(images[:64])
    alone = torch.cat([model(image[None]) for image in images[:64:4]])
    assert_same_logits(together[::4], alone)


def test_logits_do_not_depend_on_chunks(kind, random_weights, images):
    """128 images are worked on at once: 150 are two chunks of different sizes."""
    model = kind(random_weights(), prototypes=64, steps=2)
    assert len(images) == 150
    parts = torch.cat([model(part) for part in images.split(30)])
    assert_same_logits(model(images), parts)


def test_logits_do_not_depend_on_order(model, images):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert_same_logits(model(images[order]), model(images[:64])[order])


def test_logits_do_not_depend_on_the_other_images(model, images):
    first = torch.cat([images[:5], images[100:130]])
    second = torch.cat([images[:5], torch.ones(3, 1, 28, 28)])
    assert_same_logits(model(first)[:5], model(second)[:5])


def test_the_same_batch_twice_gives_the_same_logits(model, images):
    assert torch.equal(model(images[:20]), model(images[:20]))


def test_gradients_do_not_depend_on_the_batch(with_gradient, images):
    together = gradient_of(with_gradient, images[:40])
    alone = torch.cat([gradient_of(with_gradient, image[None]) for image in images[:40]])
    scale = float(alone.abs().max())
    assert scale > 0
    assert_close(together, alone, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "strided"])
def test_memory_layout_does_not_matter(small_abs, images, layout):
    views = {
        "transposed": images[:4].transpose(2, 3),
        "channels_last": images[:4].to(memory_format=torch.channels_last),
        "expanded": images[:1].expand(4, -1, -1, -1),
        "strided": images[:8:2],
    }
    view = views[layout]
    assert_same_logits(small_abs(view), small_abs(view.clone(memory_format=torch.contiguous_format)))


# Determinism


def test_same_seed_same_logits_other_seed_other_logits(kind, random_weights, digits):
    weights = random_weights(3)
    first, again, other = (kind(weights, prototypes=64, steps=5, seed=seed)(digits.images) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-4)


def test_untrained_models_are_equal():
    first, second = (ABS(weights=None, prototypes=4, steps=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_logits_are_the_same_in_another_process(tiny_abs, digits):
    """There with another number of threads and another global seed."""
    program = """
import json, torch
torch.set_num_threads(1)
torch.manual_seed(99)
from abs_defense import ABS
from abs_defense.data import foolbox_digits
print(json.dumps(ABS(weights=None, prototypes=64, steps=5)(foolbox_digits().images[:5]).tolist()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert_same_logits(torch.tensor(json.loads(run.stdout)), tiny_abs(digits.images[:5]))


# Other people's modes and graphs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_logits_are_the_same_in_each_mode(model, digits, mode):
    expected = model(digits.images)
    with mode():
        logits = model(digits.images)
        energies = model.infer(digits.images).energy
    assert not logits.requires_grad
    assert torch.equal(logits, expected)
    assert_close(energies * -440.0 / 784, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_where_the_caller_wants_none(with_gradient, digits, mode):
    x = digits.images[:2].clone().requires_grad_()
    with mode():
        assert not with_gradient(x).requires_grad
    assert with_gradient(x).requires_grad


def test_infer_gives_ordinary_tensors_without_graph(with_gradient, digits):
    x = digits.images[:2].clone().requires_grad_()
    with torch.inference_mode():
        inference = with_gradient.infer(x)
    for tensor in (inference.energy, inference.latents, inference.reconstructions):
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def test_images_made_in_inference_mode_are_welcome(with_gradient, digits):
    with torch.inference_mode():
        made = digits.images[:2].clone()
    assert_same_logits(with_gradient(made), with_gradient(digits.images[:2]))


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_model_made_in_inference_mode_has_gradients(kind, gradient, random_stack, random_weights, digits):
    expected = gradient_of(kind(random_weights(3), prototypes=32, steps=3, gradient=gradient), digits.images[:2])
    with torch.inference_mode():
        model = kind(random_weights(3), prototypes=32, steps=3, gradient=gradient)
    assert_close(gradient_of(model, digits.images[:2]), expected)


def test_untrained_model_made_in_inference_mode_has_gradients(kind, digits):
    with torch.inference_mode():
        model = kind(weights=None, prototypes=4, steps=1)
    expected = gradient_of(kind(weights=None, prototypes=4, steps=1), digits.images[:2])
    assert_close(gradient_of(model, digits.images[:2]), expected)


def test_gradients_flow_into_the_callers_graph(with_gradient, digits):
    images, parameter = 0.5 * digits.images[:3], torch.tensor(0.8, requires_grad=True)
    logits = with_gradient(parameter * images)
    assert logits.requires_grad
    logits.sum().backward()
    inner = gradient_of(with_gradient, 0.8 * images, torch.ones(3, 3))
    assert parameter.grad.abs() > 0
    assert_close(parameter.grad, (inner * images).sum(), rtol=1e-4, atol=1e-3)


def test_two_calls_in_one_graph_add_up(with_gradient, digits):
    x = digits.images[:2].clone().requires_grad_()
    (with_gradient(x)[:, 0].sum() + with_gradient(1 - x)[:, 1].sum()).backward()
    first = gradient_of(with_gradient, x, torch.eye(3)[0].expand(2, 3))
    second = gradient_of(with_gradient, 1 - x, torch.eye(3)[1].expand(2, 3))
    assert_close(x.grad, first - second)


def test_nothing_is_left_on_parameters_images_or_graph(with_gradient, digits):
    x = digits.images[:2].clone().requires_grad_()
    kept = x.detach().clone()
    logits = with_gradient(x)
    with_gradient.infer(x)
    with_gradient.predict_proba(x)
    assert x.grad is None
    logits.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.detach(), kept)
    tensors = [*with_gradient.parameters(), *with_gradient.buffers()]
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in tensors)


def test_images_may_be_overwritten_before_the_backward_pass(with_gradient, digits):
    """Attacks step in place; the gradient stays that of the images that were classified."""
    x = digits.images[:2].clone().requires_grad_()
    logits = with_gradient(x)
    with torch.no_grad():
        x.fill_(0.5)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(gradient, gradient_of(with_gradient, digits.images[:2], torch.ones(2, 3)))


def test_other_users_of_the_images_keep_their_gradient(with_gradient, digits):
    """An in-place operation on the images inside the model would make this backward pass fail or change it."""
    x = digits.images[:2].clone().requires_grad_()
    squared = x.square().sum()
    (squared + 0.0 * with_gradient(x).sum()).backward()
    assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_neither_used_nor_touched(model, digits, training):
    expected = model(digits.images)
    changed = copy.deepcopy(model).train(training)
    assert torch.equal(changed(digits.images), expected)
    changed.infer(digits.images)
    assert all(module.training == training for module in changed.modules())


def test_default_dtype_at_the_call_does_not_matter(with_gradient, digits):
    expected = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:2])
    torch.set_default_dtype(torch.float64)
    try:
        logits, probabilities = with_gradient(digits.images), with_gradient.predict_proba(digits.images)
        gradient = gradient_of(with_gradient, digits.images[:2])
    finally:
        torch.set_default_dtype(torch.float32)
    assert probabilities.dtype == torch.float32
    assert_same_logits(logits, expected[0])
    assert_close(gradient, expected[1])


@pytest.mark.parametrize("trained", [True, False])
def test_default_dtype_at_construction_does_not_matter(kind, trained, random_weights, digits):
    weights = random_weights(3) if trained else None
    expected = kind(weights, prototypes=32, steps=3)(digits.images)
    torch.set_default_dtype(torch.float64)
    try:
        model = kind(weights, prototypes=32, steps=3)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_logits(model(digits.images), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_change_logits_or_gradients(with_gradient, digits, dtype):
    expected = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:2])
    with torch.autocast("cpu", dtype=dtype):
        logits, gradient = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:2])
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(logits, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.fixture
def settings_of_products():
    """Where torch keeps which products may be reduced, and what is set there; afterwards as it was."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has no settings of precision by backend")
    places = [(torch.backends, "fp32_precision")]
    places += [(torch.backends.mkldnn.matmul, "fp32_precision"), (torch.backends.mkldnn.conv, "fp32_precision")]
    places += [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.conv, "fp32_precision")]
    places += [(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")]
    yield lambda: [getattr(*place) for place in places]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for owner, name in places[:4]:
        setattr(owner, name, "none")


ALLOWED = {
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cudnn": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "products": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "convolutions": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("allow", ALLOWED.values(), ids=ALLOWED)
def test_reduced_products_do_not_change_logits_or_gradients(with_gradient, digits, allow, settings_of_products):
    expected = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:2])
    allow()
    before = settings_of_products()
    logits, gradient = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:2])
    assert settings_of_products() == before
    assert torch.equal(logits, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("allow", ALLOWED.values(), ids=ALLOWED)
def test_products_are_not_reduced_until_the_last_thread_is_done(allow, settings_of_products, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)  # its settings exist without it
    allow()
    before = settings_of_products()
    first, second = full_precision(torch.device("cpu")), full_precision(torch.device("cpu"))
    first.__enter__()
    within = settings_of_products()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings_of_products() == within
    second.__exit__(None, None, None)
    assert settings_of_products() == before
    assert within[5:] == before[5:]
    assert not {"tf32", "bf16"} & set(within[1:5])


def test_what_was_changed_before_an_error_is_put_back(settings_of_products, monkeypatch):
    ALLOWED["cuda"]()
    before = settings_of_products()

    def fail():
        raise RuntimeError("not now")

    monkeypatch.setattr(torch.backends.cudnn, "is_available", fail)
    with pytest.raises(RuntimeError, match="not now"), full_precision(torch.device("cpu")):
        pass
    assert settings_of_products() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_every_precision_can_be_described(kind, random_weights, dtype):
    model = kind(random_weights(3), prototypes=5, steps=0)
    before = model.describe()
    after = model.to(dtype).describe()
    assert before.pop("prototypes_sha256") != after.pop("prototypes_sha256")
    assert before == after


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 5e-2)])
def test_float_images_are_cast_and_logits_are_float32(with_gradient, digits, dtype, tolerance):
    logits = with_gradient(digits.images.to(dtype))
    assert_same_logits(logits, with_gradient(digits.images.to(dtype).float()))
    assert_same_logits(logits, with_gradient(digits.images), rtol=tolerance)
    assert gradient_of(with_gradient, digits.images[:2].to(dtype)).dtype == dtype


# Empty batches


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("gradient", ["envelope", "unrolled", "none"])
def test_empty_batch(kind, gradient, steps, random_weights):
    model = kind(random_weights(3), prototypes=16, steps=steps, gradient=gradient)
    x = torch.zeros(0, 1, 28, 28, requires_grad=True)
    logits = model(x)
    assert logits.shape == (0, 3)
    assert logits.dtype == torch.float32
    assert model.predict_proba(x).shape == (0, 3)
    inference = model.infer(x)
    assert inference.energy.shape == (0, 3)
    assert inference.latents.shape == (0, 3, 8)
    assert inference.reconstructions.shape == (0, 3, 1, 28, 28)
    assert inference.prediction.shape == (0,)
    if gradient != "none":
        logits.sum().backward()
        assert x.grad.shape == (0, 1, 28, 28)


# Gradients


@pytest.mark.parametrize("steps", [0, 3])
def test_gradient_none_gives_detached_logits(kind, random_weights, digits, steps):
    weights = random_weights(3)
    x = digits.images[:2].clone().requires_grad_()
    logits = kind(weights, prototypes=32, steps=steps, gradient="none")(x)
    assert not logits.requires_grad
    assert torch.equal(logits, kind(weights, prototypes=32, steps=steps)(x).detach())


def test_the_gradient_policy_does_not_change_logits(kind, random_weights, digits):
    weights = random_weights(3)
    first, *others = (
        kind(weights, prototypes=32, steps=3, solver="adam", gradient=gradient)(digits.images)
        for gradient in ("envelope", "unrolled", "none")
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("settings", "solver"),
    [({}, "bfgs"), ({"gradient": "unrolled"}, "adam"), ({"gradient": "none"}, "bfgs"), ({"solver": "adam"}, "adam")],
)
def test_the_solver_is_bfgs_unless_gradients_go_through_its_steps(kind, settings, solver):
    assert kind(weights=None, prototypes=1, steps=1, **settings).settings.solver == solver


def test_envelope_gradient_is_the_gradient_at_the_inferred_latents(small_abs, digits):
    """d(-alpha E / 784) / dx = -alpha / 784 * 2 (x - G(z*))."""
    x, cotangent = digits.images[:4], torch.linspace(-1.0, 2.0, 10).expand(4, 10)
    reconstructions = small_abs.infer(x).reconstructions
    expected = (cotangent[:, :, None, None, None] * -440.0 / 784 * 2.0 * (x[:, None] - reconstructions)).sum(1)
    assert_close(gradient_of(small_abs, x, cotangent), expected, rtol=1e-4, atol=1e-5)


def assert_equals_finite_differences(model, images, h, tolerance):
    """Compare slopes along the gradient itself and along random directions, all in one batch."""
    generator = torch.Generator().manual_seed(0)
    count, classes = len(images), model.num_classes
    cotangent = torch.randn(count, classes, generator=generator)
    gradient = gradient_of(model, images, cotangent)
    assert gradient.dtype == torch.float64
    directions = torch.randn(4, *images.shape, generator=generator, dtype=torch.float64)
    directions[0] = 28 * gradient / gradient.norm()
    points = torch.cat([images + h * directions, images - h * directions])
    logits = exact_logits(model, points.flatten(0, 1)).view(2, 4, count, classes)
    differences = (cotangent * (logits[0] - logits[1])).sum((1, 2)) / (2 * h)
    assert_close((gradient * directions).sum((1, 2, 3, 4)), differences, rtol=tolerance, atol=0)


def test_envelope_gradient_of_stationary_latents_equals_finite_differences(random_weights, random_images):
    """600 small steps of Adam make the latents stationary; then the envelope theorem makes the gradient exact."""
    model = ABS(random_weights(3), prototypes=64, steps=600, lr=0.01, solver="adam").double()
    assert_equals_finite_differences(model, random_images(2, dtype=torch.float64), h=1e-4, tolerance=0.01)


@pytest.mark.parametrize(("gradient", "steps"), [("envelope", 0), ("unrolled", 0), ("unrolled", 10)])
def test_gradient_is_exact(random_weights, random_images, gradient, steps):
    """Without descent both policies are exact, and the unrolled one always is."""
    model = ABS(random_weights(4), prototypes=64, steps=steps, gradient=gradient).double()
    tolerance = 1e-6 if steps else 1e-5  # the energies are those of prototypes that were decoded in single precision
    assert_equals_finite_differences(model, random_images(2, dtype=torch.float64), h=1e-6, tolerance=tolerance)


def test_unrolled_gradient_differs_from_the_envelope_after_few_steps(random_weights, digits):
    weights = random_weights(3)
    gradients = [
        gradient_of(ABS(weights, prototypes=32, steps=3, solver="adam", gradient=gradient), digits.images[:4])
        for gradient in ("envelope", "unrolled")
    ]
    assert not torch.allclose(*gradients, rtol=1e-2)


@pytest.mark.parametrize("retained", [True, False])
def test_class_gradients_from_one_retained_graph(with_gradient, digits, retained):
    """What ART's class_gradient, DeepFool and FAB do: a backward pass per class through one forward pass."""
    x = digits.images[:3].clone().requires_grad_()
    logits = with_gradient(x)
    for c in range(3):
        if not retained:
            logits = with_gradient(x)
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), x, retain_graph=retained)
        separate = gradient_of(with_gradient, x, torch.eye(3)[c].expand(3, 3))
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, separate)


def test_ten_retained_backward_passes_accumulate(small_abs, digits):
    x = digits.images[:3].clone().requires_grad_()
    logits = small_abs(x)
    for c in range(10):
        logits[:, c].sum().backward(retain_graph=True)
    assert_close(x.grad, gradient_of(small_abs, x, torch.ones(3, 10)), rtol=1e-4, atol=1e-4)


# Binary ABS


def test_binary_logits_depend_on_the_binarised_image_only(small_binary, images):
    x = images[:30].clone()
    x[0, 0, 0, :2] = torch.tensor([0.5, 0.50001])
    binarised = (x > 0.5).float()
    assert binarised[0, 0, 0, :2].tolist() == [0.0, 1.0]
    squeezed = torch.where(x > 0.5, 0.51 + 0.3 * x, 0.9 * x)
    assert not torch.equal(x, binarised)
    assert torch.equal(small_binary(x), small_binary(binarised))
    assert torch.equal(small_binary(x), small_binary(squeezed))


def test_gamma_multiplies_the_energies(small_abs, small_binary, images):
    binarised = (images[:30] > 0.5).float()
    gamma = torch.tensor([0.9 + 0.02 * c for c in range(10)])
    assert_close(small_binary.gamma, gamma)
    assert_same_logits(small_binary(images[:30]), gamma * small_abs(binarised), rtol=1e-5)


def test_gamma_of_the_paper(tiny_binary):
    expected = torch.tensor([1, 0.96, 1.001, 1.06, 0.98, 0.96, 1.03, 1, 1, 1])
    assert_close(tiny_binary.gamma, expected)


def test_a_model_binarises_at_the_threshold_that_it_names(random_weights, images):
    assert ABS(random_weights(3), prototypes=16, steps=0).binary_threshold is None
    model = BinaryABS(random_weights(3), prototypes=16, steps=0)
    assert Clipped(model).binary_threshold == model.binary_threshold == 0.5
    expected = model((images > 0.3).float())
    model.binary_threshold = 0.3
    assert_close(model(images), expected)
    cnn = load_model("binary-cnn")
    expected = cnn((images > 0.3).float())
    cnn.binary_threshold = 0.3
    assert_close(cnn(images), expected)


@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_binary_gradient_passes_the_threshold_straight_through(random_weights, images, gradient):
    """The gradient at x is the one that the energies have at the binarised image, times gamma."""
    weights = random_weights(3)
    binary = BinaryABS(weights, prototypes=32, steps=3, gradient=gradient)
    plain = ABS(weights, prototypes=32, steps=3, gradient=gradient)
    x, cotangent = images[:4], torch.linspace(-1.0, 2.0, 3).expand(4, 3)
    expected = gradient_of(plain, (x > 0.5).float(), cotangent * binary.gamma)
    assert expected.abs().max() > 0
    assert_close(gradient_of(binary, x, cotangent), expected, rtol=1e-4, atol=1e-5)


def test_binary_envelope_gradient_by_its_formula(small_binary, digits):
    x, cotangent = digits.images[:4], torch.linspace(-1.0, 2.0, 10).expand(4, 10)
    reconstructions = small_binary.infer(x).reconstructions
    weights = (cotangent * small_binary.gamma)[:, :, None, None, None]
    expected = (weights * -440.0 / 784 * 2.0 * ((x[:, None] > 0.5).float() - reconstructions)).sum(1)
    assert_close(gradient_of(small_binary, x, cotangent), expected, rtol=1e-4, atol=1e-5)


# Confidence


def test_probabilities_match_the_formula(model, images):
    x = images[:30]
    probabilities = model.predict_proba(x)
    assert probabilities.dtype == torch.float32
    assert_close(probabilities.sum(1), torch.ones(30))
    likelihood = model(x).double().exp() + 0.000039
    assert_close(probabilities, (likelihood / likelihood.sum(1, keepdim=True)).float(), rtol=1e-4, atol=1e-7)


def test_a_likely_image_is_classified_with_confidence(small_abs, own_images):
    x, labels = own_images(10)
    probabilities = small_abs.predict_proba(x)
    assert torch.equal(probabilities.argmax(1), labels)
    assert (probabilities.max(1).values > 0.9).all()


def test_far_from_the_data_the_confidence_is_uniform(model):
    probabilities = model.predict_proba(torch.ones(1, 1, 28, 28))
    assert_close(probabilities, torch.full((1, 10), 0.1), rtol=0, atol=1e-6)


def test_probabilities_are_differentiable(with_gradient, digits):
    x = digits.images[:2].clone().requires_grad_()
    log_probability = with_gradient.predict_proba(x)[:, 0].log().sum()
    (gradient,) = torch.autograd.grad(log_probability, x)
    assert gradient.isfinite().all()


# Inference


def test_inference_is_consistent_with_the_logits(model, images):
    x = images[:30]
    inference = model.infer(x)
    assert isinstance(inference, Inference)
    assert inference.energy.shape == (30, 10)
    assert inference.latents.shape == (30, 10, 8)
    assert inference.reconstructions.shape == (30, 10, 1, 28, 28)
    for tensor in (inference.energy, inference.latents, inference.reconstructions):
        assert tensor.dtype == torch.float32
    logits = model(x)
    assert_same_logits(logits, -440.0 * inference.energy / 784, rtol=1e-5)
    assert torch.equal(inference.prediction, logits.argmax(1))


def test_energy_belongs_to_the_returned_latents_and_reconstructions(model, images):
    x = images[:30]
    inference = model.infer(x)
    binary = isinstance(model, BinaryABS)
    seen = (x > 0.5).float() if binary else x
    errors = (inference.reconstructions - seen[:, None]).square().sum((2, 3, 4))
    energies = (errors + 0.5 * inference.latents.square().sum(2)) * (model.gamma if binary else 1.0)
    assert_close(inference.energy, energies, rtol=1e-4, atol=0)
    decoded = model.decoders(inference.latents.transpose(0, 1)).transpose(0, 1)
    assert_close(inference.reconstructions, decoded, rtol=0, atol=1e-5)


def test_latents_stay_in_the_ball(random_weights, digits):
    inference = ABS(random_weights(3), prototypes=32, steps=3, radius=1.0).infer(digits.images)
    norms = inference.latents.norm(dim=2)
    assert norms.max() <= 1.0 + 1e-6
    assert (norms > 0.999).any()


def test_beta_weighs_the_prior(random_weights, digits):
    weights = random_weights(3)
    inference = ABS(weights, prototypes=32, steps=3, beta=10.0).infer(digits.images)
    errors = (inference.reconstructions - digits.images[:, None]).square().sum((2, 3, 4))
    assert_close(inference.energy, errors + 10.0 * 0.5 * inference.latents.square().sum(2), rtol=1e-4, atol=0)


# Copies and files


def test_deepcopy(model, digits):
    twin = copy.deepcopy(model)
    assert torch.equal(twin(digits.images), model(digits.images))
    assert next(twin.parameters()) is not next(model.parameters())


def test_pickle(with_gradient, digits):
    twin = pickle.loads(pickle.dumps(with_gradient))
    assert twin.gradient == with_gradient.gradient
    assert torch.equal(twin(digits.images), with_gradient(digits.images))
    assert torch.equal(gradient_of(twin, digits.images[:2]), gradient_of(with_gradient, digits.images[:2]))


def test_state_dict_holds_weights_and_calibration_only(model):
    calibration = {"alpha", "eta", "gamma"} if isinstance(model, BinaryABS) else {"alpha", "eta"}
    layers = {f"decoders.{name}_{i}" for i in range(4) for name in ("weight", "bias")}
    assert set(model.state_dict()) == layers | calibration


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_other_weights(kind, random_weights, digits, assign):
    source = kind(random_weights(10, widths=(32, 16, 16), seed=1), prototypes=32, steps=3)
    target = kind(weights=None, prototypes=32, steps=3)
    assert not torch.allclose(target(digits.images), source(digits.images), rtol=1e-2)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(target(digits.images), source(digits.images))
    assert torch.equal(target.predict_proba(digits.images), source.predict_proba(digits.images))
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_state_dict_does_not_carry_the_seed(random_weights, digits):
    """The prototypes are the target's own: the same weights with another seed give other, close logits."""
    weights = random_weights(3)
    source = ABS(weights, prototypes=32, steps=3, seed=0)
    target = ABS(random_weights(3, seed=7), prototypes=32, steps=3, seed=1)
    target.load_state_dict(source.state_dict())
    expected = ABS(weights, prototypes=32, steps=3, seed=1)(digits.images)
    assert torch.equal(target(digits.images), expected)
    assert not torch.equal(expected, source(digits.images))


def test_state_dict_inside_a_larger_module(random_weights, digits):
    source = nn.Sequential(nn.Identity(), ABS(random_weights(3, seed=1), prototypes=32, steps=3))
    target = nn.Sequential(nn.Identity(), ABS(random_weights(3, seed=2), prototypes=32, steps=3))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(digits.images), source(digits.images))


def test_state_dict_under_inference_mode(random_weights, digits):
    source = ABS(random_weights(3, seed=1), prototypes=32, steps=3)
    target = ABS(random_weights(3, seed=2), prototypes=32, steps=3)
    with torch.inference_mode():
        target.load_state_dict(source.state_dict())
    assert torch.equal(target(digits.images), source(digits.images))
    assert torch.equal(gradient_of(target, digits.images[:2]), gradient_of(source, digits.images[:2]))


# Precision and devices


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_other_precisions_and_back(kind, random_weights, digits, dtype, tolerance):
    model = kind(random_weights(), prototypes=64, steps=5)
    expected = model(digits.images)
    model.to(dtype)
    assert next(model.parameters()).dtype == dtype
    assert model.prototype_latents.dtype == dtype
    assert_same_logits(model(digits.images), expected, rtol=tolerance)
    assert gradient_of(model, digits.images[:2]).isfinite().all()
    model.float()
    assert next(model.parameters()).dtype == torch.float32
    assert_same_logits(model(digits.images), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_state_dict_into_another_precision(random_weights, digits, dtype):
    source = ABS(random_weights(3, seed=1), prototypes=32, steps=3)
    target = ABS(random_weights(3, seed=2), prototypes=32, steps=3).to(dtype)
    target.load_state_dict(source.state_dict())
    assert target.prototype_images.dtype == dtype
    assert_same_logits(target(digits.images), source(digits.images), rtol=1e-1)


def test_prototypes_follow_to(kind, random_weights):
    model = kind(random_weights(3), prototypes=8, steps=1).to("meta")
    assert all(tensor.device.type == "meta" for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"solver": "bfgs", "steps": 3}, torch.float16),
        ({"solver": "adam", "steps": 3}, torch.float32),
        ({"solver": "bfgs", "steps": 0}, torch.float32),
    ],
)
def test_only_starting_points_are_kept_in_half_precision(random_weights, settings, kept):
    model = ABS(random_weights(3), prototypes=40, **settings)
    assert next(b for name, b in model.named_buffers() if name == "_prototype_images").dtype == kept
    decoded = torch.stack([decoder(model.prototype_latents) for decoder in model.decoders.class_decoders()])
    assert model.prototype_images.dtype == torch.float32
    assert_close(model.prototype_images, decoded, rtol=0, atol=2.5e-4 if kept == torch.float16 else 1e-6)
    assert model.prototype_offsets.dtype == torch.float32
    prior = 0.5 * model.prototype_latents.square().sum(1)
    assert_close(model.prototype_offsets, model.prototype_images.square().sum(2) + prior, rtol=1e-6, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_and_back(with_gradient, digits):
    expected = with_gradient(digits.images), gradient_of(with_gradient, digits.images[:4])
    with_gradient.to("cuda")
    logits = with_gradient(digits.images.cuda())
    gradient = gradient_of(with_gradient, digits.images[:4].cuda(), torch.linspace(-1.0, 2.0, 3).cuda().expand(4, 3))
    assert logits.is_cuda
    assert gradient.is_cuda
    assert_same_logits(logits.cpu(), expected[0])
    assert_close(gradient.cpu(), expected[1], rtol=0, atol=1e-3 * float(expected[1].abs().max()))
    replicated = nn.DataParallel(with_gradient)
    assert_same_logits(replicated(digits.images.cuda()), logits)
    with_gradient.to("cpu")
    assert torch.equal(with_gradient(digits.images), expected[0])


def test_data_parallel(with_gradient, digits):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = digits.images.to(device)
    wrapped = nn.DataParallel(with_gradient.to(device))
    assert torch.equal(wrapped(x), with_gradient(x))


def test_works_inside_a_sequential(with_gradient, digits):
    wrapped = nn.Sequential(nn.Identity(), with_gradient)
    assert torch.equal(wrapped(digits.images), with_gradient(digits.images))


# Models by name


def test_model_names():
    assert {"abs", "binary-abs", "prototype-abs"} <= set(MODEL_NAMES)


@pytest.mark.parametrize(
    ("name", "kind", "steps"), [("abs", ABS, 50), ("binary-abs", BinaryABS, 50), ("prototype-abs", ABS, 0)]
)
def test_load_model(tmp_path, random_weights, digits, name, kind, steps):
    path = tmp_path / "three.safetensors"
    weights = random_weights(3, widths=(2, 2, 2))
    save_weights(path, weights)
    model = load_model(name, weights=path, gradient="unrolled", seed=3)
    assert type(model) is kind
    assert not model.training
    assert (model.settings.steps, model.gradient, model.seed) == (steps, "unrolled", 3)
    expected = kind(weights, steps=steps, solver="adam", seed=3)
    assert torch.equal(model(digits.images[:2]), expected(digits.images[:2]))


@pytest.mark.parametrize("name", ["", "ABS", "resnet", "abs "])
def test_load_model_of_an_unknown_name(name):
    with pytest.raises(ValueError, match="unknown model") as error:
        load_model(name)
    assert all(known in str(error.value) for known in MODEL_NAMES)


@pytest.mark.parametrize("name", bundled_weights())
def test_bundled_weights_are_those_of_their_card(name):
    card = load_card(name)
    assert card["sha256"] == sha256(bundled_weights()[name])
    figures = card["test_figures"]
    assert figures["images"] == 10_000
    assert all("abs-defense train" in part["command"] for part in card["parts"].values())


def test_a_folder_called_mnist_does_not_hide_the_bundled_weights(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ABS(prototypes=2, steps=0).weights_sha256() == ABS("mnist", prototypes=2, steps=0).weights_sha256()
    with pytest.raises(FileNotFoundError, match=r"mnist holds no ABS_\*\.net files"):
        ABS("./mnist")
