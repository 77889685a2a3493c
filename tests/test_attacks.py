"""The attacks: foolbox's contract on every model, known optima, and the models that estimate, count and listen."""

import functools
import math

import eagerpy as ep
import foolbox as fb
import numpy as np
import pytest
import scipy.optimize
import torch
from foolbox.attacks.base import MinimizationAttack
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from torch import nn
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import (
    DistalAttack,
    EpsilonSearchAttack,
    FiniteDifferenceModel,
    L0BisectorAttack,
    L0Distance,
    L2BisectorAttack,
    LatentDescentAttack,
    LInfBisectorAttack,
    PointwiseAttack,
    QueryCounter,
    QueryLimitExceededError,
    RandomDirectionModel,
    StartedAttack,
    _estimators,
    register,
    snap_to_threshold,
)
from abs_defense.attacks._pointwise import _salt_and_pepper
from abs_defense.inference import listen, publish

ABS_ATTACKS = {
    "latent-descent": LatentDescentAttack(stepsize=0.5, steps=12, binary_search_steps=4),
    "l2-bisector": L2BisectorAttack(steps=5, rivals=1, points=3, binary_search_steps=4),
    "linf-bisector": LInfBisectorAttack(steps=8, rivals=1, points=3, binary_search_steps=4),
    "l0-bisector": L0BisectorAttack(steps=5, rivals=1, points=3, binary_search_steps=0),
}
POINTWISE = {f"pointwise-{norm}": PointwiseAttack(norm=norm, max_queries=15) for norm in ("l0", "l2")}
EPSILON_SEARCH = {
    "epsilon-search": EpsilonSearchAttack(
        fb.attacks.L2BasicIterativeAttack(steps=5), (0.5, 1, 2, 4, 8, 16), binary_search_steps=4
    )
}
ATTACKS = ABS_ATTACKS | POINTWISE | EPSILON_SEARCH
ABS_MODELS = ("abs", "binary", "prototype")
CELLS = [(attack, model) for attack in ABS_ATTACKS for model in ABS_MODELS]
CELLS += [(attack, model) for attack in POINTWISE for model in ("linear", "cnn", *ABS_MODELS)]
CELLS += [(attack, model) for attack in EPSILON_SEARCH for model in ("cnn", "prototype")]


class Linear(nn.Module):
    """Two classes; ``0.5 + sum of +-x_i`` is the lead of the second one, with as many plus as minus."""

    def __init__(self, shape=(1, 28, 28), dtype=torch.float32):
        super().__init__()
        order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))
        self.signs = nn.Parameter((2.0 * (order % 2) - 1.0).view(shape).to(dtype), requires_grad=False)

    def forward(self, images):
        lead = (images * self.signs).flatten(1).sum(1) + 0.5
        return torch.stack([torch.zeros_like(lead), lead], dim=1)


class Unreachable(nn.Module):
    """A model that never answers with one of its classes."""

    def __init__(self, module, label):
        super().__init__()
        self.module, self.label = module, label

    def forward(self, images):
        logits = self.module(images)
        penalty = torch.zeros_like(logits)
        penalty[:, self.label] = 1e6
        return logits - penalty


class Preprocessed(nn.Module):
    """A model behind a function of the images."""

    def __init__(self, function, module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, images):
        return self.module(self.function(images))


class Differs(Criterion):
    """Misclassification by another name; images in ``spared`` are never adversarial."""

    def __init__(self, classes, spared=()):
        super().__init__()
        self.classes, self.spared = classes, list(spared)

    def __repr__(self):
        return "Differs()"

    def __call__(self, perturbed, outputs):
        outputs_, restore_type = ep.astensor_(outputs)
        hit = outputs_.raw.argmax(1) != self.classes
        hit[self.spared] = False
        return restore_type(ep.astensor(hit))


def make_cnn():
    cnn = nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2), nn.ELU(), nn.Conv2d(6, 8, 5, stride=2), nn.ELU(), nn.Flatten(), nn.Linear(128, 10)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in cnn.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values * (1.5 / max(1, parameter[0].numel()) ** 0.5)
        parameter.requires_grad_(False)
    return cnn.eval()


@pytest.fixture(scope="module")
def modules():
    """All models; shared, do not change them."""
    with torch.random.fork_rng(devices=[]):
        cnn = make_cnn()
    return {
        "linear": Linear(),
        "cnn": cnn,
        "abs": ABS(prototypes=200, steps=1),
        "binary": BinaryABS(prototypes=200, steps=1),
        "prototype": ABS(prototypes=200, steps=0),
    }


