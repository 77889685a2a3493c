"""Misclassified or not: the same decisions with less work, and nobody else is affected."""

import foolbox as fb
import pytest
import torch
from torch import nn

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import PointwiseAttack, QueryCounter, StartedAttack
from abs_defense.attacks._base import DecidingModel
from abs_defense.inference import ClassDecoder, JointDecoder, _infer, listen, misclassification_only

SETTINGS = [(ABS, "adam"), (ABS, "bfgs"), (BinaryABS, "adam"), (BinaryABS, "bfgs")]


@pytest.fixture(params=SETTINGS, ids=[f"{kind.__name__}-{solver}" for kind, solver in SETTINGS])
def model(request):
    """The bundled weights with few prototypes."""
    kind, solver = request.param
    return kind(prototypes=200, solver=solver)


@pytest.fixture(scope="module")
def images(digits, random_images):
    """Digits, inverted ones, noise, and images half way between digits of two classes."""
    middle = (digits.images + digits.images.flip(0))[:10] / 2
    return torch.cat([digits.images, middle, 1.0 - digits.images[:4], random_images(2)])


@pytest.fixture
def decoded(monkeypatch):
    """How many latents were decoded with their gradient so far."""
    count = [0]
    pullback = ClassDecoder._pullback

    def counted(self, latents, gradient):
        count[0] += latents.shape[0] * latents.shape[1]
        return pullback(self, latents, gradient)

    for kind in (ClassDecoder, JointDecoder):
        monkeypatch.setattr(kind, "_pullback", counted)
    return count


@pytest.fixture(autouse=True)
def also_few_images(monkeypatch):
    monkeypatch.setattr(_infer, "_ENOUGH_FOR_DUELS", {"adam": 1, "bfgs": 1})


def asked(model, images, labels):
    with torch.no_grad(), misclassification_only(labels) as question:
        logits = model(images)
    assert len(question.answers) == 1
    assert question.trusts(logits)
    return logits


@pytest.fixture
def whole(monkeypatch):
    """Nobody is asked for less than all logits."""
    monkeypatch.setattr("abs_defense.models._abs.asked_question", lambda: None)


@pytest.mark.parametrize("place", [0, 1, 2, 9], ids=lambda place: f"label-of-rank-{place}")
def test_same_decisions_whatever_the_label(model, images, place):
    with torch.no_grad():
        logits = model(images)
    labels = logits.argsort(dim=1, descending=True)[:, place]
    found = asked(model, images, labels)
    wins = found.argmax(1) == labels
    assert torch.equal(wins, logits.argmax(1) == labels)
    if place == 0:  # the label wins, so no class is left out
        torch.testing.assert_close(found, logits, rtol=1e-6, atol=0)
    else:
        assert not wins.any()
        label = labels[:, None]
        torch.testing.assert_close(found.gather(1, label), logits.gather(1, label), rtol=1e-6, atol=0)
        winner = found.argmax(1, keepdim=True)
        torch.testing.assert_close(found.gather(1, winner), logits.gather(1, winner), rtol=1e-6, atol=0)


def test_less_work_where_the_label_loses(model, images, decoded):
    with torch.no_grad():
        logits = model(images)
    full, decoded[0] = decoded[0], 0
    asked(model, images, logits.argsort(dim=1)[:, -2])
    assert 0 < decoded[0] < 0.5 * full


def test_few_images_are_not_worth_it(model, images, decoded, monkeypatch):
    monkeypatch.setattr(_infer, "_ENOUGH_FOR_DUELS", {"adam": 3, "bfgs": 3})
    with torch.no_grad():
        logits = model(images[:2])
    full, decoded[0] = decoded[0], 0
    assert torch.equal(asked(model, images[:2], logits.argmin(1)), logits)
    assert decoded[0] == full


def test_decisions_of_mixed_batches_are_those_of_single_images(model, images):
    with torch.no_grad():
        predicted = model(images).argmax(1)
    labels = torch.where(torch.arange(len(images)) % 3 == 0, (predicted + 1) % 10, predicted)
    together = asked(model, images, labels).argmax(1) == labels
    assert torch.equal(together, predicted == labels)
    for i in range(0, len(images), 7):
        alone = asked(model, images[[i]], labels[[i]]).argmax(1) == labels[[i]]
        assert torch.equal(alone, together[[i]])


def test_the_first_rival_need_not_be_the_one_that_wins(digits):
    """Where the class that its prototype makes the rival loses to the label, another one may still beat it."""
    model = ABS(prototypes=20)
    images = digits.images
    with torch.no_grad():
        logits = model(images)
        by_prototype = ABS(prototypes=20, steps=0)(images)
    second = logits.argsort(dim=1, descending=True)[:, 1]
    rivals = by_prototype.scatter(1, second[:, None], -torch.inf).argmax(1)
    rows = (rivals != logits.argmax(1)).nonzero()[:, 0]
    assert len(rows) > 0
    found = asked(model, images[rows], second[rows])
    assert torch.equal(found.argmax(1), logits[rows].argmax(1))


