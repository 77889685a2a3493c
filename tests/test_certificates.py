"""Certified radii: nothing below them changes the class. Brute force, general solvers, real digits and attacks."""

import itertools
import math
from typing import NamedTuple

import foolbox as fb
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.testing import assert_close

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import L0BisectorAttack, L2BisectorAttack, LInfBisectorAttack, PointwiseAttack
from abs_defense.certificates import METHODS, NORM_NAMES, certify
from abs_defense.certificates._exact import ExactSearch, solve_quadratic_program
from abs_defense.certificates._finite import FiniteSearch
from abs_defense.certificates._lipschitz import lipschitz_radius, paper_radius
from abs_defense.certificates._points import PointSet
from abs_defense.certificates._reach import Scene
from abs_defense.inference import DecoderStack
from abs_defense.models import Calibration, Weights, load_weights

ROUNDING = 1e-9
GRID_STEPS = {2: 81, 3: 25, 4: 11, 5: 6}
SEEDS = range(12)
SCENES = [pytest.param(threshold, id="grey" if threshold is None else "binary") for threshold in (None, 0.5)]
# What the proofs give away for the rounding of the model, in energy; see PointSet.slack.
SLACK = 0.1

# Tiny point sets --------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    points: PointSet
    image: torch.Tensor  # (D,)
    label: int


def point_set(images, offsets, gamma=None, slack=0.0):
    images, offsets = torch.as_tensor(images), torch.as_tensor(offsets, dtype=torch.float64)
    gamma = torch.ones(len(images)) if gamma is None else torch.as_tensor(gamma)
    squares = images.double().square().sum(-1)
    return PointSet(images, offsets, gamma.double(), squares, torch.full((len(images),), slack, dtype=torch.float64))


def energies(points, seen):
    """E_c at what the VAEs see, ``(n, D) -> (n, C)``, plainly."""
    distances = (seen[:, None, None].double() - points.images.double()).square().sum(-1)
    return points.gamma * (distances + points.offsets).amin(-1)


def seen_by(image, threshold):
    return image if threshold is None else (image > threshold).double()


def random_problem(seed, dims, *, classes=None, count=None, threshold=None, gamma=None):
    """Everything anywhere, or for odd seeds classes of dark and bright pixels, the first two each other's negative, and
    an image like the first one. Its label is the class of lowest energy."""
    rng = np.random.default_rng([seed, dims])
    classes = classes or int(rng.integers(2, 4))
    count = count or int(rng.integers(1, 5))
    images, image = rng.random((classes, count, dims)), rng.random(dims)
    if seed % 2:
        centres = rng.random((classes, 1, dims)).round()
        centres[1] = 1.0 - centres[0]
        images, image = abs(centres - 0.1 * images), abs(centres[0, 0] - 0.1 * image)
    points = point_set(torch.from_numpy(images), 0.2 * rng.random((classes, count)), gamma)
    image = torch.from_numpy(image)
    label = int(energies(points, seen_by(image, threshold)[None])[0].argmin())
    return Problem(points, image, label)


def search_of(problem, norm, *, threshold=None, anchors=20):
    return FiniteSearch(problem.points, Scene(problem.image[None], norm, threshold), problem.label, anchors)


def bisector_radius(problem, norm, **kwargs):
    return search_of(problem, norm, **kwargs).bisector(0).radius


def exact(problem, *, anchors=20):
    return ExactSearch(search_of(problem, "l2", anchors=anchors), 0).run()


def lost(problem, seen):
    """Where another class has at most the energy of the true one, ``(n,)``."""
    found = energies(problem.points, seen)
    own = found[:, problem.label].clone()
    found[:, problem.label] = torch.inf
    return found.amin(1) <= own


def size_of(change, norm):
    """Norms ``(n,)``; for L0 how many pixels may change without harm if so many do harm."""
    if norm == "l0":
        return (change != 0).sum(1).double() - 1.0
    return change.norm(dim=1) if norm == "l2" else change.abs().amax(1)


def grid_radius(problem, norm):
    """At least the true one, because only a grid is looked at, with the image's own values in it."""
    axes = [sorted({*np.linspace(0.0, 1.0, GRID_STEPS[len(problem.image)]), v}) for v in problem.image.tolist()]
    images = torch.tensor(np.stack(np.meshgrid(*axes), -1).reshape(-1, len(axes)))
    bad = images[lost(problem, images)]
    return float(size_of(bad - problem.image, norm).min()) if len(bad) else math.inf


def flip_radius(problem, norm):
    """The true one for a model that sees the image binarised at 0.5: all images it can see."""
    seen = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(problem.image))), dtype=torch.float64)
    flipped = (seen[lost(problem, seen)] != seen_by(problem.image, 0.5)).double()
    if norm != "l0":
        flipped *= (problem.image - 0.5).abs()
    return float(size_of(flipped, norm).min()) if len(flipped) else math.inf


def plain_radius(problem, norm, *, anchors=None):
    """``min_b max_a (E_b - E_a) / (2 ||p_b - p_a||_q)``, without the box."""
    points, label = problem.points, problem.label
    values = (points.images.double() - problem.image).square().sum(-1) + points.offsets
    own = values[label].argsort()[:anchors]
    radii = []
    for c, b in itertools.product(range(len(values)), range(values.shape[1])):
        if c != label:
            ways = (points.images[c, b].double() - points.images[label, own].double()).norm(
                p=2 if norm == "l2" else 1, dim=1
            )
            lead = (values[c, b] - values[label, own]).clamp_min(0.0)
            radii.append(float(torch.where(lead > 0, lead / (2.0 * ways), 0.0).amax()))
    return min(radii)


def only_pair_radius(problem, norm):
    """The closed form for a point against a point: the level t that the pixels must be filled to."""
    points, image = problem.points, problem.image
    way = points.images[1 - problem.label, 0] - points.images[problem.label, 0]
    found = energies(points, image[None])[0]
    lacking = float(found[1 - problem.label] - found[problem.label]) / 2.0
    speed, room = way.abs().numpy(), torch.where(way > 0, 1.0 - image, image).numpy()
    if norm == "l0":
        gains = np.cumsum(np.sort(speed * room)[::-1])
        return math.inf if gains[-1] < lacking else float((gains < lacking).sum())
    if speed @ room < lacking:
        return math.inf

    def filled(t):
        return np.minimum(t * speed if norm == "l2" else t, room)

    highest = 1.0 if norm == "linf" else float((room[speed > 0] / speed[speed > 0]).max())
    level = scipy.optimize.brentq(lambda t: speed @ filled(t) - lacking, 0.0, highest * (1.0 + 1e-9), xtol=1e-15)
    return float(np.linalg.norm(filled(level))) if norm == "l2" else level


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_bisector_is_never_above_the_true_distance(norm, dims):
    positive = tight = 0
    for seed in SEEDS:
        problem = random_problem(seed, dims)
        radius, truth = bisector_radius(problem, norm), grid_radius(problem, norm)
        assert 0.0 <= radius <= truth + ROUNDING
        positive += radius > 0
        tight += truth - radius < 0.1
    assert positive >= (10 if norm != "l0" else 0 if dims == 2 else 3)
    assert tight >= 3


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_exact_is_the_true_distance(dims):
    reached = 0
    for seed in SEEDS:
        problem = random_problem(seed, dims)
        found = exact(problem)
        assert bisector_radius(problem, "l2") <= found.radius + ROUNDING
        assert found.radius <= grid_radius(problem, "l2") + ROUNDING
        if math.isinf(found.radius):
            assert found.adversarial is None
            continue
        reached += 1
        image = found.adversarial
        assert found.radius - ROUNDING <= float((image - problem.image).norm()) <= found.radius + 1e-3
        assert 0.0 <= float(image.min()) <= float(image.max()) <= 1.0
        at_image = energies(problem.points, image[None])[0]
        assert lost(problem, image[None]).all()
        assert int(at_image.argmin()) == found.rival != problem.label
        point = problem.points.batch(torch.tensor([found.rival]), torch.tensor([found.index]), image[None])
        assert_close(point.energies[0], at_image.amin())
    assert reached >= 8


