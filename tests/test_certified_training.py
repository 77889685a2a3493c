"""Fine-tuning for certified radii."""

import json
from dataclasses import replace

import pytest
import torch
from idx import write_toy_set
from typer.testing import CliRunner

from abs_defense import ABS, certify, load_model
from abs_defense.cli import app
from abs_defense.data import load_idx_dataset
from abs_defense.inference import DecoderStack
from abs_defense.models import Calibration, Weights, load_weights, save_weights
from abs_defense.training import CertifiedTraining, average_certified_abs, choose_prototypes, train_certified
from abs_defense.training import _certified as module

KINDS = ("weight", "bias")
RECIPE = CertifiedTraining(epochs=3, batch_size=24, learning_rate=1e-3, latent_learning_rate=1e-2, refresh=2)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_idx_dataset(write_toy_set(tmp_path_factory.mktemp("toy"), per_class=24, classes=3), "train")


@pytest.fixture(scope="module")
def weights(toy):
    """The bundled decoders of three digits with a few prototypes for bars."""
    bundled = load_weights("mnist").decoders
    stack = DecoderStack(
        [bundled.get_parameter(f"weight_{i}")[:3] for i in range(4)],
        [bundled.get_parameter(f"bias_{i}")[:3] for i in range(4)],
    )
    start = Weights(stack, Calibration(100.0, 1e-5, (1.0, 0.9, 1.1)))
    return choose_prototypes(start, toy, 16, samples=40, steps=5, beta=0.5, progress=False)


def test_deciding_points_and_radii_are_those_of_the_certificate(weights, digits):
    """With one anchor and without the box, up to rounding."""
    points = module._Points(weights)
    points.refresh()
    model = load_model("prototype-abs", weights=weights)
    x = digits.images[torch.tensor([3, 5, 1, 0])]
    y = model(x).argmax(1)
    decided = points.deciding(x.flatten(1), y)
    radii = points.radii(x.flatten(1), y, *decided)
    images, kl = model.prototype_images.double(), 0.5 * model.prototype_latents.double().square().sum(-1)
    offsets = weights.prototype_beta * kl
    energies = (images[None] - x.flatten(1).double()[:, None, None]).square().sum(-1) + offsets
    for i in range(len(x)):
        anchor = int(energies[i, y[i]].argmin())
        assert int(decided[0][i]) == anchor
        lengths = (images - images[y[i], anchor]).norm(dim=-1)
        plain = (energies[i] - energies[i, y[i], anchor]) / (2.0 * lengths)
        plain[y[i]] = torch.inf
        assert float(radii[i]) == pytest.approx(float(plain.min()), rel=1e-3)
    certified = certify(model, x, y).radius
    assert (certified >= radii.double() - 0.02).all()


def test_radii_of_the_training_images_grow(weights, toy, tmp_path):
    def mean_radius(w):
        return float(certify(load_model("prototype-abs", weights=w), toy.images, toy.labels).radius.mean())

    tuned = train_certified(weights, toy, tmp_path, RECIPE, progress=False)
    assert mean_radius(tuned) > mean_radius(weights) + 0.1
    assert tuned.calibration == weights.calibration
    assert not any(p.requires_grad for p in tuned.decoders.parameters())
    assert not torch.equal(tuned.prototypes, weights.prototypes)


def test_decoders_may_hold_still(weights, toy, tmp_path):
    tuned = train_certified(weights, toy, tmp_path, replace(RECIPE, learning_rate=0.0), progress=False)
    for before, after in zip(weights.decoders.parameters(), tuned.decoders.parameters(), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(tuned.prototypes, weights.prototypes)
    losses = [float(line.split(",")[1]) for line in (tmp_path / module.LOG).read_text().splitlines()[1:]]
    assert losses[-1] < losses[0]


def test_power_of_the_hinge(weights, toy, tmp_path):
    def loss(power):
        still = CertifiedTraining(epochs=1, learning_rate=1e-12, latent_learning_rate=1e-12, margin=1e3, power=power)
        train_certified(weights, toy, tmp_path / str(power), still, progress=False)
        return float((tmp_path / str(power) / module.LOG).read_text().splitlines()[1].split(",")[1])

    assert loss(2.0) == pytest.approx(loss(1.0) ** 2, rel=1e-4)


def test_training_continues_exactly(weights, toy, tmp_path, stopped_after):
    whole = train_certified(weights, toy, tmp_path / "whole", RECIPE, progress=False)

    with stopped_after(module, 2):
        train_certified(weights, toy, tmp_path / "stopped", RECIPE, progress=False)
    resumed = train_certified(weights, toy, tmp_path / "stopped", RECIPE, progress=False)
    assert torch.equal(whole.prototypes, resumed.prototypes)
    for a, b in zip(whole.decoders.parameters(), resumed.decoders.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len((tmp_path / "stopped" / "certified.csv").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="belongs to another run: margin differ"):
        train_certified(weights, toy, tmp_path / "stopped", CertifiedTraining(**{**vars(RECIPE), "margin": 1.0}))


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-1, 2), (3, -3)])
def test_shifts_move_whole_pixels(down, right):
    images = torch.zeros(1, 1, 28, 28)
    images[0, 0, 10, 12] = 1.0
    assert module._shifted(images, down, right)[0, 0, 10 + down, 12 + right] == 1.0
    assert module._shifted(images, down, right).sum() == 1.0
    assert module._shifted(torch.ones(1, 1, 28, 28), down, right).sum() == (28 - abs(down)) * (28 - abs(right))