@pytest.mark.parametrize("kind", [ABS, BinaryABS])
def test_prototype_classifier_decides_as_ever(kind, images):
    model = kind(prototypes=200, steps=0)
    with torch.no_grad():
        assert torch.equal(asked(model, images, torch.zeros(len(images), dtype=torch.int64)), model(images))


def test_more_images_than_are_worked_on_at_once(images, monkeypatch):
    monkeypatch.setattr("abs_defense.inference._infer._CHUNK_CPU", 16)
    model = ABS(prototypes=50)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    labels = (predicted + torch.arange(len(images)) % 2) % 10
    assert torch.equal(asked(model, images, labels).argmax(1) == labels, predicted == labels)


def test_calls_that_need_more_are_not_affected(model, images):
    x = images[:2].clone().requires_grad_()
    logits = model(x)
    loser = logits.argmin(1)
    with misclassification_only(loser) as question:
        assert torch.equal(model(x), logits)
        energy = model.infer(images[:2]).energy
        with listen() as heard, torch.no_grad():
            assert torch.equal(model(images[:2]), logits)
        with torch.no_grad():
            assert torch.equal(model(images[:3])[:2], logits)  # other images than labels
        model.predict(images[:2])
    assert torch.equal(energy, heard[0].inference.energy)
    assert len(question.answers) == 1  # of predict, which did leave classes out
    with torch.no_grad(), misclassification_only(torch.tensor([0, 10])) as question:
        assert torch.equal(model(images[:2]), logits)
        assert model(images[:0]).shape == (0, 10)
    assert not question.answers


def test_the_question_ends_with_its_block(images):
    model = ABS(prototypes=50)
    with torch.no_grad():
        before = model(images[:3])
        with pytest.raises(RuntimeError), misclassification_only(before.argmin(1)):
            raise RuntimeError
        assert torch.equal(model(images[:3]), before)


class Mean(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images):
        return torch.stack([model(images) for model in self.models]).mean(0)


def test_whoever_makes_something_else_of_the_logits_gets_them_whole(images):
    mean = Mean(ABS(prototypes=50), ABS(prototypes=60)).eval()
    hooked = ABS(prototypes=50).eval()
    hooked.register_forward_hook(lambda module, args, logits: logits.flip(1))
    for around in (mean, hooked):
        wrapped = fb.PyTorchModel(around, bounds=(0, 1), device="cpu")
        expected = wrapped(images)
        counter = QueryCounter(wrapped, len(images))
        deciding = DecidingModel(counter, fb.criteria.Misclassification(expected.argmin(1)))
        assert torch.equal(deciding(images), expected)
        assert counter.queries.tolist() == [2.0] * len(images)
        assert torch.equal(deciding(images), expected)
        assert counter.queries.tolist() == [3.0] * len(images)


@pytest.mark.parametrize("targeted", [False, True])
def test_deciding_model_judges_parts_of_a_batch(images, targeted):
    wrapped = fb.PyTorchModel(ABS(prototypes=50), bounds=(0, 1), device="cpu")
    expected = wrapped(images)
    labels = expected.argsort(dim=1)[:, -2]
    kind = fb.criteria.TargetedMisclassification if targeted else fb.criteria.Misclassification
    deciding = DecidingModel(wrapped, kind(labels))
    rows = torch.arange(3, len(images), 4).numpy()
    found = deciding.about(images[rows], rows)
    assert not torch.equal(found, expected[rows])
    assert bool((found.argmax(1) != labels[rows]).all())


ATTACKS = {
    "pointwise": PointwiseAttack(restarts=1, max_queries=25),
    "hop-skip-jump": StartedAttack(
        fb.attacks.HopSkipJumpAttack(steps=1, initial_gradient_eval_steps=5, max_gradient_eval_steps=5)
    ),
}


def run(attack, digits):
    torch.manual_seed(0)
    wrapped = fb.PyTorchModel(ABS(prototypes=500), bounds=(0, 1), device="cpu")
    return attack(wrapped, digits.images[:2], digits.labels[:2], epsilons=None)


@pytest.fixture(params=ATTACKS)
def attack(request):
    return ATTACKS[request.param]


@pytest.mark.touches_random_state
def test_attacks_find_the_same_with_less_work(attack, digits, decoded, request):
    found, _, success = run(attack, digits)
    hasty, decoded[0] = decoded[0], 0
    request.getfixturevalue("whole")
    expected, _, expected_success = run(attack, digits)
    assert torch.equal(found, expected)
    assert torch.equal(success, expected_success)
    assert bool(success.any())
    assert hasty < 0.9 * decoded[0]
