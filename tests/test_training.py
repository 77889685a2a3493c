import copy
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from idx import write_toy_set

from abs_defense import ABS, BinaryABS
from abs_defense.data import ImageSet, load_idx_dataset
from abs_defense.inference import DecoderStack
from abs_defense.models import (
    Calibration,
    Weights,
    fold_decoders,
    load_model,
    load_weights,
    save_weights,
    unfold_decoders,
)
from abs_defense.training import (
    VAETraining,
    average_abs,
    calibrate_confidence,
    calibrate_gamma,
    class_energies,
    load_vaes,
    train_abs,
    train_vaes,
)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return write_toy_set(tmp_path_factory.mktemp("toy"), per_class=32, classes=3)


@pytest.fixture(scope="module")
def toy(toy_folder):
    return load_idx_dataset(toy_folder, "train")


SHORT = VAETraining(epochs=4, batch_size=16, kl_epochs=2, decay_from=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, train_vaes(toy, out, SHORT, progress=False)


def _states(vaes):
    return [{k: v.clone() for k, v in vae.state_dict().items()} for vae in vaes]


def _assert_equal(left, right):
    for a, b in zip(_states(left), _states(right), strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_kl_weight_falls_from_10_to_1():
    config = VAETraining()
    weights = [config.kl_weight(epoch) for epoch in range(config.epochs)]
    assert weights[0] == 10.0
    assert weights[25] == pytest.approx(5.5)
    assert weights[50:] == [1.0] * 50
    assert all(a >= b for a, b in itertools.pairwise(weights))


def test_learning_rate_stays_then_decays():
    config = VAETraining()
    rates = [config.rate(epoch) for epoch in range(config.epochs)]
    assert rates[:50] == [3e-3] * 50
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
    assert 0 < rates[-1] < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"latent_dim": 0},
        {"checkpoint_every": 0},
        {"augment": 1.5},
    ],
)
def test_recipe_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        VAETraining(**wrong)


def test_training_learns(toy, tmp_path):
    train_vaes(toy, tmp_path, VAETraining(epochs=12, batch_size=16, kl_epochs=4, augment=0.0), progress=False)
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 3
    first = np.mean([float(r["squared_error"]) for r in rows if r["epoch"] == "0"])
    last = np.mean([float(r["squared_error"]) for r in rows if r["epoch"] == "11"])
    assert last < 0.5 * first


def test_same_seed_same_weights_other_seed_others(toy, finished, tmp_path):
    _, vaes = finished
    _assert_equal(vaes, train_vaes(toy, tmp_path / "again", SHORT, progress=False))
    other = train_vaes(toy, tmp_path / "other", VAETraining(**{**SHORT.__dict__, "seed": 1}), progress=False)
    assert not torch.equal(
        other[0].state_dict()["decoder.conv_0.weight"], vaes[0].state_dict()["decoder.conv_0.weight"]
    )


def test_continues_exactly_after_an_interruption(toy, finished, tmp_path):
    class Stop(Exception):  # noqa: N818
        pass

    def stop(done):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        train_vaes(toy, tmp_path, SHORT, progress=False, after_epoch=stop)
    resumed = train_vaes(toy, tmp_path, SHORT, progress=False)
    out, vaes = finished
    _assert_equal(vaes, resumed)

    def log(folder):
        with (folder / "losses.csv").open() as file:
            return [(r["epoch"], r["class"], r["squared_error"], r["kl"]) for r in csv.DictReader(file)]

    assert log(tmp_path) == log(out)


_KILLED = """
import sys
from abs_defense.data import load_idx_dataset
from abs_defense.training import VAETraining, train_vaes
train_vaes(load_idx_dataset(sys.argv[1], "train"), sys.argv[2],
    VAETraining(epochs=40, batch_size=16, kl_epochs=2, decay_from=2, checkpoint_every=1), progress=False)
"""


def test_sigkill_leaves_a_valid_checkpoint(toy_folder, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(toy_folder), str(tmp_path)])
    try:
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None, "training ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epochs_done"] >= 1
    epochs = state["epochs_done"] + 1
    recipe = VAETraining(epochs=40, batch_size=16, kl_epochs=2, decay_from=2, checkpoint_every=1)
    done = []

    class Stop(Exception):  # noqa: N818
        pass

    def stop(count):
        done.append(count)
        raise Stop

    with pytest.raises(Stop):
        train_vaes(load_idx_dataset(toy_folder, "train"), tmp_path, recipe, progress=False, after_epoch=stop)
    assert done == [epochs]


def test_result_does_not_depend_on_the_workers(toy, finished, tmp_path):
    threads = torch.get_num_threads()
    _assert_equal(finished[1], train_vaes(toy, tmp_path, SHORT, workers=3, progress=False))
    assert torch.get_num_threads() == threads