def test_bad_input(weights, toy, tmp_path):
    with pytest.raises(ValueError, match="expected some with prototypes"):
        train_certified(Weights(weights.decoders, weights.calibration), toy, tmp_path)
    bundled = load_weights("mnist")
    ten = Weights(bundled.decoders, bundled.calibration, torch.zeros(10, 2, 8))
    with pytest.raises(ValueError, match="expected images of 10 classes, got 3"):
        train_certified(ten, toy, tmp_path)
    for settings, message in (
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"shift": 4}, "shift: expected 0 to 3 pixels, got 4"),
        ({"learning_rate": -1e-3}, "learning_rate: expected a finite number, at least 0, got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, at least 0, got nan"),
        ({"margin": 0.0}, "margin: expected a positive number"),
        ({"augment": 1.5}, "augment: expected a probability between 0 and 1, got 1.5"),
        ({"power": 0.5}, "power: expected at least 1, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            CertifiedTraining(**settings)


def test_command(weights, tmp_path):
    folder = write_toy_set(tmp_path / "data", per_class=24, classes=3)
    save_weights(tmp_path / "start.safetensors", weights)
    arguments = ["--weights", str(tmp_path / "start.safetensors"), "--data-dir", str(folder), "--epochs", "1"]
    outcome = CliRunner().invoke(
        app, ["train", "certified", *arguments, "--prototypes", "8", "--out", str(tmp_path / "out")]
    )
    assert outcome.exit_code == 0, outcome.output
    card = json.loads((tmp_path / "out" / "certified.json").read_text())
    model = load_model("certified-abs", weights=tmp_path / "out" / "certified.safetensors")
    assert isinstance(model, ABS)
    assert model.prototype_latents.shape == (3, 8, 8)
    test = load_idx_dataset(folder, "test")
    radius = certify(model, test.images, test.labels).radius
    assert card["test_figures"]["mean certified radius, L2"] == pytest.approx(float(radius.mean()), abs=1e-3)
    save_weights(tmp_path / "bare.safetensors", replace(weights, prototypes=None))
    with pytest.raises(ValueError, match="expected some of abs-defense train certified, with their prototypes"):
        load_model("certified-abs", weights=tmp_path / "bare.safetensors")


def test_average(weights, tmp_path):
    folder = write_toy_set(tmp_path / "data", per_class=24, classes=3)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    other = Weights(
        DecoderStack(*([2.0 * getattr(weights.decoders, f"{kind}_{i}").detach() for i in range(4)] for kind in KINDS)),
        Calibration(1.0, 0.0, (1.0,) * 3),
        weights.prototypes + 1.0,
        weights.prototype_beta,
    )
    for path, one in zip(files, (weights, other), strict=True):
        save_weights(path, one)
    arguments = ["train", "certified-average", *map(str, files), "--share", "0.75", "--share", "0.25"]
    outcome = CliRunner().invoke(app, [*arguments, "--data-dir", str(folder), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 0, outcome.output
    mean = load_weights(tmp_path / "out" / "certified.safetensors")
    torch.testing.assert_close(mean.decoders.weight_1, 1.25 * weights.decoders.weight_1)
    torch.testing.assert_close(mean.prototypes, weights.prototypes + 0.25, rtol=0, atol=2e-3)
    assert mean.calibration == weights.calibration
    assert mean.prototype_beta == weights.prototype_beta
    card = json.loads((tmp_path / "out" / "certified.json").read_text())
    assert card["recipe"]["shares"] == [0.75, 0.25]
    assert card["test_figures"]["mean certified radius, L2"] > 0


def test_averages_that_make_no_sense(weights, tmp_path):
    save_weights(tmp_path / "a.safetensors", weights)
    save_weights(
        tmp_path / "few.safetensors", Weights(weights.decoders, weights.calibration, weights.prototypes[:, :4])
    )
    save_weights(tmp_path / "none.safetensors", Weights(weights.decoders, weights.calibration))
    a = tmp_path / "a.safetensors"
    for other in ("few", "none"):
        with pytest.raises(ValueError, match=f"expected .*{other}.* and .*a.* to have as many proto"):
            average_certified_abs([a, tmp_path / f"{other}.safetensors"], tmp_path / "out", progress=False)
    save_weights(tmp_path / "beta.safetensors", replace(weights, prototype_beta=1.0))
    with pytest.raises(ValueError, match=r"expected prototypes of one beta, got \[0\.5, 1\.0\]"):
        average_certified_abs([a, tmp_path / "beta.safetensors"], tmp_path / "out", progress=False)
    for shares in ([1.0], [0.5, 0.4]):
        with pytest.raises(ValueError, match="shares: expected one for each of 2 weights, with sum 1, got"):
            average_certified_abs([a, a], tmp_path / "out", shares=shares, progress=False)
    with pytest.raises(ValueError, match="expected weights to average, got none"):
        average_certified_abs([], tmp_path / "out", progress=False)