def foolbox_model(module, bounds=(0, 1), **kwargs):
    return fb.PyTorchModel(module.eval(), bounds=bounds, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def models(modules):
    return {name: foolbox_model(module) for name, module in modules.items()}


@pytest.fixture(scope="module")
def images(digits):
    """A 2, a 0 and a 1."""
    return digits.images[[1, 3, 5]].clone()


def classify(model, images):
    return model(images).argmax(1)


def runner_up(model, images):
    return model(images).argsort(1)[:, -2]


def ddn(model, images, labels, **settings):
    """Foolbox's DDN attack, which draws from the global random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fb.attacks.DDNAttack(**settings)(model, images, labels, epsilons=None)


def lengths(attack, images, perturbed):
    return attack.distance(images, perturbed)


# Every attack on every model


class Cell:
    def __init__(self, attack, model, images):
        self.attack, self.model, self.images = attack, model, images
        self.labels = classify(model, images)
        self.raw, self.clipped, self.success = self.run()

    def run(self, rows=slice(None)):
        return self.attack(self.model, self.images[rows], self.labels[rows], epsilons=None)

    def lengths(self, perturbed, rows=slice(None)):
        return lengths(self.attack, self.images[rows], perturbed)


@pytest.fixture(scope="module")
def cells(models, images):
    """Each attack on each model, run once."""
    return functools.cache(lambda attack, model: Cell(ATTACKS[attack], models[model], images.clone()))


@pytest.fixture(params=CELLS, ids="-".join)
def cell(request, cells):
    return cells(*request.param)


def test_perturbed_images_are_images(cell, images):
    assert cell.raw.shape == images.shape
    assert cell.raw.dtype == images.dtype
    assert cell.raw.min() >= 0.0
    assert cell.raw.max() <= 1.0
    assert torch.equal(cell.raw, cell.clipped)
    assert torch.equal(cell.images, images), "the attack changed its input"


def test_all_images_are_broken_and_success_is_true(cell):
    assert cell.success.dtype == torch.bool
    assert torch.equal(cell.success, classify(cell.model, cell.raw) != cell.labels)
    assert cell.success.all()


def assert_same_in_another_batch(cell, rows):
    raw, _, success = cell.run(rows)
    assert torch.equal(success, cell.success[rows])
    assert_close(cell.lengths(raw, rows), cell.lengths(cell.raw)[rows], rtol=1e-2, atol=1e-3)


def test_results_depend_neither_on_order_nor_on_batch(cell):
    assert_same_in_another_batch(cell, [2, 0])


# Every attack on the fastest model that it takes


@pytest.fixture(params=ATTACKS)
def case(request, cells):
    return cells(request.param, "linear" if request.param in POINTWISE else "prototype")


@pytest.mark.parametrize("rows", [[2, 1, 0], [1]], ids=["flipped", "alone"])
def test_results_of_flipped_batches_and_single_images(case, rows):
    assert_same_in_another_batch(case, rows)


def test_attacks_are_deterministic(case):
    raw, _, success = case.run()
    assert torch.equal(raw, case.raw)
    assert torch.equal(success, case.success)


@pytest.mark.parametrize(
    "convert",
    [
        lambda labels: labels.int(),
        lambda labels: labels.numpy(),
        lambda labels: labels.tolist(),
        lambda labels: Misclassification(labels.float().numpy()),
    ],
    ids=["int32", "numpy", "list", "float-numpy-criterion"],
)
def test_labels_of_any_kind(case, convert):
    raw, _, success = case.attack(case.model, case.images[:1], convert(case.labels[:1]), epsilons=None)
    assert success.all()
    assert_close(case.lengths(raw, [0]), case.lengths(case.raw)[:1], rtol=1e-2, atol=1e-3)


def test_targeted(case):
    targets = runner_up(case.model, case.images)
    raw, _, success = case.attack(case.model, case.images, TargetedMisclassification(targets), epsilons=None)
    assert torch.equal(success, classify(case.model, raw) == targets)
    assert success.all()


@pytest.mark.parametrize("criterion", [Misclassification, TargetedMisclassification, lambda labels: labels])
@pytest.mark.parametrize("count", [1, 4])
def test_wrong_number_of_labels_raises(case, criterion, count):
    with pytest.raises(ValueError, match=r"expected shape \(3,\)"):
        case.attack(case.model, case.images, criterion(torch.zeros(count, dtype=torch.long)), epsilons=None)


@pytest.mark.parametrize(
    ("labels", "message"), [([0.5, 1.0, 2.0], "whole numbers"), ("7, 2, 1", "expected a foolbox criterion or labels")]
)
def test_labels_that_are_none_raise(case, labels, message):
    with pytest.raises(ValueError, match=message):
        case.attack(case.model, case.images, labels, epsilons=None)


def test_foreign_criteria(case):
    """Only the Pointwise attack serves every criterion."""
    criterion = Differs(case.labels)
    if isinstance(case.attack, PointwiseAttack):
        raw, _, success = case.attack(case.model, case.images, criterion, epsilons=None)
        assert success.all()
        assert torch.equal(raw, case.raw)
    else:
        with pytest.raises(ValueError, match="got Differs"):
            case.attack(case.model, case.images, criterion, epsilons=None)


def test_scalar_epsilon(case):
    epsilon = float(case.lengths(case.raw).median())
    raw, clipped, success = case.attack(case.model, case.images, case.labels, epsilons=epsilon)
    assert raw.shape == clipped.shape == case.images.shape
    assert (case.lengths(clipped) <= epsilon * (1 + 1e-5)).all()
    assert torch.equal(success, classify(case.model, clipped) != case.labels)
    assert success.any()


def test_list_of_epsilons_with_none(case):
    largest = float(case.lengths(case.raw).max())
    epsilons = [0.0, 0.5 * largest, None, 2.0 * largest]
    raw, clipped, success = case.attack(case.model, case.images, case.labels, epsilons=epsilons)
    assert len(raw) == len(clipped) == 4
    assert success.shape == (4, 3)
    for images, epsilon, flags in zip(clipped, epsilons, success, strict=True):
        assert torch.equal(flags, classify(case.model, images) != case.labels)
        assert epsilon is None or (case.lengths(images) <= epsilon * (1 + 1e-5)).all()
    assert success.any(1).tolist()[2:] == [True, True]
    assert not success[0].any()
    assert_close(raw[2], case.raw)


def test_large_epsilons_stop_early(case):
    """Nothing smaller than the smallest epsilon is looked for."""
    largest = 2.0 * float(case.lengths(case.raw).max())
    counter = QueryCounter(case.model, 3)
    case.attack(counter, case.images, case.labels, epsilons=None)
    until_the_end = counter.queries.sum()
    counter = QueryCounter(case.model, 3)
    _, _, success = case.attack(counter, case.images, case.labels, epsilons=largest)
    assert success.all()
    assert counter.queries.sum() < until_the_end


def test_repeat_is_not_worse(case):
    repeated = case.attack.repeat(2)
    raw, _, success = repeated(case.model, case.images[:1], case.labels[:1], epsilons=None)
    assert success.all()
    assert (case.lengths(raw, [0]) <= case.lengths(case.raw)[:1] * (1 + 1e-2)).all()


def test_eagerpy_inputs_give_eagerpy_results(case):
    x = ep.astensor(case.images[:1])
    raw, clipped, success = case.attack(case.model, x, case.labels[:1], epsilons=[None])
    assert all(isinstance(result, ep.PyTorchTensor) for result in (*raw, *clipped, success))
    assert success.raw.all()


def test_double_precision(case):
    raw, _, success = case.attack(case.model, case.images[:1].double(), case.labels[:1], epsilons=None)
    assert raw.dtype == torch.float64
    assert success.all()


def test_inputs_that_require_gradients(case):
    images = case.images[:1].clone().requires_grad_()
    raw, _, success = case.attack(case.model, images, case.labels[:1], epsilons=None)
    assert success.all()
    assert not raw.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("epsilons", [None, 1.0, [1.0, None]])
def test_empty_batch(case, epsilons):
    raw, clipped, success = case.attack(case.model, case.images[:0], case.labels[:0], epsilons=epsilons)
    several = isinstance(epsilons, list)
    for images in [*raw, *clipped] if several else [raw, clipped]:
        assert images.shape == (0, 1, 28, 28)
    assert success.shape == ((2, 0) if several else (0,))
    assert success.dtype == torch.bool


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_inputs_that_are_no_images_raise(case, value):
    images = case.images.clone()
    images[1, 0, 14, 14] = value
    with pytest.raises(ValueError, match="bounds"):
        case.attack(case.model, images, case.labels, epsilons=None)


def test_repr_shows_settings_and_no_tensors(case):
    assert repr(case.attack).startswith(type(case.attack).__name__ + "(")
    assert not any(isinstance(value, torch.Tensor) for value in vars(case.attack).values())


def test_unknown_arguments_raise(case):
    with pytest.raises(TypeError, match="speed"):
        case.attack(case.model, case.images, case.labels, epsilons=None, speed=2)


def test_misclassified_images_come_back_as_they_are(case):
    labels = case.labels.clone()
    labels[0] = (labels[0] + 1) % 2
    raw, _, success = case.attack(case.model, case.images, labels, epsilons=None)
    assert success.all()
    assert torch.equal(raw[0], case.images[0])
    assert (case.lengths(raw) > 0).tolist() == [False, True, True]


def test_nothing_to_do(case):
    labels = (case.labels + 1) % 2
    raw, _, success = case.attack(case.model, case.images, labels, epsilons=None)
    assert success.all()
    assert torch.equal(raw, case.images)


def test_one_hopeless_image_fails_alone(case):
    if isinstance(case.attack, PointwiseAttack):
        model, criterion = case.model, Differs(case.labels, spared=[1])
    else:
        targets = runner_up(case.model, case.images)
        assert (targets[[0, 2]] != targets[1]).all()
        model = foolbox_model(Unreachable(ABS(prototypes=200, steps=0), int(targets[1])))
        criterion = TargetedMisclassification(targets)
    raw, _, success = case.attack(model, case.images, criterion, epsilons=None)
    assert success.tolist() == [True, False, True]
    assert torch.equal(raw[1], case.images[1])


@pytest.mark.parametrize("model", ["linear", "cnn"])
@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_models_without_abs_are_refused(models, images, attack, model):
    with pytest.raises(ValueError, match="ABS or Binary ABS inside"):
        ABS_ATTACKS[attack](models[model], images, classify(models[model], images), epsilons=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentDescentAttack(stepsize=0.0), "stepsize"),
        (lambda: LatentDescentAttack(stepsize=1.1), "stepsize"),
        (lambda: LatentDescentAttack(steps=0), "steps"),
        (lambda: LatentDescentAttack(binary_search_steps=-1), "binary_search_steps"),
        (lambda: L2BisectorAttack(steps=0), "steps"),
        (lambda: L2BisectorAttack(rivals=0), "rivals"),
        (lambda: L2BisectorAttack(points=0), "points"),
        (lambda: L2BisectorAttack(binary_search_steps=-1), "binary_search_steps"),
        (lambda: PointwiseAttack(norm="linf"), "norm"),
        (lambda: PointwiseAttack(restarts=0), "restarts"),
        (lambda: PointwiseAttack(start_draws=0), "start_draws"),
        (lambda: PointwiseAttack(max_queries=0), "max_queries"),
        (lambda: PointwiseAttack().repeat(0), "times"),
        (lambda: DistalAttack(confidence=1.0), "confidence"),
        (lambda: DistalAttack(steps=0), "steps"),
        (lambda: DistalAttack(stepsize=0.0), "stepsize"),
        (lambda: FiniteDifferenceModel(foolbox_model(Linear()), epsilon=0.0), "epsilon"),
        (lambda: FiniteDifferenceModel(foolbox_model(Linear()), chunk=0), "chunk"),
        (lambda: RandomDirectionModel(foolbox_model(Linear()), directions=0), "directions"),
        (lambda: RandomDirectionModel(foolbox_model(Linear()), sigma=0.0), "sigma"),
        (lambda: QueryCounter(foolbox_model(Linear()), 0), "images"),
    ],
)
def test_settings_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        make()


def test_queries_about_more_images_than_were_counted_on(digits):
    counter = QueryCounter(foolbox_model(Linear()), 2)
    with pytest.raises(ValueError, match=r"images: expected the size of the batch, got 2 and image 2"):
        PointwiseAttack(max_queries=20)(counter, digits.images[:3], digits.labels[:3], epsilons=None)


# ABS inside other units and other modules


def disguised(module, how):
    """The same model in other units or modules, and the lower bound and width of its units."""
    if how == "mean-and-std":
        preprocessing = {"mean": [-1.0], "std": [2.0], "axis": -3}
        return foolbox_model(module, (-1, 1), preprocessing=preprocessing), -1.0, 2.0
    if how == "nested":
        return foolbox_model(nn.Sequential(nn.Identity(), nn.Sequential(module))), 0.0, 1.0
    return foolbox_model(module).transform_bounds((-1, 1)), -1.0, 2.0


@pytest.mark.parametrize(
    ("name", "how"),
    [("prototype", "mean-and-std"), ("prototype", "transformed"), ("prototype", "nested"), ("binary", "mean-and-std")],
)
@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_abs_in_disguise_gets_the_same_adversarials(modules, cells, attack, name, how):
    expected = cells(attack, name)
    model, lower, width = disguised(modules[name], how)
    images = width * expected.images + lower
    raw, _, success = expected.attack(model, images, expected.labels, epsilons=None)
    assert success.all()
    assert_close((raw - lower) / width, expected.raw, rtol=0, atol=1e-2)
    unit = 1.0 if attack == "l0-bisector" else width
    assert_close(lengths(expected.attack, images, raw) / unit, expected.lengths(expected.raw), rtol=1e-2, atol=0)


@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_abs_behind_a_flip_is_refused(modules, images, attack):
    flipped = foolbox_model(Preprocessed(lambda x: x.flip(-1), modules["prototype"]))
    with pytest.raises(ValueError, match="preprocessing"):
        ABS_ATTACKS[attack](flipped, images, classify(flipped, images), epsilons=None)


class InParts(nn.Module):
    """Asks its model for one image at a time."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return torch.cat([self.module(part) for part in images.split(1)])


class Ensemble(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, images):
        return torch.stack([module(images) for module in self.members]).mean(0)


@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_abs_that_is_asked_in_parts(modules, cells, attack):
    expected = cells(attack, "prototype")
    model = foolbox_model(InParts(modules["prototype"]))
    raw, _, success = expected.attack(model, expected.images, expected.labels, epsilons=None)
    assert success.all()
    assert_close(lengths(expected.attack, expected.images, raw), expected.lengths(expected.raw), rtol=1e-2, atol=0)


@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_several_abs_models_are_refused(modules, images, attack):
    model = foolbox_model(Ensemble(modules["prototype"], modules["abs"]))
    with pytest.raises(ValueError, match=r"one ABS model inside .* called with 3 images, .* called with 3 \+ 3"):
        ABS_ATTACKS[attack](model, images, classify(model, images), epsilons=None)


@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_abs_behind_a_curve_that_black_and_white_images_hide_is_refused(modules, images, attack):
    model = foolbox_model(Preprocessed(lambda x: x**2, modules["prototype"]))
    extremes = (images > 0.5).float()
    with pytest.raises(ValueError, match="affine map of each pixel"):
        ABS_ATTACKS[attack](model, extremes, classify(model, extremes), epsilons=None)


@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_abs_behind_a_sum_of_colours_is_refused(modules, images, attack):
    grey = foolbox_model(Preprocessed(lambda x: x.mean(1, keepdim=True), modules["prototype"]))
    coloured = images.expand(-1, 3, -1, -1).clone()
    with pytest.raises(ValueError, match=r"affine map of each pixel, .* shape \(1, 28, 28\) .* shape \(3, 28, 28\)"):
        ABS_ATTACKS[attack](grey, coloured, classify(grey, coloured), epsilons=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attack", ABS_ATTACKS)
def test_images_in_half_precision_cross_the_threshold(modules, models, images, attack, dtype):
    """Where a margin of 1e-5 is lost in rounding."""
    x = images.to(dtype)
    labels = modules["binary"](x).argmax(1)
    raw, _, success = ABS_ATTACKS[attack](models["binary"], x, labels, epsilons=None)
    assert success.all()
    assert raw.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l0", "l2"])
def test_pointwise_on_images_in_half_precision(models, images, norm, dtype):
    x, model, attack = images[:2].to(dtype), models["prototype"], PointwiseAttack(norm=norm)
    labels = classify(model, x)
    raw, clipped, success = attack(model, x, labels, epsilons=None)
    assert success.all()
    assert raw.dtype == clipped.dtype == dtype
    assert (classify(model, raw) != labels).all()
    full, _, _ = attack(model, x.float(), labels, epsilons=None)
    assert_close(lengths(attack, x.float(), raw.float()), lengths(attack, x.float(), full), rtol=0.2, atol=0)


# Latent Descent


def plain_descent(module, image, label, stepsize):
    """The first adversarial on the path."""
    while True:
        found = module.infer(image)
        if found.prediction != label:
            return image
        energy = found.energy[0].clone()
        energy[label] = torch.inf
        image = (1.0 - stepsize) * image + stepsize * found.reconstructions[:, energy.argmin()]


@pytest.mark.parametrize("name", ["abs", "prototype"])
def test_latent_descent_follows_the_path(modules, models, images, name):
    labels = classify(models[name], images)
    first = torch.cat([plain_descent(modules[name], x[None], y, 0.2) for x, y in zip(images, labels, strict=True)])
    for steps in (0, 6):
        attack = LatentDescentAttack(stepsize=0.2, steps=50, binary_search_steps=steps)
        found, _, success = attack(models[name], images, labels, epsilons=None)
        assert success.all()
        if steps == 0:
            assert_close(found, first, rtol=0, atol=1e-4)
        else:
            assert (lengths(attack, images, found) < lengths(attack, images, first)).all()
            assert (classify(models[name], found) != labels).all()


def test_latent_descent_moves_only_pixels_that_binary_abs_sees_change(modules, models, images):
    labels = classify(models["binary"], images)
    found = modules["binary"].infer(images)
    rivals = found.energy.scatter(1, labels[:, None], torch.inf).argmin(1)
    wanted = found.reconstructions[torch.arange(3), rivals] > 0.5
    expected = torch.where(wanted == (images > 0.5), images, torch.where(wanted, 0.501, 0.499))
    attack = LatentDescentAttack(stepsize=1.0, steps=1, binary_search_steps=0)
    raw, _, success = attack(models["binary"], images, labels, epsilons=None)
    assert success.all()
    assert_close(raw, expected, rtol=0, atol=1e-6)


def test_latent_descent_gives_up_after_its_steps(models, images):
    labels = classify(models["prototype"], images)
    raw, _, success = LatentDescentAttack(stepsize=0.01, steps=2)(models["prototype"], images, labels, epsilons=None)
    assert not success.any()
    assert torch.equal(raw, images)


@pytest.mark.parametrize(
    ("attack", "name"), [*((attack, "prototype") for attack in ATTACKS), ("latent-descent", "binary")]
)
def test_finished_images_are_not_queried_again(modules, images, attack, name):
    module = nn.Sequential(modules[name])
    passed = []
    module.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    model = foolbox_model(module)
    labels = classify(model, images)
    labels[0] = (labels[0] + 1) % 10
    passed.clear()
    counter = QueryCounter(model, 3)
    _, _, success = ATTACKS[attack](counter, images, labels, epsilons=None)
    assert success.all()
    assert counter.queries.sum() == pytest.approx(sum(passed))
    # As it is, at the end, and three constant images shared by three.
    assert counter.queries[0] == pytest.approx(2 + 3 / 3 if attack in ABS_ATTACKS else 2)
    assert (counter.queries[1:] > counter.queries[0] + 4).all()


# Bisectors


def bisectors(module, image, label):
    """For each prototype of another class, what a move from ``label`` to it takes: ``ways @ d >= rest``."""
    points = module.prototype_images.double().flatten(2).numpy()
    offsets = 0.5 * module.prototype_latents.double().square().sum(1).numpy()
    energies = np.square(points - image).sum(2) + offsets
    for other in set(range(10)) - {label}:
        for point, energy in zip(points[other], energies[other], strict=True):
            yield 2.0 * (point - points[label]), energy - energies[label]


def smallest_l2(ways, rest, lower, upper):
    """By the dual of the quadratic program; infinite where there is none."""

    def negative_dual(multipliers):
        move = (multipliers @ ways).clip(lower, upper)
        return multipliers @ (ways @ move - rest) - 0.5 * move @ move, ways @ move - rest

    start = np.zeros(len(rest))
    found = scipy.optimize.minimize(negative_dual, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(rest))
    move = (found.x @ ways).clip(lower, upper)
    return np.linalg.norm(move) if (ways @ move >= rest - 1e-3).all() else np.inf


def smallest_linf(ways, rest, lower, upper):
    """For a single constraint."""

    def surplus(size):
        return ways[0] @ np.clip(size * np.sign(ways[0]), lower, upper) - rest[0]

    return scipy.optimize.brentq(surplus, 0.0, 1.0) if surplus(1.0) >= 0 else np.inf


def smallest_l0(ways, rest, lower, upper):
    """For a single constraint."""
    gains = np.sort(np.maximum(ways[0] * lower, ways[0] * upper))[::-1].cumsum()
    return float(np.argmax(gains >= rest[0]) + 1) if gains[-1] >= rest[0] else np.inf


@pytest.mark.parametrize(
    ("attack", "smallest", "prototypes"),
    [
        (L2BisectorAttack(steps=8, binary_search_steps=0), smallest_l2, 10),
        (LInfBisectorAttack(steps=1, rivals=9, binary_search_steps=0), smallest_linf, 1),
        (L0BisectorAttack(steps=1, rivals=9, binary_search_steps=0), smallest_l0, 1),
    ],
    ids=["l2", "linf", "l0"],
)
def test_bisectors_are_optimal_for_few_prototypes(images, attack, smallest, prototypes):
    module = ABS(prototypes=prototypes, steps=0)
    model = foolbox_model(module)
    images = images[:2]
    labels = classify(model, images)
    raw, _, success = attack(model, images, labels, epsilons=None)
    assert success.all()
    optima = []
    for image, label in zip(images.double().flatten(1).numpy(), labels.tolist(), strict=True):
        optima.append(min(smallest(*problem, -image, 1.0 - image) for problem in bisectors(module, image, label)))
    assert_close(lengths(attack, images, raw).double(), torch.tensor(optima, dtype=torch.float64), rtol=5e-3, atol=0)


def test_l2_bisector_beats_ddn(models, digits):
    model, images = models["prototype"], digits.images[:4]
    labels = classify(model, images)
    ours, _, success = L2BisectorAttack(steps=10, rivals=1)(model, images, labels, epsilons=None)
    theirs, _, success_of_theirs = ddn(model, images, labels, steps=20, init_epsilon=2.0)
    assert success.all()
    assert success_of_theirs.all()
    assert fb.distances.l2(images, ours).median() <= fb.distances.l2(images, theirs).median()


@pytest.mark.parametrize("attack", ["l2-bisector", "l0-bisector"])
def test_starting_points_count_as_found(cells, attack):
    cell = cells(attack, "prototype")
    starts = cell.raw.clone()
    starts[1] = cell.images[1]
    again, _, success = cell.attack(cell.model, cell.images, cell.labels, epsilons=None, starting_points=starts)
    assert success.all()
    assert (cell.lengths(again) <= cell.lengths(cell.raw) * (1 + 1e-5)).all()


@pytest.mark.parametrize("attack", ["l2-bisector", "l0-bisector", "pointwise-l0"])
def test_starting_points_of_another_precision(cells, attack):
    cell = cells(attack, "prototype")
    again, _, success = cell.attack(
        cell.model, cell.images, cell.labels, epsilons=None, starting_points=cell.raw.double()
    )
    assert success.all()
    assert again.dtype == cell.images.dtype


@pytest.mark.parametrize("attack", ["l2-bisector", "linf-bisector", "l0-bisector", "pointwise-l0", "pointwise-l2"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda starts: starts[:2], "starting_points"), (lambda starts: starts.flatten(1), "starting_points"),
     (lambda starts: starts + 1, "starting_points: .* bounds")],
    ids=["too-few", "flat", "out-of-bounds"],
)  # fmt: skip
def test_bad_starting_points_raise(models, images, attack, spoil, message):
    model = models["prototype"]
    with pytest.raises(ValueError, match=message):
        ATTACKS[attack](model, images, classify(model, images), epsilons=None, starting_points=spoil(1 - images))


# Pointwise


def local_minimum(model, image, found, label):
    """Whether no changed pixel of ``found`` can be set back."""
    changed = (found != image).flatten().nonzero()[:, 0]
    candidates = found.flatten().repeat(len(changed), 1)
    candidates[torch.arange(len(changed)), changed] = image.flatten()[changed]
    return bool((classify(model, candidates.view(-1, *image.shape)) == label).all())


def test_pointwise_is_optimal_where_all_pixels_weigh_the_same(modules, models, digits):
    images = (digits.images[:8] > 0.5).float()
    lead = modules["linear"](images)[:, 1]
    raw, _, success = PointwiseAttack()(models["linear"], images, (lead > 0).long(), epsilons=None)
    assert success.all()
    # A changed pixel moves the lead by one; leads are whole numbers and a half.
    assert L0Distance()(images, raw).tolist() == lead.abs().ceil().tolist()


@pytest.mark.parametrize("name", ["cnn", "prototype"])
def test_pointwise_ends_in_a_local_minimum(models, images, cells, name):
    """From noise on the CNN; on ABS, which takes longer, from what the bisectors find."""
    labels = classify(models[name], images)
    starts = cells("l0-bisector", name).raw if name == "prototype" else None
    raw, _, success = PointwiseAttack()(models[name], images, labels, epsilons=None, starting_points=starts)
    assert success.all()
    for image, found, label in zip(images, raw, labels, strict=True):
        assert local_minimum(models[name], image, found, label)


def test_pointwise_l2_moves_on_from_the_l0_result(models, images):
    labels = classify(models["cnn"], images)
    l0, _, _ = PointwiseAttack()(models["cnn"], images, labels, epsilons=None)
    l2, _, _ = PointwiseAttack(norm="l2")(models["cnn"], images, labels, epsilons=None)
    assert (fb.distances.l2(images, l2) < fb.distances.l2(images, l0)).all()


def test_pointwise_starts_from_the_sparsest_of_several_draws(models, images):
    """Adversarial is what changed a sum of random weights by more than 2: some noise needs fewer values than others."""
    image = images[0].flatten().numpy()
    weights = np.random.default_rng(1).standard_normal(len(image))

    def start(draws, seed, budget=None, limit=2.0):
        search = _salt_and_pepper(image, models["cnn"], np.random.default_rng(seed), draws, budget)
        queries, candidate, found = 0, next(search), []
        while True:
            queries += 1
            hit = abs((candidate - image) @ weights) > limit
            found += [np.count_nonzero(candidate != image)] if hit else []
            try:
                candidate = search.send(hit)
            except StopIteration as end:
                result = end.value
                break
        changed = None if result is None else np.count_nonzero(result != image)
        assert changed == min(found, default=None)
        return changed, queries

    one, many = ([start(draws, seed) for seed in range(10)] for draws in (1, 20))
    assert all(few[0] <= first[0] for first, few in zip(one, many, strict=True))
    assert np.mean([few[0] for few in many]) < 0.5 * np.mean([first[0] for first in one])
    assert max(queries for _, queries in one) <= 10
    assert max(queries for _, queries in many) <= 10 + 19 * 5
    frugal = [start(20, seed, budget=12) for seed in range(10)]
    assert all(queries <= 16 for _, queries in frugal)
    assert all(few[0] <= some[0] for few, some in zip(many, frugal, strict=True))
    assert start(20, 0, limit=1e6) == (None, 5 * 6)
    assert start(3, 0, limit=1e6) == (None, 3 * 6)


def test_pointwise_results_change_with_the_seed(models, images):
    labels = classify(models["cnn"], images)
    first, second = (PointwiseAttack(seed=seed)(models["cnn"], images, labels, epsilons=None)[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_pointwise_restarts_are_never_worse(models, images):
    labels = classify(models["cnn"], images)
    sizes = []
    for restarts in (1, 2, 4):
        raw, _, _ = PointwiseAttack(restarts=restarts)(models["cnn"], images, labels, epsilons=None)
        sizes.append(L0Distance()(images, raw))
    assert (sizes[0] >= sizes[1]).all()
    assert (sizes[1] >= sizes[2]).all()
    assert (sizes[0] > sizes[2]).any()


def test_pointwise_goes_from_the_starting_points_towards_the_images(modules, models, images):
    """Changed pixels are changed pixels of the start, with its values."""
    lead = modules["linear"](images)[:, 1]
    towards = -modules["linear"].signs * lead.sign().view(-1, 1, 1, 1)
    starts = torch.where(torch.arange(28) < 14, (images + 0.4 * towards).clamp(0, 1), images)
    attack = PointwiseAttack()
    raw, _, success = attack(models["linear"], images, (lead > 0).long(), epsilons=None, starting_points=starts)
    assert success.all()
    changed = raw != images
    assert torch.equal(raw[changed], starts[changed])
    assert (changed.flatten(1).sum(1) < (starts != images).flatten(1).sum(1)).all()


def test_pointwise_starting_point_that_is_no_adversarial_fails_alone(models, images):
    labels = classify(models["linear"], images)
    starts, _, _ = PointwiseAttack()(models["linear"], images, labels, epsilons=None)
    starts[1] = images[1]
    attack = PointwiseAttack(restarts=2)
    raw, _, success = attack(models["linear"], images, labels, epsilons=None, starting_points=starts)
    assert success.tolist() == [True, False, True]
    assert torch.equal(raw[1], images[1])


class Fussy(MinimizationAttack):
    """Inverts images, and raises if it meets a certain one."""

    distance = fb.distances.l2

    def __init__(self, bad):
        self.bad = bad

    def run(self, model, inputs, criterion, *, early_stop=None, **kwargs):
        x, restore_type = ep.astensor_(inputs)
        assert not (x.raw == self.bad).flatten(1).all(1).any()
        return restore_type(1 - x)


@pytest.mark.parametrize("targeted", [False, True])
def test_pointwise_survives_an_init_attack_that_raises(models, images, targeted):
    model = models["linear"]
    labels = classify(model, images)
    reachable = classify(model, 1 - images) != labels
    assert reachable[[0, 2]].all()
    criterion = TargetedMisclassification(1 - labels) if targeted else labels
    raw, _, success = PointwiseAttack(init_attack=Fussy(images[1]))(model, images, criterion, epsilons=None)
    assert success.tolist() == [True, False, True]
    assert torch.equal(raw[1], images[1])
    changed = raw != images
    assert torch.equal(raw[changed], (1 - images)[changed])


@pytest.mark.parametrize("norm", ["l0", "l2"])
@pytest.mark.parametrize("max_queries", [1, 7, 40])
def test_pointwise_searches_with_max_queries(models, images, norm, max_queries):
    """Beside the search, each image is judged as it is and, by foolbox, at the end."""
    labels = classify(models["cnn"], images)
    counter = QueryCounter(models["cnn"], 3)
    attack = PointwiseAttack(norm=norm, max_queries=max_queries, restarts=3)
    attack(counter, images, labels, epsilons=None)
    assert counter.queries.tolist() == [max_queries + 1.0] * 3


def test_pointwise_on_a_numpy_model(modules, models, images):
    signs = modules["linear"].signs.numpy()

    def predict(x):
        lead = (x * signs).reshape(len(x), -1).sum(1) + 0.5
        return np.stack([np.zeros_like(lead), lead], axis=1)

    labels = classify(models["linear"], images).numpy()
    raw, _, success = PointwiseAttack()(fb.NumPyModel(predict, (0, 1)), images.numpy(), labels, epsilons=None)
    assert isinstance(raw, np.ndarray)
    assert isinstance(success, np.ndarray)
    assert success.all()
    assert (predict(raw).argmax(1) != labels).all()


# Counting queries


@pytest.fixture
def counted(modules, images):
    """A CNN, and how many images passed through it."""
    passed = []
    module = nn.Sequential(modules["cnn"])
    module.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    model = foolbox_model(module)
    labels = classify(model, images)
    passed.clear()
    return model, labels, passed


@pytest.mark.parametrize("transformed", [False, True])
def test_counter_counts_queries_and_gradients_of_foolbox_attacks(counted, images, transformed):
    model, labels, passed = counted
    counter = QueryCounter(model, 3)
    target, scaled = counter, images
    if transformed:
        target, scaled = counter.transform_bounds((-1, 1)), 2 * images - 1
    ddn(target, scaled, labels, steps=4)
    assert counter.queries.sum() == sum(passed)
    assert counter.queries.tolist() == [4 + 1] * 3
    assert counter.gradients.tolist() == [4] * 3


def test_counter_answers_as_its_model(counted, images):
    model, _, _ = counted
    counter = QueryCounter(model, 3)
    assert torch.equal(counter(images), model(images))
    assert counter.bounds == model.bounds
    assert counter.data_format == model.data_format
    assert isinstance(counter(ep.astensor(images)), ep.PyTorchTensor)


@pytest.mark.parametrize(("size", "share"), [(3, 1.0), (2, 2 / 3), (1, 1 / 3), (12, 4.0)])
def test_calls_about_unknown_images_are_shared_equally(counted, images, size, share):
    model, _, _ = counted
    counter = QueryCounter(model, 3)
    counter(images[:1].repeat(size, 1, 1, 1))
    assert counter.queries == pytest.approx([share] * 3)


def test_query_limit_is_kept_before_the_model_is_asked(counted, images):
    model, labels, passed = counted
    counter = QueryCounter(model, 3, max_queries=5)
    with pytest.raises(QueryLimitExceededError, match="more than 5 queries"):
        ddn(counter, images, labels, steps=10)
    assert sum(passed) == 5 * 3
    assert counter.queries.tolist() == [5.0] * 3


def test_gradient_limit(counted, images):
    model, labels, _ = counted
    counter = QueryCounter(model, 3, max_gradients=2)
    with pytest.raises(QueryLimitExceededError, match="more than 2 gradients"):
        ddn(counter, images, labels, steps=10)
    assert counter.gradients.tolist() == [2.0] * 3


def test_query_limit_of_one_image_ends_our_attacks(models, images):
    labels = classify(models["cnn"], images)
    counter = QueryCounter(models["cnn"], 3, max_queries=8)
    with pytest.raises(QueryLimitExceededError):
        PointwiseAttack()(counter, images, labels, epsilons=None)
    assert (counter.queries <= 8).all()


# Estimated gradients

SMALL = (1, 6, 6)


@pytest.fixture
def small_linear():
    return foolbox_model(Linear(SMALL, dtype=torch.float64))


def small_images(count=3):
    """In double precision, with pixels on both bounds."""
    x = torch.rand((count, *SMALL), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (1.5 * x - 0.25).clamp(0, 1)


def gradients(model, images, output=1):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, output].sum(), x)[0]


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def estimators(model, **kwargs):
    return [FiniteDifferenceModel(model, **kwargs), RandomDirectionModel(model, **kwargs)]


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.7])
def test_finite_differences_are_exact_on_linear_models(small_linear, epsilon):
    """Also at pixels on the bounds."""
    images = small_images()
    assert ((images == 0) | (images == 1)).any()
    estimated = gradients(FiniteDifferenceModel(small_linear, epsilon=epsilon, chunk=7), images)
    assert_close(estimated, Linear(SMALL, dtype=torch.float64).signs.expand_as(images))