def test_exact_can_be_above_the_bisector_bound():
    problems = [random_problem(seed, 3, classes=2, count=4) for seed in range(40)]
    assert any(bisector_radius(problem, "l2") + 0.01 < exact(problem).radius < math.inf for problem in problems)


@pytest.mark.parametrize("anchors", [1, 2, 20])
def test_exact_does_not_depend_on_the_first_anchors(anchors):
    for seed in range(6):
        problem = random_problem(seed, 4, classes=3, count=4)
        assert exact(problem, anchors=anchors).radius == pytest.approx(exact(problem).radius, abs=1e-6)


def test_exact_equals_the_quadratic_programs_of_a_general_solver():
    compared = 0
    for seed in SEEDS:
        problem = random_problem(seed, 4, classes=3, count=4)
        points, image, label = problem
        offsets, best = points.offsets, math.inf
        for c, b in itertools.product(range(3), range(4)):
            if c != label:
                ways = (points.images[c, b] - points.images[label]).numpy()
                held = (points.images[label] - image).square().sum(1) + offsets[label]
                energy = (points.images[c, b] - image).square().sum() + offsets[c, b]
                solution = general_solver(ways, 0.5 * (energy - held).numpy(), image.numpy())
                if solution.success:
                    best = min(best, math.sqrt(max(solution.fun, 0.0)))
        if math.isfinite(best):
            compared += 1
            assert exact(problem).radius == pytest.approx(best, abs=1e-5)
    assert compared >= 8


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_point_against_point_is_tight(norm, dims):
    finite = 0
    for seed in range(30):
        problem = random_problem(seed, dims, classes=2, count=1)
        radius, truth = bisector_radius(problem, norm), only_pair_radius(problem, norm)
        assert radius == pytest.approx(truth, abs=1e-8)
        assert radius <= grid_radius(problem, norm) + ROUNDING
        if norm == "l2":
            assert exact(problem).radius == pytest.approx(truth, abs=1e-6)
        finite += math.isfinite(truth)
    assert finite >= 15


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_reach_tells_an_image_where_the_attacker_is_level(norm):
    """L0 moves whole pixels, so there it may get ahead."""
    reached = 0
    for seed in range(20):
        problem = random_problem(seed, 3, classes=2, count=1)
        points, image, label = problem
        own, other = (points.batch(torch.tensor([c]), torch.tensor([0]), image[None]) for c in (label, 1 - label))
        radius, target = Scene(image[None], norm, None).reach(other, own)
        if not radius.isfinite():
            continue
        reached += 1
        assert_close(size_of(target - image, norm), radius)
        assert -ROUNDING <= float(target.min()) <= float(target.max()) <= 1.0 + ROUNDING
        at_target = energies(points, target)[0]
        assert float(at_target[1 - label] - at_target[label]) <= 1e-8
    assert reached >= 10


def test_lipschitz_and_paper_are_never_above_exact():
    positive = 0
    for seed in range(30):
        problem = random_problem(seed, 3)
        points, image, label = problem
        labels, slack = torch.tensor([label]), torch.zeros(1, dtype=torch.float64)
        found, index = points.nearest(image[None])
        assert_close(found, energies(points, image[None]))
        own = (found[0, label] - points.offsets[label, index[0, label]]).sqrt()[None]
        distances = points.nearest(image[None], offsets=False)[0].sqrt()
        limits = [lipschitz_radius(found, labels, slack), paper_radius(distances, found[0, label], own, labels, slack)]
        bound = plain_radius(problem, "l2", anchors=1)
        for radius, rival in limits:
            assert 0.0 <= float(radius) <= bound + ROUNDING <= exact(problem).radius + 2 * ROUNDING
            assert int(rival) != label
            positive += float(radius) > 0
    assert positive >= 30


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("threshold", SCENES)
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_shortlists_do_not_change_the_result(norm, threshold, count, monkeypatch):
    """Many points a class, of which the search looks at a few; against all of them."""
    for seed in range(2):
        problem = random_problem(seed, 6, classes=3, count=300, threshold=threshold)
        monkeypatch.setattr("abs_defense.certificates._finite._FIRST_SHORTLIST", count)
        found = search_of(problem, norm, threshold=threshold)
        short, short_exact = found.bisector(0), ExactSearch(found, 0).run() if threshold is None else None
        monkeypatch.setattr("abs_defense.certificates._finite._FIRST_SHORTLIST", 10_000)
        full = search_of(problem, norm, threshold=threshold)
        candidates, anchors = full.candidates(0, 600), full.anchors(0)
        assert len(candidates.bounds) == 600
        radii, _ = full.refine(0, candidates, slice(0, 600), anchors, every=True)
        assert short.radius == pytest.approx(float(radii.min()), abs=ROUNDING)
        if short_exact is not None and norm == "l2":
            assert short_exact.radius == pytest.approx(ExactSearch(full, 0).run().radius, abs=1e-6)
            assert short.radius <= short_exact.radius + ROUNDING


@pytest.mark.parametrize("threshold", SCENES)
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_places_that_hold_no_point_change_nothing(norm, threshold):
    for seed in range(6):
        problem = random_problem(seed, 4, classes=3, count=3, threshold=threshold)
        points = problem.points
        padding = torch.full((3, 2, 4), 0.5, dtype=torch.float64)
        nothing = torch.full((3, 2), torch.inf, dtype=torch.float64)
        padded = problem._replace(
            points=point_set(torch.cat([points.images, padding], 1), torch.cat([points.offsets, nothing], 1))
        )
        radius = bisector_radius(problem, norm, threshold=threshold)
        assert bisector_radius(padded, norm, threshold=threshold) == pytest.approx(radius, abs=ROUNDING)
        if norm == "l2" and threshold is None:
            assert exact(padded).radius == pytest.approx(exact(problem).radius, abs=1e-9)


# Binary scenes ----------------------------------------------------------------------------------------------------


def random_gamma(seed, classes=3):
    return np.random.default_rng([seed, 99]).uniform(0.7, 1.3, classes)


@pytest.mark.parametrize("dims", [3, 6, 8])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_binary_bisector_is_never_above_the_true_distance(norm, dims):
    positive = tight = 0
    for seed in range(20):
        problem = random_problem(seed, dims, classes=3, threshold=0.5, gamma=random_gamma(seed))
        radius, truth = bisector_radius(problem, norm, threshold=0.5), flip_radius(problem, norm)
        assert 0.0 <= radius <= truth + ROUNDING
        positive += radius > 0
        tight += math.isfinite(truth) and truth - radius < 0.1
    assert positive >= (1 if dims == 3 else 3)
    assert tight >= 3


@pytest.mark.parametrize("dims", [3, 6, 8])
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_binary_point_against_point(norm, dims):
    """Tight, up to fractions of flips in L2."""
    finite = 0
    for seed in range(40):
        problem = random_problem(seed, dims, classes=2, count=1, threshold=0.5, gamma=random_gamma(seed, 2))
        radius, truth = bisector_radius(problem, norm, threshold=0.5), flip_radius(problem, norm)
        if norm == "l2":
            assert radius <= truth + ROUNDING
            assert math.isinf(radius) == math.isinf(truth)
        else:
            assert radius == pytest.approx(truth, abs=ROUNDING)
        finite += math.isfinite(truth)
    assert finite >= 10


