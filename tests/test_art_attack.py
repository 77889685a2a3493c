"""ART's attacks on foolbox models: known optimum, contract, seeds."""

import eagerpy as ep
import foolbox as fb
import numpy as np
import pytest
import torch
from linear import Linear

from abs_defense import ABS
from abs_defense.attacks import ARTAttack, EpsilonSearchAttack, QueryCounter

APGD = "AutoProjectedGradientDescent"


@pytest.fixture(scope="module")
def linear():
    return Linear().eval()


@pytest.fixture
def inputs():
    """Grey, so that no bound is in the way."""
    return 0.5 + 0.05 * torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)


def nearest(linear, inputs, p):
    """Distance to the nearest other class of the linear model, by its formula, and that class."""
    logits, weight = linear(inputs).detach(), linear.weight.detach()
    labels = logits.argmax(1)
    margins = logits.gather(1, labels[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[:, labels, None] - weight[:, None, :], ord=2 if p == "l2" else 1, dim=0)
    distances = (margins / slopes).scatter(1, labels[:, None], torch.inf)
    return labels, *distances.min(1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("loss", "slack"), [("cross_entropy", 1.3), ("difference_logits_ratio", 1.05)])
def test_succeeds_just_outside_the_known_distance_and_never_inside(linear, inputs, norm, loss, slack):
    """Cross entropy leads away from its class, not to the nearest other one."""
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    labels, distances, _ = nearest(linear, inputs, norm)
    attack = ARTAttack(APGD, norm, loss_type=loss, max_iter=60, nb_random_init=1, seed=0)
    for i in range(len(inputs)):
        outer, inner = slack * float(distances[i]), 0.98 * float(distances[i])
        raw, clipped, success = attack(model, inputs[[i]], labels[[i]], epsilons=[inner, outer])
        assert success[:, 0].tolist() == [False, True]
        assert float(attack.distance(inputs[[i]], clipped[1])) <= outer + 1e-6
        assert raw[1].dtype == inputs.dtype


def test_minimal_through_the_search_over_epsilons(linear, inputs):
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    labels, distances, _ = nearest(linear, inputs, "l2")
    counter = QueryCounter(model, len(inputs))
    attack = EpsilonSearchAttack(
        ARTAttack(APGD, "l2", loss_type="difference_logits_ratio", max_iter=40, nb_random_init=1, seed=0),
        (0.05, 0.2, 0.8),
    )
    raw, _, success = attack(counter, inputs, labels, epsilons=None)
    assert success.all()
    found = (raw - inputs).flatten(1).norm(dim=1)
    assert bool((found >= 0.999 * distances).all())
    assert bool((found <= 1.5 * distances).all())
    assert torch.equal(linear(torch.lerp(inputs, raw, 0.99)).argmax(1), labels)
    assert counter.queries.min() > 0
    assert counter.gradients.min() > 0


def test_targets(linear, inputs):
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    labels, _, rivals = nearest(linear, inputs, "l2")
    targets = torch.where(rivals == 3, 4, 3)
    targets = torch.where(targets == labels, (labels + 1) % 10, targets)
    attack = ARTAttack(APGD, "l2", loss_type="cross_entropy", max_iter=40, nb_random_init=1, seed=0)
    raw, _, success = attack(model, inputs, fb.criteria.TargetedMisclassification(targets), epsilons=8.0)
    assert success.all()
    assert torch.equal(linear(raw).argmax(1), targets)
    square = ARTAttack("SquareAttack", "l2", max_iter=3)
    with pytest.raises(ValueError, match="SquareAttack has no targeted form"):
        square(model, inputs, fb.criteria.TargetedMisclassification(targets), epsilons=8.0)


def test_square_needs_no_gradients_and_its_seed_decides(random_weights):
    model = fb.PyTorchModel(
        ABS(random_weights(3), prototypes=50, steps=0, gradient="none"), bounds=(0, 1), device="cpu"
    )
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(1)
    numpy_state = np.random.get_state()  # noqa: NPY002
    runs = [
        ARTAttack("SquareAttack", "linf", max_iter=5, seed=seed)(model, images, labels, epsilons=0.2)[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, after, strict=True))


def test_without_a_seed_torchs_generator_decides(linear, inputs):
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    attack = ARTAttack("SquareAttack", "linf", max_iter=3)
    labels, runs = linear(inputs).argmax(1), []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            runs += [attack(model, inputs, labels, epsilons=1e-3)[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


def test_other_bounds_eagerpy_and_empty_batches(linear, inputs):
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu").transform_bounds((-1, 1))
    attack = ARTAttack(APGD, "linf", loss_type="cross_entropy", max_iter=20, nb_random_init=1, seed=0)
    labels, distances, _ = nearest(linear, inputs, "linf")
    raw, _, success = attack(
        model, ep.astensor(2 * inputs - 1), ep.astensor(labels), epsilons=2.6 * float(distances.max())
    )
    assert success.all()
    assert isinstance(raw, ep.PyTorchTensor)
    assert attack.run(model, inputs[:0], fb.criteria.Misclassification(labels[:0]), epsilon=1.0).shape == (0, 1, 28, 28)


def test_contract_of_our_attacks(linear, inputs):
    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    attack = ARTAttack(APGD, "l2", loss_type="cross_entropy", max_iter=2, nb_random_init=1, seed=0)
    labels = linear(inputs).argmax(1)
    raw, clipped, success = attack(model, inputs, labels.numpy(), epsilons=[0.0, 20.0])
    assert torch.equal(clipped[0], inputs)
    assert success.shape == (2, 4)
    assert not success[0].any()
    assert success[1].all()
    raw, _, success = attack(model, inputs[:0], labels[:0], epsilons=1.0)
    assert (len(raw), len(success)) == (0, 0)
    with pytest.raises(ValueError, match="inputs: expected values in the model's bounds"):
        attack(model, inputs + 1, labels, epsilons=1.0)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("NoSuchAttack",), {}, "expected the name of an attack in art.attacks.evasion, got 'NoSuchAttack'"),
        (("DeepFool",), {}, "expected one with norm and eps, got 'DeepFool'"),
        ((APGD, "l1"), {}, "norm: expected l2 or linf, got 'l1'"),
        ((APGD, "l2"), {"eps": 1.0}, "eps comes from norm, epsilon and criterion"),
        ((APGD, "l2"), {"iterations": 3}, "got iterations"),
    ],
)
def test_wrong_settings(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        ARTAttack(*arguments, **settings)


def test_other_criteria_are_refused(linear, inputs):
    class Never(fb.criteria.Criterion):
        def __repr__(self):
            return "Never()"

        def __call__(self, perturbed, outputs):
            return ep.astensor(perturbed).flatten(1).sum(1) < 0

    model = fb.PyTorchModel(linear, bounds=(0, 1), device="cpu")
    with pytest.raises(ValueError, match=r"expected \(targeted\) misclassification, got Never"):
        ARTAttack(APGD).run(model, inputs, Never(), epsilon=1.0)
