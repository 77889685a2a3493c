"""Everything also on a device that is not the CPU: see ``second_device``. ``test_devices.py`` runs this."""

import csv

import foolbox
import pytest
import torch
from idx import write_toy_set
from second_device import AVAILABLE, second_device
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS, certify, load_model
from abs_defense.attacks import (
    DistalAttack,
    EpsilonSearchAttack,
    FiniteDifferenceModel,
    L0BisectorAttack,
    L2BisectorAttack,
    LatentDescentAttack,
    LInfBisectorAttack,
    PointwiseAttack,
)
from abs_defense.benchmark import ModelSpec, choose_measurements, run_evaluation
from abs_defense.data import load_idx_dataset
from abs_defense.models._classifier import device_of
from abs_defense.training import (
    CertifiedTraining,
    NetworkTraining,
    VAETraining,
    _vaes,
    choose_prototypes,
    class_energies,
    train_certified,
    train_network,
    train_vaes,
)

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch has no backends written in Python")


@pytest.fixture
def device():
    with second_device() as name:
        yield name


@pytest.fixture(scope="module")
def weights(random_weights):
    return random_weights(3)


@pytest.fixture(params=["abs-bfgs", "abs-adam", "binary-bfgs", "binary-adam", "prototypes"])
def make(request, weights):
    """Factory of a model of three classes."""
    kind, _, solver = request.param.partition("-")
    if kind == "prototypes":
        return lambda: ABS(weights, prototypes=24, steps=0)
    return lambda: {"abs": ABS, "binary": BinaryABS}[kind](weights, prototypes=24, steps=3, solver=solver)


def labelled(model, digits, count=2):
    x = digits.images[:count]
    return x, model(x).argmax(1)


def test_devices_do_not_mix(device):
    here = torch.ones(3)
    there = here.to(device)
    assert there.device.type == device
    with pytest.raises(RuntimeError, match="device"):
        here + there
    with pytest.raises(RuntimeError, match="device"):
        here[there.long()]
    assert there.cpu().tolist() == [1.0, 1.0, 1.0]


def test_logits_and_gradients(make, digits, device):
    outputs, slopes = [], []
    for where in ("cpu", device):
        model = make().to(where)
        x = digits.images[:2].to(where).requires_grad_()
        logits = model(x)
        logits[:, 1].sum().backward()
        assert logits.device.type == x.grad.device.type == torch.device(where).type
        outputs.append(logits.detach().cpu())
        slopes.append(x.grad.cpu())
        assert model.predict_proba(x.detach()).device == logits.device
    assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-3)
    assert_close(slopes[0], slopes[1], rtol=0, atol=1e-3 * float(slopes[0].abs().max()))