def test_random_directions_converge_on_linear_models(small_linear):
    images, exact = small_images(), Linear(SMALL, dtype=torch.float64).signs.expand(3, *SMALL)
    few, many = (gradients(RandomDirectionModel(small_linear, directions=n), images) for n in (50, 5000))
    assert (cosine(few, exact) < 0.9).all()
    assert (cosine(many, exact) > 0.98).all()
    assert (cosine(many, exact) > cosine(few, exact)).all()


def test_finite_differences_on_a_cnn(models, images):
    exact = gradients(models["cnn"], images, output=4)
    estimated = gradients(FiniteDifferenceModel(models["cnn"]), images, output=4)
    assert (cosine(exact, estimated) > 0.99).all()
    assert_close(estimated.norm(), exact.norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("make", [FiniteDifferenceModel, RandomDirectionModel])
def test_estimates_do_not_depend_on_the_batch(small_linear, make):
    images = small_images()
    together, alone = gradients(make(small_linear), images), gradients(make(small_linear), images[1:2])
    assert_close(together[1:2], alone)


def test_random_directions_are_new_at_each_call_and_come_from_the_seed(small_linear):
    images = small_images()
    first, again, other = (RandomDirectionModel(small_linear, seed=seed) for seed in (0, 0, 1))
    one, two = gradients(first, images), gradients(first, images)
    assert not torch.equal(one, two)
    assert torch.equal(one, gradients(again, images))
    assert not torch.equal(one, gradients(other, images))


@pytest.mark.parametrize("make", [FiniteDifferenceModel, RandomDirectionModel])
def test_backward_passes_through_one_call_ask_once(small_linear, make):
    images = small_images()
    counter = QueryCounter(small_linear, 3)
    x = images.clone().requires_grad_()
    outputs = make(counter)(x)
    assert counter.queries.tolist() == [1.0] * 3
    asked = []
    for output, row in ((1, 0), (1, 1), (1, 0), (0, 0)):
        torch.autograd.grad(outputs[row, output], x, retain_graph=True)
        asked.append(counter.queries.tolist())
    if make is RandomDirectionModel:
        assert asked[0] == [1.0 + 2 * 64, 1.0, 1.0]
    assert asked[0][0] > 1.0
    assert asked[0][1:] == [1.0, 1.0]
    assert asked[1][0] == asked[0][0]
    assert asked[1][1] > 1.0
    assert asked[1] == asked[2] == asked[3]


def test_finite_differences_ask_at_most_twice_a_pixel(small_linear):
    images = small_images()
    counter = QueryCounter(small_linear, 3)
    gradients(FiniteDifferenceModel(counter), images)
    on_bounds = ((images == 0) | (images == 1)).flatten(1).sum(1)
    assert counter.queries.tolist() == (1 + 2 * 36 - on_bounds).tolist()


def test_finite_differences_of_a_known_image_cost_nothing(small_linear, monkeypatch):
    images = small_images()
    counter = QueryCounter(small_linear, 3)
    model = FiniteDifferenceModel(counter)
    first = gradients(model, images)
    asked = counter.queries.copy()
    assert torch.equal(gradients(model, images.flip(0)), first.flip(0))
    assert counter.queries.tolist() == (asked + 1).tolist()  # the forward pass
    attack = EpsilonSearchAttack(fb.attacks.L2FastGradientAttack(), [0.1, 0.2, 0.4, 100.0])
    counter, labels = QueryCounter(small_linear, 3), classify(small_linear, images)
    attack(FiniteDifferenceModel(counter), images, labels, epsilons=None)
    assert (counter.queries < 2 * asked).all()

    monkeypatch.setattr(_estimators, "_KEPT", 2)
    model = FiniteDifferenceModel(QueryCounter(small_linear, 3))
    gradients(model, images)
    assert len(model._known) == 2


def test_finite_differences_of_a_model_that_has_changed_are_new():
    linear = Linear(SMALL, dtype=torch.float64)
    model, images = FiniteDifferenceModel(foolbox_model(linear)), small_images()
    before = gradients(model, images)
    linear.signs.mul_(1.5)
    assert_close(gradients(model, images), 1.5 * before)


@pytest.mark.parametrize("make", [FiniteDifferenceModel, RandomDirectionModel])
def test_estimates_in_other_units(small_linear, make):
    images = small_images()
    transformed = make(small_linear).transform_bounds((-1, 1))
    assert_close(2.0 * gradients(transformed, 2.0 * images - 1.0), gradients(make(small_linear), images))


def test_ddn_on_estimated_gradients(models, images):
    model, images = models["linear"], images[:2]
    labels = classify(model, images)
    found = []
    for target in (model, FiniteDifferenceModel(model), RandomDirectionModel(model)):
        raw, _, success = ddn(target, images, labels, steps=40)
        assert success.all()
        found.append(fb.distances.l2(images, raw))
    exact, finite_differences, random_directions = found
    assert_close(finite_differences, exact, rtol=0.05, atol=0)
    assert (random_directions <= 2 * exact).all()


def test_deepfool_on_finite_differences(models, images):
    images = images[:2]
    labels = classify(models["cnn"], images)
    attack = fb.attacks.L2DeepFoolAttack(steps=8, candidates=3)
    raw, _, success = attack(FiniteDifferenceModel(models["cnn"]), images, labels, epsilons=None)
    exact, _, _ = attack(models["cnn"], images, labels, epsilons=None)
    assert success.all()
    assert_close(fb.distances.l2(images, raw), fb.distances.l2(images, exact), rtol=0.05, atol=0)


@pytest.mark.parametrize("row", [0, 1])
def test_estimators_answer_as_their_model(models, images, row):
    model = estimators(models["cnn"])[row]
    assert torch.equal(model(images), models["cnn"](images))
    assert torch.equal(model(images.clone().requires_grad_()), models["cnn"](images))
    assert isinstance(model(ep.astensor(images)), ep.PyTorchTensor)
    assert model.bounds == models["cnn"].bounds
    assert model.data_format == models["cnn"].data_format
    with pytest.raises(ValueError, match="PyTorch"):
        model(images.numpy())


# Distal adversarials


@pytest.fixture(scope="module")
def noise():
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_distal_adversarials_of_a_cnn(models, noise):
    before = models["cnn"](noise).softmax(1).amax(1)
    assert (before < 0.9).any()
    found, same, success = DistalAttack()(models["cnn"], noise)
    assert success.all()
    assert torch.equal(found, same)
    assert (models["cnn"](found).softmax(1).amax(1) >= 0.9).all()
    assert torch.equal(classify(models["cnn"], found), classify(models["cnn"], noise))
    assert found.min() >= 0.0
    assert found.max() <= 1.0


@pytest.mark.parametrize("transformed", [False, True])
def test_distal_adversarials_of_a_target(models, noise, transformed):
    targets = torch.tensor([3, 1, 4, 1])
    model, lower, width = (models["cnn"].transform_bounds((-1, 1)), -1.0, 2.0) if transformed else (models["cnn"], 0, 1)
    found, _, success = DistalAttack()(model, width * noise + lower, TargetedMisclassification(targets))
    assert success.all()
    confidence = model(found).softmax(1)
    assert (confidence[torch.arange(4), targets] >= 0.9).all()
    assert found.min() >= model.bounds.lower
    assert found.max() <= model.bounds.upper


@pytest.mark.parametrize("name", ["prototype", "binary"])
def test_distal_confidence_of_abs_is_its_own(modules, models, noise, name):
    targets = torch.tensor([3, 1, 4, 1])
    assert (modules[name].predict_proba(noise) < 0.11).all()
    attack = DistalAttack(steps=60, stepsize=1.0)
    found, _, success = attack(models[name], noise, TargetedMisclassification(targets))
    reached = modules[name].predict_proba(found)[torch.arange(4), targets]
    assert torch.equal(success, reached >= 0.9)
    assert success.sum() >= 2
    assert found.min() >= 0.0
    assert found.max() <= 1.0


def test_distal_gives_up_after_its_steps(modules, models, noise):
    found, _, success = DistalAttack(steps=2)(models["prototype"], noise)
    assert not success.any()
    assert (modules["prototype"].predict_proba(found) < 0.9).all()


def test_distal_images_that_are_sure_already_come_back_as_they_are(modules, models, digits):
    images = digits.images[:3]
    sure = modules["prototype"].predict_proba(images).amax(1) >= 0.5
    assert sure.any()
    found, _, success = DistalAttack(confidence=0.5, steps=1)(models["prototype"], images)
    assert success[sure].all()
    assert torch.equal(found[sure], images[sure])


def test_distal_empty_batch(models, noise):
    found, _, success = DistalAttack()(models["cnn"], noise[:0])
    assert found.shape == (0, 1, 28, 28)
    assert success.shape == (0,)


def test_distal_results_have_the_type_of_the_inputs(models, noise):
    found, _, success = DistalAttack(steps=1)(models["cnn"], ep.astensor(noise))
    assert isinstance(found, ep.PyTorchTensor)
    assert isinstance(success, ep.PyTorchTensor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda attack, model, x: attack(model, x, epsilons=1.0), "epsilons: expected None"),
        (lambda attack, model, x: attack(model, x.numpy()), "inputs: expected a PyTorch tensor"),
        (lambda attack, model, x: attack(model, 2 * x), "bounds"),
        (lambda attack, model, x: attack(model, x * torch.nan), "bounds"),
        (lambda attack, model, x: attack(model, x, Misclassification(torch.zeros(4))), "TargetedMisclassification"),
        (lambda attack, model, x: attack(model, x, torch.zeros(4)), "TargetedMisclassification"),
        (lambda attack, model, x: attack(model, x, TargetedMisclassification(torch.zeros(3))), r"shape \(4,\)"),
        (lambda attack, model, x: attack(model, x, TargetedMisclassification(torch.full((4,), 10))), "classes 0 to 9"),
        (lambda attack, model, x: attack.repeat(0), "times: expected at least 1, got 0"),
    ],
)
def test_distal_errors(models, noise, call, message):
    with pytest.raises(ValueError, match=message):
        call(DistalAttack(), models["cnn"], noise)