def test_starts_from_earlier_vaes(toy, finished, tmp_path):
    short = VAETraining(epochs=1, batch_size=16, kl_epochs=0, learning_rate=1e-9, augment=0.0)
    tuned = train_vaes(toy, tmp_path, short, init=finished[1], progress=False)
    for before, after in zip(_states(finished[1]), _states(tuned), strict=True):
        torch.testing.assert_close(before["decoder.conv_1.weight"], after["decoder.conv_1.weight"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="belongs to another run: init differ"):
        train_vaes(toy, tmp_path, short, progress=False)
    with pytest.raises(ValueError, match="init: expected 3 VAEs, one a class, got 2"):
        train_vaes(toy, tmp_path / "two", short, init=finished[1][:2], progress=False)


def test_checkpoint_of_another_recipe_is_refused(toy, finished, tmp_path):
    out, _ = finished
    (tmp_path / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match=r"belongs to another run: learning_rate differ"):
        train_vaes(toy, tmp_path, VAETraining(**{**SHORT.__dict__, "learning_rate": 1e-3}), progress=False)


def test_damaged_checkpoint_is_refused(toy, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged checkpoint"):
        train_vaes(toy, tmp_path, SHORT, progress=False)


def test_vaes_that_are_not_there_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no VAEs at"):
        load_vaes(tmp_path / "vaes.safetensors")
    (tmp_path / "vaes.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"expected the vaes\.safetensors of a training"):
        load_vaes(tmp_path / "vaes.safetensors")
    safetensors.torch.save_file({"other": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"expected the vaes\.safetensors of a training"):
        load_vaes(tmp_path / "weights.safetensors")


def test_class_without_images_is_refused(toy, tmp_path):
    gap = ImageSet(toy.images, toy.labels * 2, "gap")
    with pytest.raises(ValueError, match=r"class 1 has 0 images"):
        train_vaes(gap, tmp_path, SHORT, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(toy, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write to the output folder"):
        train_vaes(toy, tmp_path / "out", SHORT, progress=False)


def test_output_path_that_is_a_file(toy, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="cannot write to the output folder"):
        train_vaes(toy, tmp_path / "out", SHORT, progress=False)


def test_whole_training_of_three_classes(toy, toy_folder, tmp_path, monkeypatch):
    test_set = load_idx_dataset(toy_folder, "test")
    config = VAETraining(epochs=30, batch_size=16, kl_epochs=10, decay_from=20, augment=0.0, checkpoint_every=10)
    card = train_abs(
        toy, tmp_path, config, test=test_set, calibration_images=48, prototypes=20, command="c", progress=False
    )
    assert card == json.loads((tmp_path / "abs.json").read_text())
    weights = load_weights(tmp_path / "abs.safetensors")
    assert weights.decoders.num_classes == 3
    assert card["test_figures"]["abs"]["accuracy"] == 1.0
    vaes = load_vaes(tmp_path / "vaes.safetensors")
    for name, value in fold_decoders([vae.decoder for vae in vaes]).state_dict().items():
        assert torch.equal(value, weights.decoders.state_dict()[name])
    for cls in (ABS, BinaryABS):
        model = cls(tmp_path / "abs.safetensors", prototypes=500, steps=5)
        assert (model(test_set.images).argmax(1) == test_set.labels).all()

    def never(*args, **kwargs):
        raise AssertionError("a finished stage was computed again")

    monkeypatch.setattr("abs_defense.training._run.calibrate", never)
    monkeypatch.setattr("abs_defense.training._run._test_figures", never)
    assert (
        train_abs(
            toy, tmp_path, config, test=test_set, calibration_images=48, prototypes=20, command="c", progress=False
        )
        == card
    )


@pytest.fixture
def three_weights(finished, tmp_path):
    trained, paths = fold_decoders([vae.decoder for vae in finished[1]]), []
    for seed in range(3):
        generator, stack = torch.Generator().manual_seed(seed), copy.deepcopy(trained)
        for value in stack.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_weights(paths[-1], Weights(stack, Calibration(1.0, 0.0, (1.0,) * 3)))
    return paths


def test_average_of_weights(toy, toy_folder, three_weights, tmp_path, monkeypatch):
    settings = {
        "test": load_idx_dataset(toy_folder, "test"),
        "calibration_images": 48,
        "prototypes": 20,
        "command": "c",
        "progress": False,
    }
    calibration = Calibration(100.0, 1e-5, (1.0, 0.9, 1.1))
    monkeypatch.setattr("abs_defense.training._run.calibrate", lambda *args, **kwargs: calibration)
    card = average_abs(three_weights, toy, tmp_path / "out", **settings)
    assert card == json.loads((tmp_path / "out" / "abs.json").read_text())
    mean = load_weights(tmp_path / "out" / "abs.safetensors")
    assert mean.prototypes.shape == (3, 20, 8)
    assert mean.calibration == calibration
    parts = [load_weights(path).decoders.state_dict() for path in three_weights]
    for name, value in mean.decoders.state_dict().items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name] + parts[2][name]) / 3)
    prediction = load_model("abs", weights=mean)(settings["test"].images).argmax(1)
    assert card["test_figures"]["abs"]["accuracy"] == (prediction == settings["test"].labels).double().mean()
    assert len(card["recipe"]["mean of"]) == 3

    monkeypatch.setattr("abs_defense.training._run.calibrate", None)
    monkeypatch.setattr("abs_defense.training._run._test_figures", None)
    assert average_abs(three_weights, toy, tmp_path / "out", **settings) == card


def test_only_weights_of_the_same_shape_have_an_average(toy, three_weights, random_weights, tmp_path):
    save_weights(tmp_path / "four.safetensors", random_weights(4))
    with pytest.raises(ValueError, match=r"four\.safetensors and .*0\.safetensors have other classes"):
        average_abs([*three_weights, tmp_path / "four.safetensors"], toy, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="expected weights to average, got none"):
        average_abs([], toy, tmp_path / "out", progress=False)


def test_test_set_with_more_classes_is_refused(toy, tmp_path):
    other = ImageSet(toy.images, toy.labels + 3, "other")
    with pytest.raises(ValueError, match="the test images have 6 classes, the training images 3"):
        train_abs(toy, tmp_path, SHORT, test=other, progress=False)


def _synthetic_energies(count=4000, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    energies = 60 + 10 * torch.randn(count, classes, generator=generator)
    energies[torch.arange(count), labels] = 20 + 6 * torch.randn(count, generator=generator)
    return energies, labels


def test_calibrated_median_confidence_is_090():
    energies, labels = _synthetic_energies()
    alpha, eta = calibrate_confidence(energies, labels)
    likelihood = (-alpha * energies.double() / 784).exp() + eta
    confidence = (likelihood / likelihood.sum(1, keepdim=True)).max(1).values
    assert float(confidence.median()) == pytest.approx(0.9, abs=0.01)


def test_calibration_of_a_hopeless_model_says_so():
    with pytest.raises(ValueError, match=r"no alpha from 10 to 10000 .* on 10 images"):
        calibrate_confidence(torch.full((10, 3), 1e6), torch.zeros(10, dtype=torch.long))


def test_gamma_undoes_a_known_bias():
    energies, labels = _synthetic_energies()
    energies = energies.clamp_min(1.0)
    biased = energies.clone()
    margin = 25.0 / 22.0  # class 2 looks worse than it is, so some of its images go elsewhere
    biased[:, 2] *= margin
    biased[labels == 2, 2] += 25
    gamma = torch.tensor(calibrate_gamma(biased, labels))
    before = (biased.argmin(1) == labels).double().mean()
    after = ((biased * gamma).argmin(1) == labels).double().mean()
    assert gamma[0] == 1.0
    assert gamma[2] < 0.97
    assert after > before


def test_class_energies_are_those_of_inference(toy):
    model = ABS(weights=None, prototypes=16, steps=2)
    energies = class_energies(model, toy.images[:5], progress=False, batch_size=2)
    torch.testing.assert_close(energies, model.infer(toy.images[:5]).energy, rtol=1e-5, atol=1e-4)
    assert class_energies(model, toy.images[:0], progress=False).shape == (0, 10)


def test_unfolded_decoders_decode_and_train_as_the_folded_ones():
    stack = load_weights("mnist").decoders
    latents = torch.randn(10, 64, 8, generator=torch.Generator().manual_seed(1))
    expected = stack(latents)
    for c, decoder in enumerate(unfold_decoders(stack)):
        torch.testing.assert_close(decoder(latents[c][:, :, None, None]), expected[c], rtol=1e-4, atol=1e-5)
        in_training = decoder.train()(latents[c][:, :, None, None])
        assert (in_training - expected[c]).square().sum((1, 2, 3)).mean() < 0.1 * expected[c].square().sum(
            (1, 2, 3)
        ).mean()


def test_training_starts_from_bundled_decoders(toy, tmp_path):
    stack = load_weights("mnist").decoders
    three = DecoderStack(
        [stack.get_parameter(f"weight_{i}")[:3] for i in range(4)],
        [stack.get_parameter(f"bias_{i}")[:3] for i in range(4)],
    )
    save_weights(tmp_path / "three.safetensors", Weights(three, Calibration(1.0, 0.0, (1.0,) * 3)))
    start = load_vaes(tmp_path / "three.safetensors")
    config = VAETraining(epochs=1, encoder_epochs=1, kl_epochs=0, augment=0.0)
    trained = train_vaes(toy, tmp_path / "out", config, init=start, progress=False)
    for before, after in zip(start, trained, strict=True):
        for name, value in after.decoder.state_dict().items():
            torch.testing.assert_close(value, before.decoder.state_dict()[name], rtol=0, atol=0, msg=name)
        assert not torch.equal(before.encoder.conv_0.weight, after.encoder.conv_0.weight)