def test_images_on_the_threshold_are_dark_and_flip_at_no_distance():
    points = point_set([[[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]], [[0.0], [0.0]])
    for image, radii in {(0.5, 0.5, 0.5): (0.0, 0.0, 1.0), (0.5, 0.5, 0.1): (0.0, 0.0, 1.0)}.items():
        problem = Problem(points, torch.tensor(image, dtype=torch.float64), 0)
        for norm, radius in zip(("l2", "linf", "l0"), radii, strict=True):
            assert bisector_radius(problem, norm, threshold=0.5) == pytest.approx(radius)
            assert flip_radius(problem, norm) == pytest.approx(radius)


# Edge cases -------------------------------------------------------------------------------------------------------

# Multiples of 2^-16, whose energies have no rounding error: a tie is a tie here and in the proof.
pixel = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**16).map(lambda n: n / 2**16))


@st.composite
def edge_problems(draw, dtype=np.float64, max_dims=5, low=0.0, high=1.0, pixel=pixel):
    """Images at the box's edges, points that coincide, ties, pixels that are all equal. Labels at times wrong."""
    classes, count, dims = draw(st.integers(2, 3)), draw(st.integers(1, 4)), draw(st.integers(1, max_dims))
    value = pixel.map(lambda v: low + (high - low) * v)
    images = draw(hnp.arrays(dtype, (classes, count, dims), elements=value, fill=st.sampled_from([low, high])))
    offsets = draw(hnp.arrays(np.float64, (classes, count), elements=pixel, fill=st.just(0.0)))
    if draw(st.booleans()):
        images[-1] = images[0]  # every point twice
    if draw(st.booleans()):
        offsets[:] = offsets[0, 0]
    image = draw(hnp.arrays(np.float64, dims, elements=pixel, fill=st.sampled_from([0.0, 1.0])))
    label = draw(st.integers(0, classes - 1))
    gamma = draw(st.sampled_from([np.ones(classes), np.linspace(0.8, 1.2, classes)]))
    return Problem(point_set(images, offsets, gamma), torch.from_numpy(image), label)


def without_gamma(problem):
    points = problem.points
    return problem._replace(points=point_set(points.images, points.offsets))


@settings(max_examples=80)
@given(edge_problems(), st.sampled_from(NORM_NAMES))
def test_edge_cases_are_sound(problem, norm):
    problem = without_gamma(problem)
    radius = bisector_radius(problem, norm)
    assert not math.isnan(radius)
    assert radius >= 0.0
    if lost(problem, problem.image[None]).all():
        assert radius == 0.0
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=len(problem.image))), dtype=torch.float64)
    bad = corners[lost(problem, corners)]
    if len(bad):
        assert radius <= max(0.0, float(size_of(bad - problem.image, norm).min())) + 1e-7


@settings(max_examples=80)
@given(edge_problems(), st.sampled_from(NORM_NAMES))
def test_binary_edge_cases_are_sound(problem, norm):
    radius = bisector_radius(problem, norm, threshold=0.5)
    assert not math.isnan(radius)
    assert 0.0 <= radius <= max(0.0, flip_radius(problem, norm)) + ROUNDING


@settings(max_examples=50)
@given(edge_problems(pixel=st.floats(0.0, 1.0, width=32)), st.sampled_from(NORM_NAMES))
def test_differences_that_rounding_swallows(problem, norm):
    """What the rounded energies say of ties proves nothing here; the radii are numbers."""
    assert bisector_radius(problem, norm, threshold=0.5) >= 0.0
    problem = without_gamma(problem)
    assert bisector_radius(problem, norm) >= 0.0
    assert exact(problem).radius >= 0.0


@settings(max_examples=50)
@given(edge_problems())
def test_exact_edge_cases_are_sound(problem):
    problem = without_gamma(problem)
    found = exact(problem)
    assert not math.isnan(found.radius)
    assert found.radius >= 0.0
    if lost(problem, problem.image[None]).all():
        assert found.radius == 0.0
    corners = torch.tensor(list(itertools.product([0.0, 0.5, 1.0], repeat=len(problem.image))), dtype=torch.float64)
    bad = corners[lost(problem, corners)]
    if len(bad):
        assert found.radius <= float((bad - problem.image).norm(dim=1).min()) + 1e-7
    if found.adversarial is not None:
        assert 0.0 <= float(found.adversarial.min()) <= float(found.adversarial.max()) <= 1.0
        assert float((found.adversarial - problem.image).norm()) >= found.radius - 1e-6
        assert lost(problem, found.adversarial[None]).all()


@settings(max_examples=50)
@given(edge_problems(), st.sampled_from(NORM_NAMES), st.sampled_from([None, 0.5]))
def test_more_anchors_never_lower_the_radius(problem, norm, threshold):
    problem = without_gamma(problem) if threshold is None else problem
    radii = [bisector_radius(problem, norm, threshold=threshold, anchors=count) for count in (1, 2, 3, 20)]
    for fewer, more in itertools.pairwise(radii):
        assert fewer <= more + ROUNDING


@settings(max_examples=50)
@given(edge_problems(), st.sampled_from(["l2", "linf"]))
def test_the_box_never_lowers_the_radius(problem, norm):
    problem = without_gamma(problem)
    assert plain_radius(problem, norm) <= bisector_radius(problem, norm) + ROUNDING


def test_more_anchors_and_the_box_can_raise_the_radius():
    problems = [random_problem(seed, 3, classes=2, count=4) for seed in range(40)]
    many = [bisector_radius(problem, "l2") for problem in problems]
    one = [bisector_radius(problem, "l2", anchors=1) for problem in problems]
    assert any(a < b - 0.01 for a, b in zip(one, many, strict=True))
    assert any(plain_radius(p, "l2") < radius - 0.01 for p, radius in zip(problems, many, strict=True))


@settings(max_examples=100)
@given(st.data(), st.sampled_from(NORM_NAMES), st.sampled_from([None, 0.5]))
def test_cheap_bounds_are_never_above_the_radii_looked_at_closely(data, norm, threshold):
    problem = data.draw(edge_problems(dtype=data.draw(st.sampled_from([np.float32, np.float64]))))
    problem = without_gamma(problem) if threshold is None else problem
    search = search_of(problem, norm, threshold=threshold)
    candidates, anchors = search.candidates(0, 1000), search.anchors(0)
    radii, _ = search.refine(0, candidates, slice(0, None), anchors, every=True)
    classes, count = problem.points.offsets.shape
    assert len(radii) == (classes - 1) * count
    assert not candidates.bounds.isnan().any()
    assert (candidates.bounds <= radii + ROUNDING).all()
    assert candidates.rest == math.inf
    for c, index, bound in zip(candidates.classes.tolist(), candidates.index.tolist(), candidates.bounds, strict=True):
        assert c != problem.label
        assert float(search._cheap_bounds(c)[0, index]) == float(bound)


@settings(max_examples=50)
@given(st.data(), st.sampled_from(NORM_NAMES), st.sampled_from([None, 0.5]))
def test_single_and_double_precision_points_give_the_same_radius(data, norm, threshold):
    problem = data.draw(edge_problems(dtype=np.float32))
    problem = without_gamma(problem) if threshold is None else problem
    points = problem.points
    double = problem._replace(points=point_set(points.images.double(), points.offsets, points.gamma))
    single, wide = (bisector_radius(p, norm, threshold=threshold) for p in (problem, double))
    assert single == pytest.approx(wide, abs=ROUNDING)