def test_distal_needs_gradients(random_weights, noise):
    model = foolbox_model(ABS(random_weights(2), prototypes=5, steps=0, gradient="none"))
    with pytest.raises(ValueError, match="expected one with gradients"):
        DistalAttack()(model, noise)


# Names in foolbox

NAMES = ("DistalAttack", "L0BisectorAttack", "L2BisectorAttack", "LInfBisectorAttack", "LatentDescentAttack")


@pytest.fixture
def attacks_of_foolbox(monkeypatch):
    """``foolbox.attacks`` without ours; restored afterwards."""
    for name in NAMES:
        monkeypatch.setattr(fb.attacks, name, None, raising=False)
        delattr(fb.attacks, name)
    monkeypatch.setattr(fb.attacks, "PointwiseAttack", fb.attacks.pointwise.PointwiseAttack)
    return fb.attacks


def test_register_may_be_called_again(attacks_of_foolbox):
    assert sorted(register()) == sorted(NAMES)
    assert register() == register()
    assert attacks_of_foolbox.LatentDescentAttack is LatentDescentAttack
    assert attacks_of_foolbox.PointwiseAttack is fb.attacks.pointwise.PointwiseAttack


def test_register_replaces_attacks_of_foolbox_only_on_request(attacks_of_foolbox):
    assert sorted(register(overwrite=True)) == sorted((*NAMES, "PointwiseAttack"))
    assert attacks_of_foolbox.PointwiseAttack is PointwiseAttack
    assert "PointwiseAttack" in register()


