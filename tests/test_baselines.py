"""The paper's baselines: architecture, contract, training, files."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from idx import write_toy_set
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from abs_defense import ABS, load_model
from abs_defense.cli import app
from abs_defense.data import load_idx_dataset
from abs_defense.models import (
    BASELINE_NAMES,
    NETWORKS,
    NearestNeighbor,
    bundled_baselines,
    compress_images,
    load_baseline,
    load_card,
    save_baseline,
    untrained_network,
)
from abs_defense.models._weights import sha256
from abs_defense.training import NetworkTraining, accuracy, robust_accuracy, train_baseline, train_network
from abs_defense.training import _baselines as module

BUNDLED = sorted(bundled_baselines())


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Ten classes of a few images."""
    return load_idx_dataset(write_toy_set(tmp_path_factory.mktemp("toy"), per_class=24, classes=10), "train")


@pytest.fixture(scope="module")
def models(toy):
    networks = {name: untrained_network(name) for name in NETWORKS}
    return {**networks, "nearest-neighbor": NearestNeighbor(toy.images, toy.labels)}


def test_architectures_are_the_papers(models):
    def shapes(name):
        return [tuple(p.shape) for key, p in models[name].named_parameters() if "weight" in key and p.ndim > 1]

    cnn = [(20, 1, 5, 5), (70, 20, 4, 4), (256, 70, 3, 3), (10, 256, 5, 5)]
    assert shapes("cnn") == shapes("binary-cnn") == cnn
    assert shapes("madry") == [(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)]


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_contract(models, name, digits):
    model, images = models[name], digits.images
    logits = model(images)
    assert logits.shape == (20, 10)
    assert logits.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(images.double()), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([model(x[None]) for x in images]), logits, rtol=1e-4, atol=1e-4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images), logits)
    assert model(images[:0]).shape == (0, 10)
    probabilities = model.predict_proba(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
    with pytest.raises(ValueError, match=r"expected shape \(N, 1, 28, 28\)"):
        model(images[:, 0])
    live = images[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(live)[:, 1].sum(), live)
    assert gradient.abs().flatten(1).sum(1).min() > 0


def test_binary_cnn_sees_binary_images(models, digits):
    model, images = models["binary-cnn"], digits.images
    assert torch.equal(model(images), model((images > 0.5).float()))
    live = (images > 0.5).float().requires_grad_()
    cnn = untrained_network("cnn")
    cnn.load_state_dict(model.state_dict())
    plain = torch.autograd.grad(cnn(live)[:, 2].sum(), live)[0]
    through = torch.autograd.grad(model(live)[:, 2].sum(), live)[0]
    torch.testing.assert_close(through, plain)


def test_nearest_neighbor_is_the_nearest(toy, digits):
    order = torch.randperm(len(toy), generator=torch.Generator().manual_seed(0))
    model = NearestNeighbor(toy.images[order], toy.labels[order])
    reference = KNeighborsClassifier(1).fit(toy.images.flatten(1).numpy(), toy.labels.numpy())
    queries = digits.images.flatten(1)
    np.testing.assert_array_equal(model(digits.images).argmax(1), reference.predict(queries.numpy()))
    distances = torch.stack(
        [torch.cdist(queries.double(), toy.images.flatten(1)[toy.labels == c].double()).amin(1) for c in range(10)], 1
    )
    torch.testing.assert_close(model(digits.images).double(), -distances, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 784), torch.tensor([0, 2, 2]), r"at least one image of each class, got \[1, 0, 2\]"),
        (torch.zeros(3, 783), torch.tensor([0, 1, 2]), r"got \(3, 783\)"),
        (torch.zeros(3, 784), torch.tensor([0, 1]), r"and \(2,\)"),
        (torch.zeros(0, 784), torch.zeros(0, dtype=torch.long), r"got \(0, 784\)"),
    ],
)
def test_wrong_neighbors_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        NearestNeighbor(images, labels)


def test_compressed_images(toy, tmp_path, digits):
    rank = int(torch.linalg.matrix_rank(toy.images.flatten(1) - toy.images.flatten(1).mean(0)))
    save_baseline(
        tmp_path / "nn.safetensors", "nearest-neighbor", compress_images(toy.images, toy.labels, min(rank, 60))
    )
    model = load_model("nearest-neighbor", weights=tmp_path / "nn.safetensors")
    assert model.images.shape == (240, 784)
    exact = NearestNeighbor(toy.images, toy.labels)
    torch.testing.assert_close(model(digits.images), exact(digits.images), rtol=0.02, atol=0.05)
    with pytest.raises(ValueError, match="components: expected 1 to 240, got 241"):
        train_baseline("nearest-neighbor", toy, tmp_path, components=241)