@settings(max_examples=50)
@given(edge_problems(), st.sampled_from(NORM_NAMES), st.sampled_from([None, 0.5]))
def test_slack_only_lowers_the_radius(problem, norm, threshold):
    problem = without_gamma(problem) if threshold is None else problem
    points = problem.points
    slack = problem._replace(points=point_set(points.images, points.offsets, points.gamma, slack=0.01))
    assert (
        0.0
        <= bisector_radius(slack, norm, threshold=threshold)
        <= (bisector_radius(problem, norm, threshold=threshold) + ROUNDING)
    )


@pytest.mark.parametrize("threshold", SCENES)
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_a_lead_below_the_slack_proves_nothing(norm, threshold):
    points = torch.tensor([[[0.2, 0.3]], [[0.8, 0.7]]], dtype=torch.float64)
    image = torch.zeros(2, dtype=torch.float64)
    enough, more = (Problem(point_set(points, [[0.0], [0.0]], slack=slack), image, 0) for slack in (0.9, 1.1))
    assert energies(enough.points, image[None])[0].diff().item() == pytest.approx(1.0)
    assert bisector_radius(more, norm, threshold=threshold) == 0.0
    if norm != "l0":
        assert bisector_radius(enough, norm, threshold=threshold) > 0.0


@pytest.mark.parametrize("threshold", SCENES)
@pytest.mark.parametrize("norm", NORM_NAMES)
def test_black_points_that_tie(norm, threshold):
    """No distance between them, and no lead."""
    problem = Problem(point_set(torch.zeros(2, 1, 3), [[0.5], [0.5]]), torch.zeros(3, dtype=torch.float64), 0)
    assert bisector_radius(problem, norm, threshold=threshold) == 0.0
    ahead = problem._replace(points=point_set(torch.zeros(2, 1, 3), [[0.5], [0.7]]))
    assert bisector_radius(ahead, norm, threshold=threshold) == math.inf


# The quadratic program --------------------------------------------------------------------------------------------


def general_solver(ways, lacking, image):
    return scipy.optimize.minimize(
        lambda d: d @ d,
        0.5 - image,
        jac=lambda d: 2.0 * d,
        method="SLSQP",
        bounds=list(zip(-image, 1.0 - image, strict=True)),
        constraints={"type": "ineq", "fun": lambda d: ways @ d - lacking, "jac": lambda d: ways},
        options={"ftol": 1e-13, "maxiter": 500},
    )


def random_program(seed, constraints, dims):
    rng = np.random.default_rng([seed, constraints, dims])
    image, attacker = rng.random(dims), rng.random(dims)
    ways = attacker - (image + rng.normal(scale=0.3, size=(constraints, dims))).clip(0, 1)
    return ways, rng.uniform(-0.05, 0.35, constraints) * np.abs(ways).sum(1), image


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("constraints", [1, 2, 3])
def test_quadratic_program_is_solved(constraints, dims):
    compared = impossible = 0
    for seed in range(25):
        ways, lacking, image = random_program(seed, constraints, dims)
        start = np.random.default_rng(seed).random(constraints)
        radius, multipliers, change = solve_quadratic_program(ways, lacking, image, start)
        best = general_solver(ways, lacking, image)
        possible = scipy.optimize.linprog(
            np.zeros(dims), A_ub=-ways, b_ub=-lacking, bounds=list(zip(-image, 1.0 - image, strict=True))
        )
        assert multipliers.shape == lacking.shape
        if possible.status == 2:
            impossible += 1
            assert radius > math.sqrt(dims) or radius == math.inf
        elif best.success:
            compared += 1
            assert radius == pytest.approx(math.sqrt(max(best.fun, 0.0)), abs=1e-5)
            assert np.linalg.norm(change) == pytest.approx(radius, abs=1e-4)
            assert (ways @ change >= lacking - 1e-5).all()
            assert (multipliers >= 0).all()
            assert (image + change >= 0).all()
            assert (image + change <= 1).all()
            # Whatever the solver did, the multipliers prove the radius.
            dual = change @ change + 2.0 * multipliers @ (lacking - ways @ change)
            assert math.sqrt(max(dual, 0.0)) == pytest.approx(radius, abs=1e-9)
    assert compared >= 8
    assert compared + impossible >= 20


def test_quadratic_program_without_need_or_way():
    image = np.array([0.2, 0.9])
    ways = np.array([[0.5, 0.5]])
    radius, _, change = solve_quadratic_program(ways, np.array([-0.1]), image, np.zeros(1))
    assert radius == 0.0
    assert not change.any()
    assert solve_quadratic_program(ways, np.array([2.0]), image, np.zeros(1))[0] == math.inf
    assert solve_quadratic_program(np.zeros((1, 2)), np.array([0.1]), image, np.zeros(1))[0] == math.inf


# Real digits ------------------------------------------------------------------------------------------------------

MODELS = {"abs": ABS, "binary": BinaryABS}
CELLS = [pytest.param(kind, norm, id=f"{kind}-{norm}") for kind in MODELS for norm in NORM_NAMES]
ATTACKED = 3


@pytest.fixture(scope="module")
def models():
    """With finitely many points."""
    return {kind: model(prototypes=500, steps=0) for kind, model in MODELS.items()}


@pytest.fixture(scope="module")
def certificates(models, digits):
    found = {
        (kind, norm, "bisector"): certify(model, digits.images, digits.labels, norm)
        for kind, model in models.items()
        for norm in NORM_NAMES
    }
    for method in METHODS[1:]:
        found["abs", "l2", method] = certify(models["abs"], digits.images, digits.labels, "l2", method)
    return found


@pytest.fixture(scope="module")
def exact_certificate(certificates):
    return certificates["abs", "l2", "exact"]


def attacks_of(norm, **ours):
    short = {"steps": 10, "rivals": 1, "points": 4, "binary_search_steps": 5} | ours
    return {
        "l2": [
            L2BisectorAttack(**short),
            fb.attacks.DDNAttack(steps=20),
            fb.attacks.L2DeepFoolAttack(steps=6, candidates=3, loss="logits"),
        ],
        "linf": [LInfBisectorAttack(**short), fb.attacks.LInfFMNAttack(steps=20)],
        "l0": [L0BisectorAttack(**short), PointwiseAttack(max_queries=100)],
    }[norm]


@pytest.fixture(scope="module")
def adversarials(models, digits):
    """Per cell a list of (row, image) over all attacks, each judged by the model. Global random state put back."""
    images, labels = digits.images[:ATTACKED], digits.labels[:ATTACKED]
    state, legacy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    found = {}
    for kind, norm in itertools.product(MODELS, NORM_NAMES):
        wrapped = fb.PyTorchModel(models[kind], bounds=(0, 1), device="cpu")
        found[kind, norm] = []
        for attack in attacks_of(norm):
            raw, _, _ = attack(wrapped, images, labels, epsilons=None)
            bad = models[kind](raw).argmax(1) != labels
            found[kind, norm] += [(int(row), raw[row].double()) for row in bad.nonzero()[:, 0]]
    torch.set_rng_state(state)
    np.random.set_state(legacy)  # noqa: NPY002
    return found


def sizes(change, norm):
    return size_of(change.flatten(1), norm)


def test_models_of_finitely_many_points_are_proved(certificates, digits):
    for (_, norm, method), found in certificates.items():
        assert found.proved
        assert (found.norm, found.method) == (norm, method)
        assert found.radius.shape == digits.labels.shape
        assert found.radius.dtype == torch.float64
        assert (found.radius >= 0).all()
        assert (found.radius > 0).sum() >= 17
        assert (found.rival != digits.labels).all()
        assert ((found.rival >= 0) & (found.rival < 10)).all()