def test_unrolled_gradient(weights, digits, device):
    model = ABS(weights, prototypes=24, steps=3, gradient="unrolled")
    x = digits.images[:2]
    expected = torch.autograd.functional.jacobian(lambda z: model(z).sum(0), x)
    found = torch.autograd.functional.jacobian(lambda z: model.to(device)(z).sum(0), x.to(device))
    assert_close(found.cpu(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_there_and_back(make, digits, device):
    model = make()
    before = model(digits.images[:2])
    model.to(device)(digits.images[:2].to(device))
    assert torch.equal(model.to("cpu")(digits.images[:2]), before)


@pytest.mark.parametrize("name", ["cnn", "binary-cnn", "madry", "nearest-neighbor"])
def test_baselines(name, digits, device):
    model = load_model(name)
    expected = model(digits.images[:3])
    assert_close(model.to(device)(digits.images[:3].to(device)).cpu(), expected)


@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_bisector_certificates(make, norm, digits, device):
    model = make()
    x, y = labelled(model, digits)
    expected = certify(model, x, y, norm=norm)
    found = certify(model.to(device), x.to(device), y.to(device), norm=norm)
    assert found.radius.device.type == device
    assert_close(found.radius.cpu(), expected.radius, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["exact", "lipschitz", "paper"])
def test_other_certificates(method, weights, digits, device):
    model = ABS(weights, prototypes=24, steps=0)
    x, y = labelled(model, digits)
    expected = certify(model, x, y, method=method).radius
    assert_close(
        certify(model.to(device), x.to(device), y.to(device), method=method).radius.cpu(),
        expected,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    "attack",
    [
        L2BisectorAttack(),
        LInfBisectorAttack(),
        L0BisectorAttack(),
        LatentDescentAttack(steps=4),
        PointwiseAttack(),
        EpsilonSearchAttack(foolbox.attacks.FGSM(), [0.1, 0.5, 1.0], binary_search_steps=2),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_attacks(attack, weights, digits, device):
    model = ABS(weights, prototypes=24, steps=0)
    x, y = labelled(model, digits, 1)
    moved = model.to(device)
    wrapped = foolbox.PyTorchModel(moved, bounds=(0, 1), device=device)
    adversarial, _, success = attack(wrapped, x.to(device), y.to(device), epsilons=None)
    assert adversarial.device.type == device
    assert bool(success.all()) == bool((moved(adversarial).argmax(1).cpu() != y).all())


def test_distal_attack(weights, digits, device):
    model = ABS(weights, prototypes=24, steps=0).to(device)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    target = torch.tensor([1], device=device)
    criterion = foolbox.criteria.TargetedMisclassification(target)
    images, _, _ = DistalAttack(steps=2)(wrapped, digits.images[:1].to(device), criterion, epsilons=None)
    assert images.device.type == device


def test_estimated_gradient(weights, digits, device):
    model = ABS(weights, prototypes=24, steps=0)
    x = digits.images[:1]
    slopes = []
    for where in ("cpu", device):
        z = x.to(where).detach().requires_grad_()
        wrapped = foolbox.PyTorchModel(model.to(where), bounds=(0, 1), device=where)
        FiniteDifferenceModel(wrapped)(z)[:, 0].sum().backward()
        slopes.append(z.grad.cpu())
    assert_close(slopes[0], slopes[1], rtol=0, atol=1e-2 * float(slopes[0].abs().max()))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_idx_dataset(write_toy_set(tmp_path_factory.mktemp("toy"), per_class=6, classes=3), "train")


def test_training_of_vaes(toy, tmp_path, device, monkeypatch):
    run_epoch = _vaes._run_epoch

    def with_device(*args):  # in the threads of the training
        with second_device():
            return run_epoch(*args)

    monkeypatch.setattr(_vaes, "_run_epoch", with_device)
    recipe = VAETraining(epochs=2, batch_size=6, kl_epochs=1, decay_from=1, augment=0.0)
    found = []
    for where in ("cpu", device):
        train_vaes(toy, tmp_path / where, recipe, device=where, progress=False)
        with (tmp_path / where / "losses.csv").open() as file:
            found.append([float(row[name]) for row in csv.DictReader(file) for name in ("squared_error", "kl")])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_moving_a_model_moves_no_other(weights, toy, device):
    """Calibration makes a Binary ABS of the same weights after an ABS went to the device."""
    first = ABS(weights, prototypes=24, steps=0)
    energies = class_energies(ABS(weights, prototypes=24, steps=0).to(device), toy.images, progress=False)
    assert_close(energies, class_energies(first, toy.images, progress=False), rtol=1e-4, atol=1e-3)
    assert device_of(BinaryABS(weights, prototypes=24, steps=0)) == device_of(first) == torch.device("cpu")


def test_certified_training(weights, toy, tmp_path, device):
    recipe = CertifiedTraining(epochs=1, batch_size=9, refresh=1)
    found = []
    for where in ("cpu", device):
        start = choose_prototypes(weights, toy, 4, samples=8, copies=1, steps=2, device=where, progress=False)
        tuned = train_certified(start, toy, tmp_path / where, recipe, device=where, progress=False)
        found.append([tuned.prototypes.cpu(), *(parameter.cpu() for parameter in tuned.decoders.parameters())])
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_network_training(tmp_path, device):
    toy = load_idx_dataset(write_toy_set(tmp_path, per_class=2, classes=10), "train")
    recipe = NetworkTraining(epochs=1, batch_size=9, epsilon=0.1, adversary_steps=2)
    found = [
        train_network("madry", toy, tmp_path / where, recipe, device=where, progress=False).state_dict()
        for where in ("cpu", device)
    ]
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_evaluation(random_weights, digits, tmp_path, device):
    model = ModelSpec("abs", lambda: ABS(random_weights(), prototypes=24, steps=0), kind="prototype-abs")
    names = ("bisector-l2", "linf-bisector", "linf-transfer", "fgsm")
    found = run_evaluation(
        [model], choose_measurements("full", names), digits.head(2), tmp_path, device=device, progress=False
    )
    assert not found.errors
    assert {row["attack"] for row in found.attacks} >= set(names[1:])
