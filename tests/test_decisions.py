"""Misclassified or not: the same decisions with less work, and nobody else is affected."""

import foolbox as fb
import pytest
import torch
from torch import nn

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import PointwiseAttack, QueryCounter, StartedAttack
from abs_defense.attacks._base import DecidingModel
from abs_defense.inference import (
    ClassDecoder,
    Duel,
    InferenceSettings,
    JointDecoder,
    Prototypes,
    _infer,
    infer_latents,
    listen,
    misclassification_only,
    sample_latents,
)

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
    with torch.no_grad(), misclassification_only(labels):
        return model(images)


@pytest.fixture
def whole(monkeypatch):
    """Nobody is asked for less than all logits."""
    monkeypatch.setattr("abs_defense.models._abs.asked_labels", lambda images, classes: None)


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
    with misclassification_only(loser):
        assert torch.equal(model(x), logits)
        energy = model.infer(images[:2]).energy
        with listen() as heard, torch.no_grad():
            assert torch.equal(model(images[:2]), logits)
        with torch.no_grad():
            assert torch.equal(model(images[:3])[:2], logits)  # other images than labels
            assert not torch.equal(model(images[:2]), logits)
    assert torch.equal(energy, heard[0].inference.energy)
    with torch.no_grad(), misclassification_only(torch.tensor([0, 10])):
        assert torch.equal(model(images[:2]), logits)
        assert model(images[:0]).shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_numbers(images, dtype):
    model = ABS(prototypes=50)
    labels = torch.arange(len(images)) % 10
    assert torch.equal(asked(model, images, labels.to(dtype)), asked(model, images, labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "expected a tensor, got list"),
        (torch.tensor([1.0, 2.0]), "expected whole numbers, got torch.float32"),
        (torch.tensor([True, False]), "expected whole numbers, got torch.bool"),
        (torch.tensor([[1], [2]]), r"expected shape \(N,\), one an image, got \(2, 1\)"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises((TypeError, ValueError), match=message), misclassification_only(labels):
        pass


def test_the_question_ends_with_its_block(images):
    model = ABS(prototypes=50)
    with torch.no_grad():
        before = model(images[:3])
        with pytest.raises(RuntimeError), misclassification_only(before.argmin(1)):
            raise RuntimeError
        assert torch.equal(model(images[:3]), before)


def test_a_rival_that_is_ahead_by_rounding_only_decides_nothing(random_stack, random_images):
    """Its logit might be equal; so the third class is finished, too."""
    first, _, third = random_stack(3).class_decoders()
    decoders, x = [first, first, third], random_images(5).flatten(1).double()
    prototypes = Prototypes.decode(decoders, sample_latents(50, 8, 0).double(), 1.0)
    settings = InferenceSettings(steps=20, lr=0.05, radius=5.0, beta=1.0)
    energies, _ = infer_latents(decoders, prototypes, x, settings)
    labels = torch.zeros(5, dtype=torch.int64)
    nearly, clearly = (
        infer_latents(decoders, prototypes, x, settings, Duel(labels, torch.tensor([1.0, 1.0 - ahead, 1.5]).double()))
        for ahead in (1e-6, 1e-3)
    )
    torch.testing.assert_close(nearly[0], energies)
    assert bool((clearly[0][:, 2] > energies[:, 2] + 1e-3).all())


def test_images_that_the_label_is_sure_to_win_take_one_round_of_descents(digits, monkeypatch):
    rounds, solve = [], _infer._solve_pairs

    def counted(pairs, *args):
        rounds.append(len(pairs.label))
        return solve(pairs, *args)

    monkeypatch.setattr(_infer, "_solve_pairs", counted)
    model = ABS(prototypes=500)
    with torch.no_grad():
        logits, by_prototype = model(digits.images), ABS(prototypes=500, steps=0)(digits.images)
    best = by_prototype.topk(2).values * 784 / float(model.alpha)
    sure = (best[:, 0] - best[:, 1] > _infer._HOPELESS) & (by_prototype.argmax(1) == logits.argmax(1))
    assert sure.sum() > 3
    assert torch.equal(asked(model, digits.images[sure], logits[sure].argmax(1)), logits[sure])
    assert rounds == [10 * int(sure.sum())]


class Around(nn.Module):
    """Other outputs than the logits of an ABS model, in four ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.second = how, ABS(prototypes=50), ABS(prototypes=60)

    def forward(self, images):
        logits = self.first(images)
        if self.how == "mean":
            return (logits + self.second(images)) / 2
        if self.how == "in place":
            return logits.neg_()
        if self.how == "cascade":
            best = logits.topk(2).values
            return torch.where((best[:, 0] - best[:, 1] > 2.5)[:, None], logits, self.second(images))
        return self.second(images)


def hooked(hook):
    model = ABS(prototypes=50)
    model.register_forward_hook(hook)
    return model


class Negative(ABS):
    def forward(self, images):
        return -super().forward(images)


def replaced():
    model = ABS(prototypes=50)
    model.forward = lambda images: -ABS.forward(model, images)
    return model


OTHERS = {
    **{how: lambda how=how: Around(how) for how in ("mean", "in place", "cascade", "second")},
    "hook that changes": lambda: hooked(lambda module, args, logits: logits.flip(1)),
    "hook that looks": lambda: hooked(lambda module, args, logits: None),
    "subclass": lambda: Negative(prototypes=50),
    "replaced forward": replaced,
}


@pytest.mark.parametrize("other", OTHERS)
def test_whoever_may_make_something_else_of_the_logits_gets_them_whole(images, other):
    wrapped = fb.PyTorchModel(OTHERS[other]().eval(), bounds=(0, 1), device="cpu")
    expected = wrapped(images)
    counter = QueryCounter(wrapped, len(images))
    deciding = DecidingModel(counter, fb.criteria.Misclassification(expected.argmin(1)))
    assert torch.equal(deciding(images), expected)
    assert counter.queries.tolist() == [1.0] * len(images)


class Confident(fb.criteria.Misclassification):
    """Judges more than the class."""


@pytest.mark.parametrize(
    "criterion", [Confident, lambda labels: fb.criteria.Misclassification(labels) & Confident(labels)]
)
def test_other_criteria_get_logits_whole(images, criterion):
    wrapped = fb.PyTorchModel(ABS(prototypes=50), bounds=(0, 1), device="cpu")
    expected = wrapped(images)
    assert torch.equal(DecidingModel(wrapped, criterion(expected.argmin(1)))(images), expected)


def test_wrappers_of_the_input_are_harmless(images):
    model = fb.PyTorchModel(ABS(prototypes=50), bounds=(0, 1), device="cpu")
    wide = QueryCounter(model.transform_bounds((-1, 1)), len(images))
    expected = wide(2 * images - 1)
    labels = expected.argsort(dim=1)[:, -2]
    found = DecidingModel(wide, fb.criteria.Misclassification(labels))(2 * images - 1)
    assert not torch.equal(found, expected)
    assert bool((found.argmax(1) != labels).all())


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