@pytest.mark.parametrize(("kind", "norm"), CELLS)
def test_no_attack_comes_below_the_radius(kind, norm, certificates, adversarials, digits):
    radius = certificates[kind, norm, "bisector"].radius
    met = adversarials[kind, norm]
    assert len({row for row, _ in met}) == ATTACKED
    for row, image in met:
        assert float(sizes(image - digits.images[row].double(), norm)) >= float(radius[row])


def test_no_attack_comes_below_the_exact_radius_and_ours_comes_close(exact_certificate, adversarials, digits):
    ratios = []
    for row, image in adversarials["abs", "l2"]:
        distance = float(sizes(image - digits.images[row].double(), "l2"))
        assert distance >= float(exact_certificate.radius[row])
        ratios.append(distance / float(exact_certificate.radius[row]))
    assert min(ratios) < 1.05


def test_methods_in_order(certificates):
    radius = {method: certificates["abs", "l2", method].radius for method in METHODS}
    assert (radius["lipschitz"] <= radius["bisector"] + ROUNDING).all()
    assert (radius["paper"] <= radius["bisector"] + ROUNDING).all()
    assert (radius["bisector"] <= radius["exact"] + ROUNDING).all()
    assert radius["paper"].mean() < radius["lipschitz"].mean() < radius["bisector"].mean() < radius["exact"].mean()


def test_adversarial_of_exact_is_misclassified_just_above_the_radius(models, exact_certificate, digits):
    found = exact_certificate
    assert (models["abs"](found.adversarial.float()).argmax(1) == found.rival).all()
    assert 0.0 <= float(found.adversarial.min()) <= float(found.adversarial.max()) <= 1.0
    above = sizes(found.adversarial - digits.images.double(), "l2") - found.radius
    assert (above > 0).all()
    assert (above < 0.03).all()


@pytest.mark.parametrize("kind", MODELS)
def test_only_exact_has_adversarials_and_no_anchor(kind, certificates):
    for (model, _, method), found in certificates.items():
        if model == kind:
            assert (found.adversarial is None) == (method != "exact")
            bisector = method == "bisector"
            assert found.anchor.isfinite().all() == found.anchor_offset.isfinite().all() == bisector
            assert found.point.isfinite().all() == found.offset.isfinite().all() == (bisector or method == "exact")


@pytest.mark.parametrize(("kind", "norm"), CELLS)
def test_random_perturbations_inside_the_radius_change_nothing(kind, norm, models, certificates, digits):
    radius = certificates[kind, norm, "bisector"].radius
    images, generator = digits.images.double(), torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        if norm == "l0":
            threshold = noise.flatten(1).sort(dim=1, descending=True).values.gather(1, radius[:, None].long())
            moved = torch.where(noise > threshold.view(-1, 1, 1, 1), 1.0 - images.round(), images)
        else:
            noise = noise.sign() if norm == "linf" else noise
            inside = 0.999 * radius / sizes(noise, norm)
            moved = (images + inside.view(-1, 1, 1, 1) * noise).clamp(0, 1)
        inside = sizes(moved.float().double() - images, norm)
        assert (inside < radius).all()
        assert (inside >= 0)[radius > 0].all()
        assert (models[kind](moved.float()).argmax(1) == digits.labels)[radius > 0].all()


def test_the_way_to_the_nearest_adversarial_is_safe_up_to_the_radius(models, exact_certificate, digits):
    images = digits.images.double()
    way = exact_certificate.adversarial - images
    for share in (0.5, 0.9, 0.999):
        size = share * exact_certificate.radius / sizes(way, "l2")
        assert (models["abs"]((images + size.view(-1, 1, 1, 1) * way).float()).argmax(1) == digits.labels).all()


@pytest.mark.parametrize("norm", ["linf", "l0"])
def test_the_worst_moves_inside_the_radius_change_nothing(norm, models, certificates, digits):
    """Towards the limiting point and away from the anchor that holds it off, in the whole box."""
    found = certificates["abs", norm, "bisector"]
    images = digits.images.double()
    way = found.point - found.anchor
    if norm == "linf":
        moved = (images + 0.999 * found.radius.view(-1, 1, 1, 1) * way.sign()).clamp(0, 1)
    else:
        goal = (way > 0).double()
        order = (way * (goal - images)).flatten(1).argsort(dim=1, descending=True)
        chosen = (torch.arange(784) < found.radius[:, None]).double()
        mask = torch.zeros(len(images), 784, dtype=torch.float64).scatter(1, order, chosen).view_as(images)
        moved = images + mask * (goal - images)
        assert ((moved != images).flatten(1).sum(1) == found.radius).all()
    assert (models["abs"](moved.float()).argmax(1) == digits.labels).all()
    beyond = models["abs"].infer(moved.float()).energy.double()
    rows = torch.arange(len(images))
    before = models["abs"].infer(digits.images).energy.double()
    lead, lead_before = (e[rows, found.rival] - e[rows, digits.labels] for e in (beyond, before))
    assert (lead < 0.5 * lead_before).sum() >= 15


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_the_worst_flips_inside_the_radius_change_nothing(norm, models, certificates, digits):
    """The flips that the limiting point gains most from, and of L-infinity all that the radius allows."""
    model, found = models["binary"], certificates["binary", norm, "bisector"]
    images, gamma = digits.images.double().flatten(1), model.gamma.double()
    seen = (images > 0.5).double()
    own, other = gamma[digits.labels][:, None], gamma[found.rival][:, None]
    way = own * (1.0 - 2.0 * found.anchor.flatten(1)) - other * (1.0 - 2.0 * found.point.flatten(1))
    gains = (1.0 - 2.0 * seen) * way
    across = (images - 0.5).abs() + 1e-6
    if norm == "linf":
        flips = (across < found.radius[:, None]) & (gains > 0)
    else:
        price = torch.ones_like(across) if norm == "l0" else across.square()
        order = (gains / price).argsort(dim=1, descending=True)
        paid = price.gather(1, order).cumsum(1)
        budget = found.radius if norm == "l0" else found.radius.square()
        affordable = (paid <= budget[:, None]) & (gains.gather(1, order) > 0)
        flips = torch.zeros_like(affordable).scatter(1, order, affordable)
    moved = torch.where(flips, torch.where(seen > 0, 0.5, 0.5 + 1e-6), images)
    assert flips.any()
    assert (sizes(moved - images, norm) < found.radius).all()
    moved = moved.float()
    assert torch.equal((moved > 0.5).double() != seen, flips)
    labels = digits.labels[found.radius > 0]
    assert (model(moved.view(-1, 1, 28, 28)).argmax(1)[found.radius > 0] == labels).all()


# Models with latent descent ---------------------------------------------------------------------------------------

ESTIMATED = 2
ESTIMATES = [("abs", "l2"), ("abs", "linf"), ("binary", "l0")]


@pytest.fixture(scope="module")
def descending():
    return {kind: model(prototypes=200, steps=10) for kind, model in MODELS.items()}


@pytest.fixture(scope="module")
def estimates(descending, digits):
    images, labels = digits.images[:ESTIMATED], digits.labels[:ESTIMATED]
    found = {
        (kind, norm, "bisector"): certify(descending[kind], images, labels, norm, starts=2) for kind, norm in ESTIMATES
    }
    for method in ("lipschitz", "paper"):
        found["abs", "l2", method] = certify(descending["abs"], images, labels, "l2", method, starts=2)
    return found