@pytest.mark.parametrize("name", BASELINE_NAMES)
def test_files(models, toy, name, tmp_path, digits):
    path = tmp_path / "w.safetensors"
    nearest = name == "nearest-neighbor"
    tensors = compress_images(toy.images, toy.labels, 60) if nearest else models[name].state_dict()
    save_baseline(path, name, tensors)
    loaded = load_model(name, weights=path)
    assert type(loaded) is type(models[name])
    torch.testing.assert_close(loaded(digits.images), models[name](digits.images), rtol=0.02, atol=0.05)
    other = next(n for n in BASELINE_NAMES if n != name)
    with pytest.raises(ValueError, match=f"expected weights of '{other}'"):
        load_model(other, weights=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged, truncated"):
        load_model(name, weights=path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_model(name, weights=tmp_path / "nowhere")


def test_nearest_neighbor_from_a_folder_of_images(tmp_path, toy):
    write_toy_set(tmp_path, per_class=24, classes=10)
    model = load_model("nearest-neighbor", weights=tmp_path)
    assert len(model.images) == len(toy)
    assert accuracy(model, toy) == 1.0


def test_weights_of_abs_are_refused(random_weights):
    with pytest.raises(ValueError, match="expected a file for 'cnn', got weights of ABS"):
        load_model("cnn", weights=random_weights(0))


@pytest.mark.parametrize("name", ["cnn", "madry"])
def test_training_continues_exactly(toy, tmp_path, name, stopped_after):
    recipe = NetworkTraining(epochs=3, batch_size=60, epsilon=0.3 if name == "madry" else 0.0, adversary_steps=2)
    whole = train_network(name, toy, tmp_path / "whole", recipe, progress=False)

    with stopped_after(module, 2):
        train_network(name, toy, tmp_path / "stopped", recipe, progress=False)
    resumed = train_network(name, toy, tmp_path / "stopped", recipe, progress=False)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="belongs to another run: epochs, seed differ"):
        train_network(name, toy, tmp_path / "stopped", replace(recipe, epochs=4, seed=1), progress=False)


def test_the_adversary_of_training_is_in_its_ball(toy):
    recipe = NetworkTraining(epochs=1, batch_size=60, epsilon=0.2, adversary_steps=3)
    model = untrained_network("madry")
    x, y = toy.images[:20], toy.labels[:20]
    with torch.random.fork_rng(devices=[]):
        perturbed = module._worst_case(model, x, y, recipe)
    assert (perturbed - x).abs().max() <= 0.2 + 1e-6
    assert perturbed.min() >= 0.0
    assert perturbed.max() <= 1.0
    loss = torch.nn.functional.cross_entropy
    assert loss(model(perturbed), y) > loss(model(x), y)
    assert not perturbed.requires_grad


def test_training_and_card(toy, tmp_path):
    recipe = NetworkTraining(epochs=4, batch_size=60, epsilon=0.1, adversary_steps=2)
    card = train_baseline("madry", toy, tmp_path, recipe, test=toy, command="the command", progress=False)
    assert json.loads((tmp_path / "madry.json").read_text()) == card
    assert card["sha256"] == sha256(tmp_path / "madry.safetensors")
    assert card["command"] == "the command"
    model = load_baseline("madry", tmp_path / "madry.safetensors")
    assert card["test_figures"]["accuracy"] == accuracy(model, toy)
    assert card["test_figures"]["robust accuracy"] == robust_accuracy(model, toy, 0.1, progress=False)
    assert card["test_figures"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"epsilon": 1.5}, r"epsilon: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_recipes_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkTraining(**settings)


@pytest.mark.parametrize("name", ["cnn", "nearest-neighbor"])
def test_command(tmp_path, name):
    folder = write_toy_set(tmp_path / "data", per_class=24, classes=10)
    extra = ["--components", "5"] if name == "nearest-neighbor" else ["--epochs", "1"]
    arguments = ["train", name, "--data-dir", str(folder), "--out", str(tmp_path / "out"), *extra]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    card = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert card["test_figures"]["images"] > 0
    assert load_model(name, weights=tmp_path / "out" / f"{name}.safetensors").num_classes == 10


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_baselines_are_what_their_cards_say(name, shared_data):
    card = load_card(name)
    assert card["sha256"] == sha256(bundled_baselines()[name])
    test = load_idx_dataset(shared_data / "mnist", "test")
    assert accuracy(load_model(name), test) == pytest.approx(card["test_figures"]["accuracy"], abs=2e-4)


@pytest.mark.parametrize(
    ("name", "published"), [("cnn", 0.991), ("binary-cnn", 0.985), ("nearest-neighbor", 0.969), ("madry", 0.988)]
)
def test_bundled_baselines_are_as_accurate_as_published(name, published):
    if name not in BUNDLED:
        pytest.skip(f"no weights of {name} are bundled yet")
    assert load_card(name)["test_figures"]["accuracy"] >= published


def test_pixels_are_binarised_before_they_are_rounded(digits):
    model = load_model("binary-cnn").bfloat16()
    above = digits.images.where(digits.images <= 0.5, 0.501)  # 0.5 in bfloat16
    assert torch.equal(model(above), model((digits.images > 0.5).float()))


@pytest.mark.parametrize("name", ["cnn", "binary-cnn", "madry"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_in_other_precisions(name, dtype, digits):
    model = load_model(name)
    expected = model(digits.images)
    logits = model.to(dtype)(digits.images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.5 if dtype == torch.bfloat16 else 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert load_model(name)(digits.images[:2]).dtype == torch.float32


def test_random_weights_leave_the_generators_of_gpus_alone(monkeypatch):
    """``torch.manual_seed`` would seed them, and ``fork_rng(devices=[])`` would not put them back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    load_model("cnn")
    ABS(weights=None, prototypes=2, steps=0)
    untrained_network("madry")
    assert not seeded
