"""The programs inside the bisector attacks, on problems small enough for general solvers and brute force."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.testing import assert_close

from abs_defense.attacks._programs import L0Program, L2Program, LInfProgram, Points, Setting, _cover

PROGRAMS = {"l0": L0Program(), "l2": L2Program(), "linf": LInfProgram()}


def as_tensors(*parts):
    return [torch.from_numpy(part) for part in parts]


def each(*tensors):
    return zip(*(tensor.numpy() for tensor in tensors), strict=True)


def random_problems(count, constraints, dims, *, likeness=0.05, seed=0):
    """``ways . d >= rest`` and ``lower <= d <= upper``: from points of one class, close to the image, to one point."""
    rng = np.random.default_rng([seed, constraints, dims])
    image = rng.random((count, 1, dims))
    attacker = rng.random((count, 1, dims))
    centre = image + 0.3 * rng.normal(size=image.shape)
    defenders = (centre + likeness * rng.normal(size=(count, constraints, dims))).clip(0, 1)
    rest = np.square(attacker - image).sum(2) - np.square(defenders - image).sum(2) + 0.1 * rng.random((count, 1))
    return as_tensors(2.0 * (attacker - defenders), rest, -image[:, 0], 1.0 - image[:, 0])


def assert_in_box(moves, lower, upper):
    assert (moves >= lower - 1e-12).all()
    assert (moves <= upper + 1e-12).all()


def smallest_l2(ways, rest, lower, upper):
    return scipy.optimize.minimize(
        lambda d: d @ d,
        0.5 * (lower + upper),
        jac=lambda d: 2.0 * d,
        method="SLSQP",
        bounds=list(zip(lower, upper, strict=True)),
        constraints={"type": "ineq", "fun": lambda d: ways @ d - rest, "jac": lambda d: ways},
        options={"ftol": 1e-12, "maxiter": 500},
    )


def smallest_linf(ways, rest, lower, upper):
    """With d = u - v, both not negative, and s the largest of them."""
    dims = len(lower)
    identity, zero, ones = np.eye(dims), np.zeros((dims, dims)), np.ones((dims, 1))
    return scipy.optimize.linprog(
        np.r_[np.zeros(2 * dims), 1.0],
        A_ub=np.block([[identity, zero, -ones], [zero, identity, -ones], [-ways, ways, np.zeros((len(ways), 1))]]),
        b_ub=np.r_[np.zeros(2 * dims), -rest],
        bounds=[(0.0, u) for u in upper] + [(0.0, -low) for low in lower] + [(0.0, None)],
    )


@pytest.mark.parametrize("dims", [3, 5])
@pytest.mark.parametrize("constraints", [1, 2, 4])
def test_l2_program_is_within_one_percent_of_the_optimum(constraints, dims):
    problems = random_problems(30, constraints, dims)
    moves = L2Program()._smallest(*problems)
    assert_in_box(moves, *problems[2:])
    compared = 0
    for move, ways, rest, lower, upper in each(moves, *problems):
        best = smallest_l2(ways, rest, lower, upper)
        if best.success and best.fun > 1e-8:
            compared += 1
            assert (ways @ move >= rest - 1e-3 * np.abs(rest).max()).all()
            assert np.linalg.norm(move) <= 1.01 * np.sqrt(best.fun)
    assert compared >= 20


@pytest.mark.parametrize("dims", [3, 5])
@pytest.mark.parametrize("constraints", [1, 2, 4])
def test_linf_program_is_optimal(constraints, dims):
    problems = random_problems(12, constraints, dims)
    moves = LInfProgram()._smallest(*problems)
    assert_in_box(moves, *problems[2:])
    compared = 0
    for move, ways, rest, lower, upper in each(moves, *problems):
        best = smallest_linf(ways, rest, lower, upper)
        if best.success:
            compared += 1
            assert (ways @ move >= rest - 1e-7).all()
            assert np.abs(move).max() == pytest.approx(best.fun, rel=1e-6, abs=1e-9)
    assert compared >= 8


def test_l0_program_moves_the_fewest_pixels_to_a_bound():
    problems = random_problems(20, 1, 5)
    moves = L0Program()._smallest(*problems)
    compared = 0
    for move, ways, rest, lower, upper in each(moves, *problems):
        assert ((move == 0) | (move == lower) | (move == upper)).all()
        corners = [np.array(c) for c in itertools.product(*zip(lower, np.zeros(5), upper, strict=True))]
        sizes = [np.count_nonzero(c) for c in corners if (ways @ c >= rest).all()]
        if sizes and min(sizes) > 0:
            compared += 1
            assert (ways @ move >= rest).all()
            assert np.count_nonzero(move) == min(sizes)
    assert compared >= 10


@pytest.mark.parametrize("program", PROGRAMS)
def test_impossible_problems_give_moves_in_the_box_and_leave_the_others_alone(program):
    ways, rest, lower, upper = random_problems(4, 2, 5)
    alone = PROGRAMS[program]._smallest(ways, rest, lower, upper)
    rest = rest.clone()
    rest[1] = 1e3
    moves = PROGRAMS[program]._smallest(ways, rest, lower, upper)
    assert_in_box(moves, lower, upper)
    assert_close(moves[[0, 2, 3]], alone[[0, 2, 3]], rtol=0, atol=1e-2)


def random_covers(demands, *, count=40, moves=9, likeness=0.3):
    """Gains, demands and costs; the demands of an image want much the same moves."""
    rng = np.random.default_rng(demands)
    gains = rng.normal(0.4, 1.0, (count, 1, moves)) + likeness * rng.normal(size=(count, demands, moves))
    return as_tensors(gains, 0.4 * gains.clip(0).sum(2), rng.uniform(0.2, 1.0, (count, moves)))


def each_cover(gains, rest, cost, *, largest):
    """The covers found, each with its cost and the least one possible; brute force."""
    total = np.max if largest else np.sum
    covers = _cover(gains, rest, cost, largest=largest)
    subsets = np.array(list(itertools.product([0.0, 1.0], repeat=cost.shape[1])))
    for cover, g, r, c in each(covers, gains, rest, cost):
        feasible = subsets[(subsets @ g.T >= r).all(1)]
        assert ((cover == 0) | (cover == 1)).all()
        assert (g @ cover >= r).all()
        yield c, total(cover * c), total(feasible * c, axis=1).min()


@pytest.mark.parametrize("demands", [1, 2, 3])
def test_cover_costs_at_most_one_move_more_than_the_best(demands):
    for cost, found, best in each_cover(*random_covers(demands), largest=False):
        assert found <= best + cost.max()


def test_cover_of_one_demand_by_equal_moves_is_optimal():
    gains, rest, cost = random_covers(1)
    for _, found, best in each_cover(gains, rest, torch.ones_like(cost), largest=False):
        assert found == best


@pytest.mark.parametrize(("demands", "factor"), [(1, 1.0), (2, 1.6), (3, 1.6)])
def test_cover_by_the_largest_cost(demands, factor):
    for _, found, best in each_cover(*random_covers(demands), largest=True):
        assert found <= factor * best


def test_cover_takes_all_useful_moves_where_they_are_not_enough():
    gains = torch.tensor([[[1.0, -1.0, 2.0, 0.0]]])
    assert _cover(gains, torch.tensor([[10.0]]), torch.ones(1, 4), largest=False).tolist() == [[1.0, 0.0, 1.0, 0.0]]


def random_points(rng, count, dims, binary):
    gamma = rng.uniform(0.9, 1.1, count) if binary else np.ones(count)
    return Points(*as_tensors(rng.random((count, dims)), rng.uniform(0.0, 0.5, count), gamma))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("program", PROGRAMS)
def test_solutions_belong_to_the_attacker(program, threshold, bounds):
    """In any units, and also for binarised images, its energy is below that of all defenders."""
    rng = np.random.default_rng(4)
    count, dims, binary = 12, 30, threshold is not None
    scale = 1.0 / (bounds[1] - bounds[0])
    images = torch.from_numpy(rng.random((count, dims)))

    def see(pixels):
        return (pixels > threshold).double() if binary else pixels

    setting = Setting(
        original=images / scale + bounds[0],
        model_images=images,
        seen=see(images),
        scale=torch.full((dims,), scale, dtype=torch.float64),
        bounds=bounds,
        threshold=threshold,
        margin=1e-3,
    )
    attackers = random_points(rng, count, dims, binary)
    defenders = [random_points(rng, count, dims, binary) for _ in range(3)]
    found = PROGRAMS[program].solve(setting, attackers, defenders)
    assert_in_box(found, *bounds)
    seen = see(scale * (found - bounds[0]))
    for defender in defenders:
        assert (attackers.energy(seen) <= defender.energy(seen)).all()
    assert any((d.energy(setting.seen) < attackers.energy(setting.seen)).any() for d in defenders)