def test_descending_models_have_estimates(estimates, descending, digits):
    for (kind, _, _), found in estimates.items():
        assert not found.proved
        right = descending[kind](digits.images[:ESTIMATED]).argmax(1) == digits.labels[:ESTIMATED]
        assert right.any()
        assert (found.radius[right] > 0).all()
        assert found.radius.isfinite().all()
        assert (found.rival != digits.labels[:ESTIMATED])[right].all()
        assert ((found.rival >= 0) & (found.rival < 10)).all()


def test_estimates_in_order(estimates):
    bisector, lipschitz, paper = (estimates["abs", "l2", m].radius for m in ("bisector", "lipschitz", "paper"))
    assert (lipschitz <= bisector).all()
    assert (paper <= bisector).all()


@pytest.mark.parametrize(("kind", "norm"), ESTIMATES)
def test_no_attack_comes_far_below_the_estimate(kind, norm, estimates, descending, digits):
    """Not a proof: with 300 prototypes one L2 attack came 0.5 % below."""
    images, labels = digits.images[:ESTIMATED], digits.labels[:ESTIMATED]
    wrapped = fb.PyTorchModel(descending[kind], bounds=(0, 1), device="cpu")
    raw, _, success = attacks_of(norm, steps=8)[0](wrapped, images, labels, epsilons=None)
    assert success.any()
    distances = sizes(raw.double() - images.double(), norm)
    assert (distances >= 0.98 * estimates[kind, norm, "bisector"].radius)[success].all()


def test_estimate_repeats_its_bound(estimates, digits):
    """The point, the anchor and their offsets give the radius without the box, or less."""
    found = estimates["abs", "l2", "bisector"]
    images = digits.images[:ESTIMATED].double()
    lead = energy_of(found.point, found.offset, images) - energy_of(found.anchor, found.anchor_offset, images)
    plain = lead / (2.0 * sizes(found.point - found.anchor, "l2"))
    assert (plain <= found.radius + 1e-6).all()
    assert (plain >= 0.8 * found.radius).all()


# Contract ---------------------------------------------------------------------------------------------------------

FEW = 4


def energy_of(point, offset, images):
    return (point - images).flatten(1).square().sum(1) + offset


def assert_same(one, other, rows=slice(None)):
    """Of two certificates, the second one for some rows of the first one's images; up to the rounding of products."""
    for name in ("radius", "rival", "point", "offset", "anchor", "anchor_offset"):
        assert_close(getattr(one, name)[rows], getattr(other, name), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert one.proved == other.proved
    if one.adversarial is not None:
        assert_close(one.adversarial[rows], other.adversarial, rtol=0, atol=1e-4, equal_nan=True)


def call(model, method):
    return lambda images, labels, **kwargs: certify(model, images, labels, "l2", method, **kwargs)


@pytest.fixture(scope="module")
def few(digits):
    return digits.images[:FEW], digits.labels[:FEW]


@pytest.mark.parametrize("method", METHODS)
def test_misclassified_images_have_radius_zero(method, models, few):
    images, labels = few
    wrong = labels.clone()
    wrong[1:3] = (labels[1:3] + 1) % 10
    found = certify(models["abs"], images, wrong, method=method)
    assert (found.radius == 0).tolist() == [False, True, True, False]
    assert torch.equal(found.rival[1:3], labels[1:3])
    for part in (found.point, found.offset, found.anchor, found.anchor_offset):
        assert part[1:3].isnan().all()
    if method == "exact":
        assert torch.equal(found.adversarial[1:3], images[1:3].double())
    kept = certify(models["abs"], images[[0, 3]], labels[[0, 3]], method=method)
    assert_close(found.radius[[0, 3]], kept.radius)


@pytest.mark.parametrize("norm", NORM_NAMES)
def test_misclassified_images_have_radius_zero_in_every_norm_and_model(norm, models, descending, few):
    images, labels = few
    for model in (models["abs"], models["binary"], descending["abs"]):
        found = certify(model, images, (labels + 3) % 10, norm)
        assert not found.radius.any()
        assert torch.equal(found.rival, model(images).argmax(1))
        assert found.point.isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method, models, descending):
    none = torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.long)
    for model in (models["abs"], descending["abs"]):
        if method == "exact" and model.settings.steps:
            continue
        found = certify(model, *none, method=method)
        assert found.radius.shape == found.rival.shape == found.offset.shape == (0,)
        assert found.point.shape == found.anchor.shape == (0, 1, 28, 28)
        assert (found.adversarial is not None) == (method == "exact")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8])
def test_labels_of_every_integer_type(dtype, models, few, certificates):
    labels = torch.from_numpy(few[1].numpy().astype(dtype))
    found = certify(models["abs"], few[0], labels)
    assert found.rival.dtype == torch.long
    assert_same(certificates["abs", "l2", "bisector"], found, slice(FEW))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", MODELS)
def test_images_of_every_precision(kind, dtype, models, few):
    images, labels = few[0][:2].to(dtype), few[1][:2]
    for norm in NORM_NAMES:
        found = certify(models[kind], images, labels, norm)
        assert found.radius.dtype == torch.float64
        assert_same(certify(models[kind], images.float(), labels, norm), found)


@pytest.mark.parametrize(("kind", "method"), [("binary", "bisector"), *(("abs", method) for method in METHODS)])
def test_a_batch_equals_its_images_alone_in_any_order(kind, method, models, digits, certificates):
    order = [13, 3, 8, 0, 5]
    whole = certificates[kind, "l2", method]
    assert_same(whole, certify(models[kind], digits.images[order], digits.labels[order], method=method), order)
    for row in order[:3]:
        single = certify(models[kind], digits.images[[row]], digits.labels[[row]], method=method)
        assert_same(whole, single, [row])


def test_a_batch_of_a_descending_model_equals_its_images_alone(descending, few, estimates):
    order = [1]
    found = certify(descending["abs"], few[0][order], few[1][order], starts=2)
    assert_close(found.radius, estimates["abs", "l2", "bisector"].radius[order], rtol=1e-3, atol=1e-3)
    assert torch.equal(found.rival, estimates["abs", "l2", "bisector"].rival[order])


@pytest.mark.parametrize("method", ["bisector", "exact"])
def test_same_images_again_have_the_same_certificates(method, models, few, certificates):
    twice = certify(models["abs"], few[0].repeat(2, 1, 1, 1), few[1].repeat(2), method=method)
    again = certify(models["abs"], *few, method=method)
    assert torch.equal(again.radius, certify(models["abs"], *few, method=method).radius)
    assert_same(twice, again, slice(FEW))
    assert_same(twice, again, slice(FEW, None))


@pytest.mark.parametrize("kind", MODELS)
def test_more_images_of_a_class_than_fit_a_batch(kind, models, few, monkeypatch):
    images, labels = few[0][[0]].repeat(5, 1, 1, 1) * torch.linspace(0.9, 1.0, 5).view(-1, 1, 1, 1), few[1][[0] * 5]
    whole = certify(models[kind], images, labels)
    monkeypatch.setattr("abs_defense.certificates._certificate._BATCH", 2)
    assert_same(whole, certify(models[kind], images, labels))


def test_more_anchors_raise_real_radii(models, digits, certificates):
    one = certify(models["abs"], digits.images, digits.labels, anchors=1).radius
    many = certificates["abs", "l2", "bisector"].radius
    assert (one <= many + ROUNDING).all()
    assert (one < many - 0.01).any()
    most = certify(models["abs"], digits.images[:3], digits.labels[:3], anchors=1000).radius
    assert (many[:3] <= most + ROUNDING).all()