# L0


def test_l0_clipping_keeps_the_largest_changes():
    images = torch.full((2, 1, 2, 2), 0.5)
    perturbed = images + torch.tensor([[0.1, -0.4, 0.0, 0.3], [0.2, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    clipped = L0Distance().clip_perturbation(images, perturbed, 2)
    assert_close((clipped - images).flatten(1), torch.tensor([[0.0, -0.4, 0.0, 0.3], [0.2, 0.0, 0.0, 0.0]]))
    assert torch.equal(L0Distance().clip_perturbation(images, perturbed, 2.9), clipped)
    assert torch.equal(L0Distance().clip_perturbation(images, perturbed, 0), images)
    assert torch.equal(L0Distance().clip_perturbation(images, perturbed, 100), perturbed)
    assert L0Distance()(images, perturbed).tolist() == [3.0, 1.0]


def test_l0_epsilons_between_the_sizes_of_the_results(modules, models, digits):
    images = (digits.images[:6] > 0.5).float()
    lead = modules["linear"](images)[:, 1]
    sizes = lead.abs().ceil()
    epsilons = sorted(set(sizes.tolist()))
    assert len(epsilons) > 2
    attack = PointwiseAttack()
    _, clipped, success = attack(models["linear"], images, (lead > 0).long(), epsilons=epsilons)
    for epsilon, changed, flags in zip(epsilons, clipped, success, strict=True):
        assert torch.equal(flags, sizes <= epsilon)
        assert (L0Distance()(images, changed) <= epsilon).all()


# Listening


@pytest.mark.parametrize("name", ABS_MODELS)
def test_listeners_hear_what_infer_finds(modules, images, name):
    expected = modules[name].infer(images)
    with listen() as heard:
        modules[name](images)
    (observation,) = heard
    assert torch.equal(observation.inference.energy, expected.energy)
    assert torch.equal(observation.inference.reconstructions, expected.reconstructions)
    assert torch.equal(observation.images, images)
    assert observation.threshold == (0.5 if name == "binary" else None)
    assert observation.eta == float(modules[name].eta)
    assert torch.equal(observation.gamma, getattr(modules[name], "gamma", torch.ones(10)))


def test_nested_listeners_both_hear(modules, images):
    with listen() as outer:
        modules["prototype"](images[:1])
        with listen() as inner:
            modules["prototype"](images[:2])
        modules["prototype"](images)
    assert [len(o.images) for o in outer] == [1, 2, 3]
    assert [len(o.images) for o in inner] == [2]


def test_nothing_is_heard_or_made_afterwards(modules, images):
    with pytest.raises(KeyError), listen() as heard:
        raise KeyError
    modules["prototype"](images)
    assert heard == []
    publish(lambda: pytest.fail("an observation was made for nobody"))


def test_gradients_flow_while_somebody_listens(modules, images):
    expected = gradients(modules["prototype"], images)
    with listen():
        assert torch.equal(gradients(modules["prototype"], images), expected)


@pytest.mark.parametrize(
    "attack",
    [
        L2BisectorAttack(steps=3),
        LInfBisectorAttack(steps=3),
        LatentDescentAttack(),
        PointwiseAttack(max_queries=20),
        EpsilonSearchAttack(fb.attacks.FGSM(), [0.1]),
    ],
    ids=lambda attack: type(attack).__name__,
)
@pytest.mark.parametrize("wrong", [12, -1])
def test_classes_that_the_model_does_not_have(digits, attack, wrong):
    model = foolbox_model(ABS(prototypes=200, steps=0))
    labels = torch.tensor([int(digits.labels[0]), wrong])
    for criterion in (labels, TargetedMisclassification(labels)):
        with pytest.raises(ValueError, match="expected classes 0 to 9"):
            attack(model, digits.images[:2], criterion, epsilons=None)


@pytest.mark.parametrize(
    "attack",
    [PointwiseAttack(max_queries=200), PointwiseAttack(norm="l2", max_queries=200), L2BisectorAttack(steps=3),
     LInfBisectorAttack(steps=3), L0BisectorAttack(steps=3), LatentDescentAttack()],
)  # fmt: skip
def test_infinite_epsilons(digits, attack):
    model = foolbox_model(ABS(prototypes=200, steps=0))
    images = digits.images[:2]
    _, _, success = attack(model, images, model(images).argmax(1), epsilons=[float("inf")])
    assert success.all()


@pytest.mark.parametrize("attack_class", [L2BisectorAttack, LInfBisectorAttack, L0BisectorAttack, LatentDescentAttack])
def test_pixels_that_the_model_does_not_see(digits, attack_class):
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = BinaryABS(prototypes=200, steps=0)

        def forward(self, x):
            mask = torch.ones_like(x)
            mask[:, :, :3] = 0
            return self.model(x * mask)

    model = foolbox_model(Masked())
    images = digits.images[1:3]
    raw, _, success = attack_class()(model, images, model(images).argmax(1), epsilons=None)
    assert success.all()
    assert torch.equal(raw[:, :, :3], images[:, :, :3])


def test_bisector_when_inference_finds_less_than_before(digits):
    """With two steps the model may miss a point that it found for an earlier candidate."""
    model = foolbox_model(ABS(prototypes=200, steps=2))
    images = digits.images[[2, 4]]
    _, _, success = L2BisectorAttack(rivals=1)(model, images, model(images).argmax(1), epsilons=None)
    assert success.all()


def test_criteria_with_state_of_their_own_are_kept(digits):
    class Except(Misclassification):
        def __init__(self, labels, spared):
            super().__init__(labels)
            self.spared = spared

        def __call__(self, perturbed, outputs):
            return super().__call__(perturbed, outputs).logical_and(ep.astensor(~self.spared))

    model = foolbox_model(ABS(prototypes=200, steps=0))
    images = digits.images[[1, 3]]
    criterion = Except(model(images).argmax(1), torch.tensor([True, False]))
    for attack in (PointwiseAttack(max_queries=200), L2BisectorAttack(steps=5)):
        _, _, success = attack(model, images, criterion, epsilons=None)
        assert success.tolist() == [False, True]


def test_queries_of_an_estimator_inside_a_distal_attack_are_counted_for_their_image(digits):
    counter = QueryCounter(foolbox_model(ABS(prototypes=500, steps=0)), 2)
    images = torch.stack([digits.images[1], torch.full((1, 28, 28), 0.5)])
    estimated = RandomDirectionModel(counter, directions=4)
    DistalAttack(confidence=0.3, steps=3)(estimated, images, epsilons=None)
    assert counter.queries[0] < counter.queries[1]


# Attacks that run other attacks


def test_epsilon_search_ends_at_the_boundary(models, images):
    model = models["cnn"]
    attack = EpsilonSearchAttack(fb.attacks.L2FastGradientAttack(), (0.05, 0.2, 0.8, 3.2, 12.8))
    raw, _, success = attack(model, images, classify(model, images), epsilons=None)
    assert success.all()
    first = halfway(attack, model, images, raw)
    assert (lengths(attack, images, raw) <= 1.01 * lengths(attack, images, first)).all()


def halfway(attack, model, images, raw):
    """The first adversarial on the line to the found one, by a fine scan."""
    labels, result = classify(model, images), raw.clone()
    for fraction in np.linspace(1.0, 0.0, 400):
        along = torch.lerp(images, raw, float(fraction))
        still = classify(model, along) != labels
        result[still] = along[still]
    return result


def test_epsilon_search_asks_only_about_unfinished_images(models, images):
    counter = QueryCounter(models["cnn"], 3)
    labels = classify(models["cnn"], images)
    labels[1] = (labels[1] + 1) % 10
    attack = EpsilonSearchAttack(fb.attacks.L2FastGradientAttack(), (0.01, 12.8), binary_search_steps=3)
    raw, _, success = attack(counter, images, labels, epsilons=None)
    assert success.all()
    assert torch.equal(raw[1], images[1])
    assert counter.queries[1] < counter.queries[0]


def test_transfer_needs_no_gradient_of_the_model(models, images):
    counter = QueryCounter(models["abs"], 3)
    labels = classify(models["abs"], images)
    crafted_on = EpsilonSearchAttack(
        fb.attacks.L2BasicIterativeAttack(steps=5), (2.0, 4.0, 8.0), surrogate=models["prototype"]
    )
    raw, _, success = crafted_on(counter, images, labels, epsilons=None)
    assert (counter.gradients == 0).all()
    assert success.any()
    assert torch.equal(success, classify(models["abs"], raw) != labels)


@pytest.mark.parametrize("epsilons", [(), (1.0, 0.0), (-1.0,), 1.0, [None], np.zeros(2)])
def test_epsilons_to_search_must_be_positive(epsilons):
    with pytest.raises(ValueError, match="epsilons: expected positive numbers"):
        EpsilonSearchAttack(fb.attacks.L2FastGradientAttack(), epsilons)


@pytest.mark.parametrize("epsilons", [np.linspace(0.1, 0.3, 3), torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)])
def test_epsilons_to_search_of_any_kind(epsilons):
    attack = EpsilonSearchAttack(fb.attacks.L2FastGradientAttack(), epsilons)
    assert attack.epsilons == pytest.approx((0.1, 0.2, 0.3))


def test_epsilons_to_search_are_for_attacks_that_have_one():
    with pytest.raises(ValueError, match="attack: expected one of a fixed epsilon, got DDNAttack"):
        EpsilonSearchAttack(fb.attacks.DDNAttack(), (0.1,))


def test_started_attacks_find_their_own_starts(models, images):
    attack = StartedAttack(fb.attacks.BoundaryAttack(steps=1))
    with pytest.raises(ValueError, match="starting_points: BoundaryAttack itself takes them"):
        attack(models["cnn"], images, classify(models["cnn"], images), epsilons=None, starting_points=1 - images)


@pytest.mark.parametrize("epsilon", [-1, float("nan")])
def test_l0_epsilons_are_numbers_of_values(images, epsilon):
    with pytest.raises(ValueError, match="epsilon: expected a number of values to change, at least 0"):
        L0Distance().clip_perturbation(images, 1 - images, epsilon)


@pytest.mark.parametrize("bounds", [(0, 1), (-1, 3)])
def test_snapped_images_look_the_same_to_a_binary_model(modules, images, bounds):
    lower, upper = bounds
    model = fb.PyTorchModel(modules["binary"], bounds=(0, 1)).transform_bounds(bounds)
    x = lower + (upper - lower) * images
    threshold = lower + (upper - lower) * modules["binary"].binary_threshold
    labels = classify(model, x)
    attack = EpsilonSearchAttack(fb.attacks.LinfBasicIterativeAttack(steps=5, rel_stepsize=0.4), (0.4, 1.2, 2.4))
    found, _, success = attack(model, x, labels, epsilons=None)
    snapped = snap_to_threshold(x, found, threshold=threshold, margin=1e-3 * (upper - lower))
    assert success.any()
    assert torch.equal(classify(model, snapped), classify(model, found))
    same = (found > threshold) == (x > threshold)
    assert torch.equal(snapped[same], x[same])
    assert ((snapped - threshold).abs()[~same] <= 1.01e-3 * (upper - lower)).all()
    for distance in (L0Distance(), fb.distances.l1, fb.distances.l2, fb.distances.linf):
        before, after = distance(x[success], found[success]), distance(x[success], snapped[success])
        assert (after <= before).all()
        assert (after < before).any()
    again = snap_to_threshold(x.numpy(), snapped.numpy(), threshold=threshold, margin=1e-3 * (upper - lower))
    np.testing.assert_array_equal(again, snapped.numpy())


def test_snapping_on_the_threshold():
    """A pixel of exactly the threshold is dark; one that stopped within the margin stays there."""
    images = np.array([0.5, 0.5, 0.9, 0.9, 0.1])
    perturbed = np.array([0.3, 0.8, 0.5, 0.4999, 0.5005])
    snapped = snap_to_threshold(images, perturbed)
    np.testing.assert_array_equal(snapped, [0.5, 0.501, 0.5, 0.4999, 0.5005])


def test_snapping_refuses_what_does_not_fit(images):
    with pytest.raises(ValueError, match="margin: expected a positive number, got 0"):
        snap_to_threshold(images, images, margin=0)
    with pytest.raises(ValueError, match=r"perturbed: expected the shape of the images, \(3, 1, 28, 28\), got \(2,"):
        snap_to_threshold(images, images[:2])


@pytest.mark.touches_random_state
@pytest.mark.parametrize(
    "attack", [fb.attacks.BoundaryAttack(steps=30), fb.attacks.HopSkipJumpAttack(steps=2)], ids=repr
)
def test_one_image_without_a_start_fails_alone(models, images, attack):
    class Others(fb.attacks.DDNAttack):
        """The next image of the batch, which is of another class; none for the second."""

        def run(self, model, inputs, criterion, **kwargs):
            return torch.stack([inputs.raw[1], inputs.raw[1], inputs.raw[0]])

    model = models["prototype"]
    labels = classify(model, images)
    assert len(labels.unique()) == 3
    raw, _, success = StartedAttack(attack, Others())(model, images, labels, epsilons=None)
    assert success.tolist() == [True, False, True]
    assert torch.equal(success, classify(model, raw) != labels)
    assert torch.equal(raw[1], images[1])
    distances = lengths(attack, images, raw)
    assert distances[0] < lengths(attack, images[:1], images[1:2])[0]
