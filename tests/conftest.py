"""Fixtures of the whole suite, and a guard on the global state of torch, numpy and random."""

import contextlib
import os
import random
from pathlib import Path

import art.attacks.evasion  # noqa: F401 - its import draws from random
import numpy as np
import pytest
import torch
from hypothesis import settings

from abs_defense import ABS, BinaryABS
from abs_defense.data import foolbox_digits
from abs_defense.inference import DecoderStack
from abs_defense.models import Calibration, Weights

KERNELS = (4, 5, 5, 4)

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker; several on the same cores slow each other down many times over.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples in each run, and no time limit: the machine may be busy.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "touches_random_state: the test runs third-party code that draws from the global random generators",
    )


def _random_state():
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": (kind, keys.tobytes(), position, has_gauss, gauss),
        "the state of random": random.getstate(),
    }


@pytest.fixture(autouse=True)
def global_state_guard(request):
    """Fail any test that changes a global random state or the default dtype."""
    before, dtype = _random_state(), torch.get_default_dtype()
    yield
    dtype_after = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    after = _random_state()
    allowed = request.node.get_closest_marker("touches_random_state") is not None
    changed = [] if allowed else [name for name in before if before[name] != after[name]]
    if dtype_after != dtype:
        changed.append("torch's default dtype")
    if changed:
        pytest.fail(f"the test changed {', '.join(changed)}")


@pytest.fixture(scope="session")
def shared_data():
    """The folder with MNIST and the authors' release: ../shared/data, or where ABS_DEFENSE_SHARED points."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ABS_DEFENSE_SHARED", default))
    if not folder.is_dir():
        reason = f"no shared data at {folder}: set ABS_DEFENSE_SHARED to the folder with mnist/ and schott2018/"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def digits():
    """The 20 MNIST digits that foolbox ships."""
    return foolbox_digits()


@pytest.fixture(scope="session")
def random_images():
    """Factory of images without structure, strictly inside (0, 1) so that they can be varied in each direction."""

    def make(count, *, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return 0.05 + 0.9 * torch.rand(count, 1, 28, 28, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(scope="session")
def random_stack():
    """Factory of random decoders whose images use the whole range (0, 1), unlike those of freshly initialised ones."""

    def make(classes=3, latent_dim=8, *, widths=(8, 6, 5), dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        features = (latent_dim, *widths, 1)
        # Pixels of a layer receive about kernel^2 / stride^2 taps from each input channel.
        taps = (1.0, 25 / 4, 25 / 4, 16.0)
        weights, biases = [], []
        for i, kernel in enumerate(KERNELS):
            inputs, outputs = features[i], features[i + 1]
            shape = (classes, inputs, outputs, kernel, kernel)
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights.append((weight * (1.6 / (taps[i] * inputs) ** 0.5)).to(dtype))
            biases.append((0.3 * torch.randn(classes, outputs, generator=generator, dtype=torch.float64)).to(dtype))
        return DecoderStack(weights, biases)

    return make


@pytest.fixture(scope="session")
def random_weights(random_stack):
    """Factory of ``Weights`` around ``random_stack``; every gamma differs from 1."""

    def make(classes=10, **kwargs):
        gamma = tuple(0.9 + 0.02 * c for c in range(classes))
        return Weights(random_stack(classes, **{"dtype": torch.float32, **kwargs}), Calibration(440.0, 3.9e-5, gamma))

    return make


@pytest.fixture(scope="session")
def tiny_abs():
    """ABS with the paper's architecture and random weights. Shared by all tests: do not change it."""
    return ABS(weights=None, prototypes=64, steps=5)


@pytest.fixture(scope="session")
def tiny_binary():
    """Binary ABS with the paper's architecture and random weights. Shared by all tests: do not change it."""
    return BinaryABS(weights=None, prototypes=64, steps=5, solver="adam")


@pytest.fixture(scope="session")
def small_abs(random_weights):
    """ABS with narrow decoders of 10 clearly different classes. Shared by all tests: do not change it."""
    return ABS(random_weights(), prototypes=64, steps=5, solver="adam")


@pytest.fixture(scope="session")
def small_binary(random_weights):
    """Binary ABS with narrow decoders of 10 clearly different classes. Shared by all tests: do not change it."""
    return BinaryABS(random_weights(), prototypes=64, steps=5, solver="adam")


@pytest.fixture(scope="session")
def bfgs_abs(random_weights):
    """``small_abs`` with the faster solver. Shared by all tests: do not change it."""
    return ABS(random_weights(), prototypes=64, steps=20, solver="bfgs")


@pytest.fixture(scope="session")
def bfgs_binary(random_weights):
    """``small_binary`` with the faster solver. Shared by all tests: do not change it."""
    return BinaryABS(random_weights(), prototypes=64, steps=20, solver="bfgs")


@pytest.fixture(scope="session")
def own_images(small_abs):
    """Factory of images that ``small_abs`` decodes from likely latents, with their classes in turn.

    They are its prototypes of least norm, so that it recognises them surely.
    """

    def make(count):
        likely = small_abs.prototype_latents.norm(dim=1).argsort()
        classes = torch.arange(count) % small_abs.num_classes
        images = small_abs.prototype_images[classes, likely[torch.arange(count) // small_abs.num_classes]]
        return images.view(count, 1, 28, 28).clone(), classes

    return make


class StopError(Exception):
    """What ``stopped_after`` raises."""


@pytest.fixture
def stopped_after(monkeypatch):
    """Factory of contexts in which a training module stops after so many checkpointed epochs."""

    @contextlib.contextmanager
    def make(module, epochs):
        save = module.save_checkpoint

        def stop(folder, identity, state):
            save(folder, identity, state)
            if state["epochs_done"] == epochs:
                raise StopError

        with monkeypatch.context() as patch:
            patch.setattr(module, "save_checkpoint", stop)
            with pytest.raises(StopError):
                yield

    return make