def test_point_and_anchor_give_the_bound(models, digits, certificates):
    found, images = certificates["abs", "l2", "bisector"], digits.images.double()
    rows = torch.arange(len(images))
    model_energies = models["abs"].infer(digits.images).energy.double()
    rival = energy_of(found.point, found.offset, images)
    own = energy_of(found.anchor, found.anchor_offset, images)
    assert (own >= model_energies[rows, digits.labels] - 1e-3).all()
    assert (rival >= model_energies[rows, found.rival] - 1e-3).all()
    assert (rival > own).all()
    assert (found.offset >= 0).all()
    assert (found.anchor_offset >= 0).all()
    lengths = sizes(found.point - found.anchor, "l2")
    plain = (rival - own) / (2.0 * lengths)
    assert (plain <= found.radius + SLACK / (2.0 * lengths)).all()
    assert (plain >= 0.8 * found.radius).all()
    # With the box, to the digit: a pair of points is a problem with a closed form.
    for row in rows:
        pair = torch.stack([found.anchor[row], found.point[row]]).view(2, 1, -1)
        offsets = torch.stack([found.anchor_offset[row], found.offset[row]])[:, None]
        truth = only_pair_radius(Problem(point_set(pair, offsets), images[row].flatten(), 0), "l2")
        assert truth - 0.03 <= float(found.radius[row]) < truth


@pytest.mark.parametrize("kind", MODELS)
def test_points_are_prototypes_of_their_class(kind, models, digits, certificates):
    model = models[kind]
    for norm in NORM_NAMES:
        found = certificates[kind, norm, "bisector"]
        for classes, images, offsets in (
            (found.rival, found.point, found.offset),
            (digits.labels, found.anchor, found.anchor_offset),
        ):
            same = (model.prototype_images[classes].double() == images.flatten(1)[:, None]).all(2)
            assert same.any(1).all()
            kl = 0.5 * model.prototype_latents.double().square().sum(1)
            assert_close(kl[same.int().argmax(1)], offsets)


@pytest.mark.parametrize("method", METHODS)
def test_global_state_gradients_and_inputs_are_left_alone(method, models, few):
    model = models["abs"]
    images, labels = few[0].clone().requires_grad_(), few[1].clone()
    before = {name: value.clone() for name, value in itertools.chain(model.named_parameters(), model.named_buffers())}
    torch.set_default_dtype(torch.float64)
    try:
        found = certify(model, images, labels, method=method)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled()
    assert images.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.radius.requires_grad
    assert not found.point.requires_grad
    assert torch.equal(images.detach(), few[0])
    assert torch.equal(labels, few[1])
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        assert torch.equal(value, before[name]), name
    assert_same(certify(model, *few, method=method), found)


@pytest.mark.parametrize("kind", MODELS)
def test_descending_models_leave_no_gradients(kind, descending, few):
    model = descending[kind]
    images = few[0][:1].clone().requires_grad_()
    found = certify(model, images, few[1][:1], "linf", starts=1)
    assert not found.radius.requires_grad
    assert images.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_inference_mode_changes_nothing(kind, models, few, certificates):
    with torch.inference_mode():
        found = certify(models[kind], few[0].clone(), few[1].clone())
    assert_same(certificates[kind, "l2", "bisector"], found, slice(FEW))


@pytest.mark.parametrize("method", ["bisector", "exact"])
def test_autocast_changes_nothing(method, models, digits, certificates):
    """In half precision the shortlists would not be what the proof needs."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = certify(models["abs"], digits.images, digits.labels, method=method)
    assert_same(certificates["abs", "l2", method], found)


@pytest.mark.parametrize("kind", MODELS)
def test_products_under_autocast_are_as_precise_as_their_error_bound_says(kind, models, few, monkeypatch):
    products, original = [], FiniteSearch._energies
    monkeypatch.setattr(FiniteSearch, "_energies", lambda *args: products.append(original(*args)) or products[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        certify(models[kind], few[0][:1], few[1][:1])
    assert len(products) >= 10
    assert {product.dtype for product in products} == {torch.float32}


@pytest.mark.parametrize("kind", MODELS)
def test_cheap_bounds_of_real_points(kind, models, few):
    scene = Scene(few[0][:1].flatten(1).double(), "l2", models[kind].binary_threshold)
    search = FiniteSearch(PointSet.of(models[kind]), scene, int(few[1][0]), 5)
    candidates, anchors = search.candidates(0, 500), search.anchors(0)
    radii, _ = search.refine(0, candidates, slice(0, 300), anchors, every=True)
    assert (candidates.bounds[:300] > 0).any()
    assert (candidates.bounds[:300] <= radii).all()


def test_double_images_next_to_the_threshold_are_seen_as_the_model_sees_them(models, digits):
    """A little above 0.5 in double precision is 0.5 in single precision: dark. The last images have the flips to
    bright that bring digits closest to another class."""
    model = models["binary"]
    labels, seen = digits.labels, (digits.images > 0.5).double()
    found = certify(model, seen, labels, "l0")
    own, rival = (model.gamma.double()[c].view(-1, 1, 1, 1) for c in (labels, found.rival))
    gains = (own * (1.0 - 2.0 * found.anchor) - rival * (1.0 - 2.0 * found.point)) * (1.0 - seen)
    order = gains.flatten(1).argsort(dim=1, descending=True)
    chosen = (torch.arange(784) < found.radius[:, None]).double()
    flips = torch.zeros(len(seen), 784, dtype=torch.float64).scatter(1, order, chosen).view_as(seen)
    bright = torch.cat([seen, seen + flips])
    images = torch.cat([(0.5 + 1e-10) * seen, seen + (0.5 + 1e-10) * flips])
    assert torch.equal(model(images), model(bright))
    radii, expected = (certify(model, x, labels.repeat(2), "l0").radius for x in (images, bright))
    assert (expected[:20] > expected[20:]).sum() >= 15
    assert torch.equal(radii, expected)


def test_images_a_little_outside_the_box(models, few):
    """As others round them; radii are for perturbations into the box."""
    inside, labels = few[0][:2], few[1][:2]
    outside = inside + torch.where(inside > 0.5, 5e-4, -5e-4) * ((inside == 0) | (inside == 1))
    assert outside.min() < 0
    for model, norm in itertools.product(models.values(), NORM_NAMES):
        assert_same(certify(model, inside, labels, norm), certify(model, outside, labels, norm))


def test_double_precision_model(few):
    model = ABS(prototypes=60, steps=0)
    radius = certify(model, *few).radius
    double = certify(model.double(), few[0].double(), few[1])
    assert double.proved
    right = (radius > 0) & (double.radius > 0)
    assert right.any()
    assert_close(double.radius[right], radius[right], rtol=0, atol=0.02)
    assert (double.radius >= radius).all()


def test_half_precision_model_is_certified_as_it_runs(digits):
    model = ABS(prototypes=200, steps=0).half()
    found = certify(model, digits.images, digits.labels, method="exact")
    right = found.radius > 0
    assert found.proved
    assert right.sum() >= 10
    assert (model(found.adversarial[right].float()).argmax(1) != digits.labels[right]).all()
    way = found.adversarial - digits.images.double()
    size = 0.999 * found.radius / sizes(way, "l2").clamp_min(1e-9)
    inside = (digits.images.double() + size.view(-1, 1, 1, 1) * way).float()
    assert (model(inside).argmax(1) == digits.labels)[right].all()


def test_slack_covers_the_energies_of_the_model(models, random_images, digits):
    """The model's energies, in single precision and by its own search, against exact ones in double precision."""
    images = torch.cat([digits.images, random_images(20)])
    for kind, model in models.items():
        points = PointSet.of(model)
        seen = seen_by(images.double().flatten(1), model.binary_threshold)
        exact_energies, _ = points.nearest(seen)
        error = (model.infer(images).energy.double() - exact_energies).abs()
        assert (error <= 0.5 * points.slack).all(), kind
        assert (points.slack > 0).all()
        assert (points.slack < SLACK).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_slack_covers_models_of_other_precisions(dtype, digits):
    """Prototypes so close to each other that rounded offsets would choose a wrong one."""
    noise = 0.05 * torch.randn(20, 50, 8, generator=torch.Generator().manual_seed(0))
    latents = ABS(prototypes=300).infer(digits.images).latents[range(20), digits.labels]
    model = ABS(prototypes=(latents[:, None] + noise).flatten(0, 1), steps=0).to(dtype)
    points = PointSet.of(model)
    exact_energies, _ = points.nearest(digits.images.double().flatten(1))
    error = (model.infer(digits.images).energy.double() - exact_energies).abs()
    assert (error <= 0.5 * points.slack).all()
    assert (points.slack < SLACK).all()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_can_happen_to_a_single_class(method, steps, digits):
    if method == "exact" and steps:
        pytest.skip("needs finitely many points")
    bundled = load_weights("mnist")
    layers = [[bundled.decoders.get_parameter(f"{kind}_{i}")[:1] for i in range(4)] for kind in ("weight", "bias")]
    model = ABS(Weights(DecoderStack(*layers), Calibration(1.0, 0.0, (1.0,))), prototypes=9, steps=steps)
    found = certify(model, digits.images[:2], torch.zeros(2, dtype=torch.long), method=method)
    assert found.radius.isinf().all()
    assert found.rival.tolist() == [-1, -1]


