import csv
import itertools
import json

import numpy as np
import pytest
import torch
from idx import write_toy_set
from typer.testing import CliRunner

from abs_defense import ABS, certify, load_model
from abs_defense.benchmark import run_certification
from abs_defense.cli import app
from abs_defense.data import load_idx_dataset
from abs_defense.models import Calibration, Weights, load_weights, save_weights
from abs_defense.training import _prototypes as prototypes
from abs_defense.training import choose_prototypes
from abs_defense.training._prototypes import _energies, _facility_location

SMALL = {"prototypes": 64, "steps": 0}


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    """The bundled decoders with few prototypes, so that prototype-abs is quick."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    bundled = load_weights("mnist")
    latents = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(0))
    save_weights(path, Weights(bundled.decoders, bundled.calibration, latents))
    return path


def _small_model(name, weights, solver, seed):
    return ABS(seed=seed, **SMALL)


def _rows(folder):
    with (folder / "radii.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_rows_are_what_certify_gives(digits, small_weights, tmp_path):
    result = run_certification(["prototype-abs"], digits, tmp_path, weights=small_weights, progress=False)
    model = load_model("prototype-abs", weights=small_weights)
    certificate = certify(model, digits.images, digits.labels)
    radius = certificate.radius.numpy()
    np.testing.assert_array_equal(result.radii["prototype-abs"], radius[None])
    row = result.rows[0]
    assert row["clean accuracy"] == certificate.correct.double().mean()
    assert row["mean radius"] == pytest.approx(radius.mean())
    assert row["median radius"] == pytest.approx(np.median(radius))
    for threshold in (0.5, 1.0, 1.5, 2.0):
        assert row[f"certified accuracy at {threshold:g}"] == (radius > threshold).mean()
    assert row["radii are"] == "proved"
    rows = _rows(tmp_path)
    assert [float(r["radius"]) for r in rows] == radius.tolist()
    assert [int(r["rival"]) for r in rows] == certificate.rival.tolist()
    assert [int(r["label"]) for r in rows] == digits.labels.tolist()
    assert (tmp_path / "curve.png").stat().st_size > 1000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["norm"] == "l2"
    assert [machine["device"] for machine in manifest["hardware"]] == ["cpu"]


def test_a_stopped_run_continues(digits, small_weights, tmp_path, monkeypatch):
    import abs_defense.benchmark._certify as job

    monkeypatch.setattr(job, "_PIECE_PROVED", 6)
    calls = itertools.count()

    def stopped(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return certify(*args, **kwargs)

    monkeypatch.setattr("abs_defense.benchmark._measure.certify", stopped)
    settings = {"weights": small_weights, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run_certification(["prototype-abs"], digits, tmp_path, **settings)
    assert len(_rows(tmp_path)) == 12
    resumed = run_certification(["prototype-abs"], digits, tmp_path, **settings)
    assert next(calls) == 3 + 2
    whole = run_certification(["prototype-abs"], digits, tmp_path / "whole", **settings)
    np.testing.assert_array_equal(resumed.radii["prototype-abs"], whole.radii["prototype-abs"])
    assert [r["radius"] for r in _rows(tmp_path)] == [r["radius"] for r in _rows(tmp_path / "whole")]


def test_seeds_give_an_error_bar(digits, small_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("abs_defense.benchmark._suite.load_model", _small_model)
    result = run_certification(["abs"], digits, tmp_path, seeds=3, progress=False)
    radii = result.radii["abs"]
    assert radii.shape == (3, 20)
    assert result.rows[0]["mean radius +-"] == pytest.approx(radii.mean(1).std(ddof=1))
    assert result.rows[0]["mean radius +-"] > 0
    assert {r["seed"] for r in _rows(tmp_path)} == {"0", "1", "2"}
    with pytest.raises(ValueError, match="expected 1, got 2: the prototypes of 'prototype-abs' come with its weights"):
        run_certification(["prototype-abs"], digits, tmp_path, seeds=2, weights=small_weights)
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        run_certification(["abs"], digits, tmp_path, seeds=0)


@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_command(small_weights, tmp_path, norm):
    arguments = ["certify", "--weights", str(small_weights), "--images", "5", "--out", str(tmp_path), "--norm", norm]
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert outcome.exit_code == 0, outcome.output
    assert "proved" in outcome.output
    assert "mean radius" in outcome.output
    assert len(_rows(tmp_path)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm", "l3"], "'l3' is not one of l2, linf, l0"),
        (["--method", "magic"], "'magic' is not one of bisector, lipschitz, paper, exact"),
        (["--model", "resnet"], "'resnet' is not one of"),
        (["--model", "cnn"], "'cnn' is not one of abs, binary-abs, prototype-abs, certified-abs"),
    ],
)
def test_command_refuses(arguments, message):
    outcome = CliRunner().invoke(app, ["certify", *arguments], env={"COLUMNS": "200"})
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_greedy_choice_is_the_plain_greedy_one():
    generator = torch.Generator().manual_seed(3)
    energies = torch.rand(30, 40, generator=generator)
    energies[torch.arange(20), torch.arange(20)] = torch.inf
    best, plain = energies.masked_fill(energies.isinf(), 0.0).amax(0), []
    for _ in range(10):
        gains = (best - energies).clamp_min(0.0).sum(1)
        gains[plain] = -1.0
        plain.append(int(gains.argmax()))
        best = torch.minimum(best, energies[plain[-1]])
    assert _facility_location(energies, 10).tolist() == plain


@pytest.fixture
def bars(tmp_path):
    """Images of bars, and the bundled decoders of three digits."""
    data = load_idx_dataset(write_toy_set(tmp_path, per_class=24, classes=3), "train")
    bundled = load_weights("mnist").decoders
    stack = type(bundled)(
        [bundled.get_parameter(f"weight_{i}")[:3] for i in range(4)],
        [bundled.get_parameter(f"bias_{i}")[:3] for i in range(4)],
    )
    return data, Weights(stack, Calibration(100.0, 1e-5, (1.0,) * 3))


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("copies", [0, 2])
def test_chosen_prototypes_explain_better_than_random_ones(bars, tmp_path, beta, copies):
    data, weights = bars
    settings = {"samples": 50, "copies": copies, "beta": beta, "steps": 5, "progress": False}
    chosen = choose_prototypes(weights, data, 12, **settings)
    assert chosen.prototypes.shape == (3, 12, 8)
    assert torch.equal(chosen.prototypes, choose_prototypes(weights, data, 12, **settings).prototypes)
    random = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    for c, decoder in enumerate(weights.decoders.class_decoders()):
        images = data.images[data.labels == c].flatten(1)
        own, others = (_energies(decoder, images, z, beta).amin(0).mean() for z in (chosen.prototypes[c], random))
        assert own < others

    save_weights(tmp_path / "chosen.safetensors", chosen)
    model = load_model("prototype-abs", weights=tmp_path / "chosen.safetensors")
    assert torch.equal(model.prototype_latents, chosen.prototypes)
    assert model.settings.beta == beta
    descending = load_model("abs", weights=tmp_path / "chosen.safetensors")
    assert descending.prototype_latents.shape == (8000, 8)
    assert descending.settings.beta == 1.0


def test_an_image_and_its_copies_are_not_explained_by_their_own_latents(bars, monkeypatch):
    """All candidates of an image but those of its copies."""
    seen = []
    monkeypatch.setattr(prototypes, "_facility_location", lambda energies, n: seen.append(energies) or torch.arange(n))
    data, weights = bars
    choose_prototypes(weights, data, 2, samples=10, copies=2, steps=1, progress=False)
    for energies in seen:
        assert energies.shape == (3 * 24 + 10, 3 * 24)
        rows, columns = energies.isinf().nonzero().unbind(1)
        assert len(rows) == 9 * 24
        assert torch.equal(rows % 24, columns % 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 75, "samples": 50}, "count: expected at most 74 candidates a class, got 75"),
        ({"samples": -1}, "samples: expected at least 0, got -1"),
        ({"copies": -1}, "copies: expected at least 0, got -1"),
        ({"augmentation": 1.5}, "augmentation: expected a probability, got 1.5"),
        ({"beta": -1.0}, "beta: expected a finite number of at least 0, got -1.0"),
        ({"weights": "mnist"}, "expected images of 10 classes"),
    ],
)
def test_wrong_settings_of_the_choice_are_refused(bars, arguments, message):
    data, weights = bars
    if "weights" in arguments:
        weights, arguments = load_weights("mnist"), {}
    with pytest.raises(ValueError, match=message):
        choose_prototypes(weights, data, **{"count": 5, "progress": False, **arguments})


def test_each_class_has_its_own_latents(digits):
    own = torch.randn(10, 20, 8, generator=torch.Generator().manual_seed(0))
    model = ABS(prototypes=own, steps=0)
    inference = model.infer(digits.images[:4])
    for c in range(10):
        alone = ABS(prototypes=own[c], steps=0).infer(digits.images[:4])
        torch.testing.assert_close(inference.energy[:, c], alone.energy[:, c])
        torch.testing.assert_close(inference.latents[:, c], alone.latents[:, c])
    descended = ABS(prototypes=own, steps=5).infer(digits.images[:4])
    assert (descended.energy <= inference.energy + 1e-3).all()


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(5, 7), r"latents of shape \(K, 8\) or \(10, K, 8\), got \(5, 7\)"),
        (torch.zeros(3, 5, 8), r"got \(3, 5, 8\)"),
        (torch.zeros(0, 8), r"got \(0, 8\)"),
        (torch.zeros(8), r"got \(8,\)"),
        (torch.zeros(5, 8, dtype=torch.long), "expected finite floating point latents"),
        (torch.full((5, 8), torch.nan), "expected finite floating point latents"),
    ],
)
def test_wrong_latents_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        ABS(prototypes=latents, steps=0)


def test_prototypes_of_another_shape_in_a_file_are_refused(tmp_path):
    bundled = load_weights("mnist")
    save_weights(tmp_path / "w.safetensors", Weights(bundled.decoders, bundled.calibration, torch.zeros(10, 5, 7)))
    with pytest.raises(ValueError, match=r"expected prototypes of shape \(10, K, 8\), got \(10, 5, 7\)"):
        load_weights(tmp_path / "w.safetensors")