def test_progress_bar(models, few, capsys):
    wrong = few[1].clone()
    wrong[0] = (wrong[0] + 1) % 10
    silent = certify(models["abs"], few[0], wrong)
    assert capsys.readouterr().err == ""
    assert_same(silent, certify(models["abs"], few[0], wrong, progress=True))
    assert f"{FEW}/{FEW}" in capsys.readouterr().err


BAD_VALUES = {
    "norm": ({"norm": "l1"}, r"norm: expected one of l2, linf, l0, got 'l1'"),
    "method": ({"method": "best"}, r"method: expected one of bisector, lipschitz, paper, exact, got 'best'"),
    "exact-norm": ({"norm": "linf", "method": "exact"}, r"method 'exact' is for norm 'l2', got 'linf'"),
    "paper-norm": ({"norm": "l0", "method": "paper"}, r"method 'paper' is for norm 'l2', got 'l0'"),
    "anchors": ({"anchors": 0}, r"anchors: expected at least 1, got 0"),
    "starts": ({"starts": -1}, r"starts: expected at least 1, got -1"),
    "half-a-start": ({"starts": 1.5}, r"starts: expected a whole number, got 1.5"),
    "shape": ({"x": torch.zeros(4, 28, 28)}, r"expected shape \(N, 1, 28, 28\)"),
    "range": ({"x": torch.full((4, 1, 28, 28), 2.0)}, r"expected values in \[0, 1\]"),
    "bytes": ({"x": torch.zeros(4, 1, 28, 28, dtype=torch.uint8)}, r"expected floating point values"),
    "nan": ({"x": torch.full((4, 1, 28, 28), torch.nan)}, r"expected finite values"),
    "count": ({"y": torch.zeros(3, dtype=torch.long)}, r"y: expected 4 integer labels, one an image, got \(3,\)"),
    "float-labels": ({"y": torch.zeros(4)}, r"y: expected 4 integer labels.*float32"),
    "bool-labels": ({"y": torch.zeros(4, dtype=torch.bool)}, r"y: expected 4 integer labels.*bool"),
    "one-hot": ({"y": torch.zeros(4, 10, dtype=torch.long)}, r"y: expected 4 integer labels.*\(4, 10\)"),
    "class-10": ({"y": torch.tensor([0, 1, 2, 10])}, r"y: expected classes from 0 to 9, got values from 0 to 10"),
    "class--1": ({"y": torch.tensor([-1, 1, 2, 3])}, r"y: expected classes from 0 to 9, got values from -1 to 3"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_wrong_values_are_refused(case, models, few):
    arguments, message = BAD_VALUES[case]
    with pytest.raises(ValueError, match=message):
        certify(**{"model": models["abs"], "x": few[0], "y": few[1], **arguments})


@pytest.mark.parametrize("method", ["lipschitz", "paper", "exact"])
def test_binary_abs_has_one_method(method, models, few):
    with pytest.raises(ValueError, match=rf"method '{method}' is for ABS.*for Binary ABS use 'bisector'"):
        certify(models["binary"], *few, method=method)


def test_exact_needs_finitely_many_points(descending, few):
    with pytest.raises(ValueError, match=r"method 'exact' needs finitely many points.*steps=10"):
        certify(descending["abs"], *few, method="exact")


class Squared(ABS):
    def forward(self, images):
        return super().forward(images.square())


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, logits: logits.flip(1),
        lambda module, args, logits: logits + 0.1,
        lambda module, args, logits: logits[:, :5],
    ],
)
@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_that_change_logits_are_refused(few, hook, everywhere):
    model = ABS(prototypes=4, steps=0)
    register = nn.modules.module.register_module_forward_hook if everywhere else model.register_forward_hook
    handle = register(hook)
    try:
        with pytest.raises(TypeError, match="a forward hook changes its logits"):
            certify(model, *few)
    finally:
        handle.remove()


def test_hooks_that_look_are_not_refused(few):
    model, seen = ABS(prototypes=4, steps=0), []
    radius = certify(model, *few).radius
    model.register_forward_hook(lambda module, args, logits: seen.append(len(logits)))
    assert torch.equal(certify(model, *few).radius, radius)
    assert sum(seen) == len(few[0])


class Called(ABS):
    def __call__(self, images):
        return super().__call__(images.square())


def test_a_call_of_its_own_is_refused(few):
    with pytest.raises(TypeError, match=r"model: Called changes what ABS\.forward sees or returns"):
        certify(Called(prototypes=4, steps=0), *few)


def test_wrong_types_are_refused(models, few):
    images, labels = few
    with pytest.raises(TypeError, match=r"model: expected ABS or BinaryABS, got Sequential.*pass the module inside"):
        certify(nn.Sequential(models["abs"]), images, labels)
    squared = Squared(prototypes=4, steps=0)
    with pytest.raises(TypeError, match=r"model: Squared changes what ABS\.forward sees or returns"):
        certify(squared, images, labels)
    hooked = ABS(prototypes=4, steps=0)
    hooked.register_forward_pre_hook(lambda module, args: (args[0].square(),))
    with pytest.raises(TypeError, match="a forward pre-hook"):
        certify(hooked, images, labels)
    replaced = ABS(prototypes=4, steps=0)
    replaced.forward = lambda images: -ABS.forward(replaced, images)
    with pytest.raises(TypeError, match="a forward or call of its own"):
        certify(replaced, images, labels)
    with pytest.raises(TypeError, match=r"model: expected ABS or BinaryABS, got PyTorchModel"):
        certify(fb.PyTorchModel(models["abs"], bounds=(0, 1), device="cpu"), images, labels)
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor, got ndarray"):
        certify(models["abs"], images.numpy(), labels)
    with pytest.raises(TypeError, match=r"y: expected a torch.Tensor of labels, got ndarray"):
        certify(models["abs"], images, labels.numpy())
    with pytest.raises(TypeError, match=r"y: expected a torch.Tensor of labels, got list"):
        certify(models["abs"], images, labels.tolist())
