"""The Pointwise attack (Schott et al. 2018, section 4.3), decision based, with few queries."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import eagerpy as ep
import numpy as np
import numpy.typing as npt
from foolbox.attacks.base import MinimizationAttack
from foolbox.criteria import Criterion
from foolbox.distances import Distance, l2
from foolbox.models import Model

from abs_defense._checks import check_counts
from abs_defense.attacks._base import ContractAttack, L0Distance, Oracle, as_starting_points, some_images

Image = npt.NDArray[np.floating[Any]]
Search = Generator[Image, bool, Image]

_START_LEVELS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
_START_BISECTIONS = 4
_START_GAIN = 0.85
_HOPELESS_DRAWS = 5
_VALUE_SEARCH_STEPS = 6
_VALUE_SEARCH_GAIN = 0.01


class PointwiseAttack(ContractAttack):
    """Reset changed values of a noisy image to the original ones while it stays adversarial.

    Starting from an adversarial image, groups of changed values, in random order, are set back to the original; a
    group that cannot be is halved until single values are left. Groups grow while this succeeds. It ends, as the
    paper's attack does, when no single value can be set back (Schott et al. 2018, section 4.3). Needs decisions only,
    on any model and with any criterion of foolbox. Only images that are not finished are queried.

    Called with ``starting_points``, adversarial images of the shape of the inputs, it starts from those; an image whose
    starting point is not adversarial fails.

    With ``norm="l2"`` what is left is then moved towards the original, all values together and one by one, by
    bisection, until a round gains less than 1 %.

    Args:
        norm: what is minimised: ``"l0"``, the number of changed values, or ``"l2"``.
        restarts: runs from different starts and in different orders, of which the best counts; 10 in the paper.
        init_attack: minimisation attack that gives the starting points. By default the sparsest of ``start_draws``
            draws of salt and pepper noise.
        start_draws: see ``init_attack``. The first adversarial draw costs 10 queries at most, a later one 5 if it is
            sparser by 15 % and else a single one; none begins once a quarter of ``max_queries``, shared among the
            restarts, is spent. After 5 draws without an adversarial the restart is given up.
        max_queries: the most queries an image, over all restarts and with the one of the original; those of
            ``init_attack`` are not counted, nor the one with which foolbox judges the result of a call.
        seed: of all random choices. An image's result depends neither on its place in the batch nor on the others.

    Raises:
        ValueError: a setting is out of its range, or the input is not what the model takes.
    """

    def __init__(
        self,
        *,
        norm: Literal["l0", "l2"] = "l0",
        restarts: int = 1,
        init_attack: MinimizationAttack | None = None,
        start_draws: int = 20,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        if norm not in ("l0", "l2"):
            raise ValueError(f"norm: expected 'l0' or 'l2', got {norm!r}")
        check_counts(restarts=restarts, start_draws=start_draws, max_queries=max_queries)
        check_counts(0, seed=seed)
        self.norm = norm
        self.restarts = restarts
        self.init_attack = init_attack
        self.start_draws = start_draws
        self.max_queries = max_queries
        self.seed = seed

    @property
    def distance(self) -> Distance:
        return L0Distance() if self.norm == "l0" else l2

    def repeat(self, times: int) -> PointwiseAttack:
        """The same attack with ``times`` as many restarts: a repetition with the same seed would find the same."""
        check_counts(times=times)
        return PointwiseAttack(
            norm=self.norm,
            restarts=self.restarts * times,
            init_attack=self.init_attack,
            start_draws=self.start_draws,
            max_queries=None if self.max_queries is None else self.max_queries * times,
            seed=self.seed,
        )

    def _perturb(
        self,
        model: Model,
        x: ep.Tensor,
        criterion: Criterion,
        early_stop: float | None,
        starting_points: Any = None,
    ) -> ep.Tensor:
        starts = self._starting_points(model, criterion, x, starting_points)
        oracle = Oracle(model, criterion, x)
        flat = _as_numpy(x)
        searches = {
            row: _Run(
                flat[row],
                self._search(flat[row], None if starts is None else starts[row], model),
                self._size,
                self.max_queries,
                early_stop,
            )
            for row in np.flatnonzero(~oracle.clean).tolist()
        }
        result = flat.copy()
        while True:
            asked = {row: run.candidate for row, run in searches.items() if run.candidate is not None}
            if not asked:
                break
            rows = np.array(list(asked))
            candidates = _as_images(np.stack(list(asked.values())), x)
            for row, hit in zip(rows.tolist(), oracle(candidates, rows).tolist(), strict=True):
                searches[row].answer(hit)
        for row, run in searches.items():
            result[row] = run.best
        return _as_images(result, x)

    def _size(self, change: Image) -> float:
        return float(np.count_nonzero(change)) if self.norm == "l0" else float(np.linalg.norm(change))

    def _starting_points(
        self, model: Model, criterion: Criterion, x: ep.Tensor, given: Any
    ) -> npt.NDArray[np.floating[Any]] | None:
        if given is None and self.init_attack is None:
            return None
        if given is None:
            assert self.init_attack is not None
            points = _init_each(self.init_attack, model, criterion, x)
        else:
            points = given
        return _as_numpy(as_starting_points(points, x, model))

    def _search(self, x: Image, start: Image | None, model: Model) -> Search:
        best = x
        for restart in range(self.restarts):
            rng = np.random.default_rng([self.seed, restart])
            if start is None:
                budget = None if self.max_queries is None else self.max_queries // (4 * self.restarts)
                point = yield from _salt_and_pepper(x, model, rng, self.start_draws, budget)
            else:
                point = start if restart or (yield start) else None
            if point is None:
                if start is not None:
                    break
                continue
            best = yield from _reset(x, point, rng)
            if self.norm == "l2":
                best = yield from _move_closer(x, best, rng)
        return best


def _as_numpy(x: ep.Tensor) -> npt.NDArray[np.floating[Any]]:
    """``(N, ...)`` to ``(N, D)``; bfloat16, which NumPy lacks, in single precision."""
    try:
        array: npt.NDArray[np.floating[Any]] = x.numpy()
    except TypeError:
        array = x.float32().numpy()
    return array.reshape(len(x), -1)


def _as_images(flat: npt.NDArray[np.floating[Any]], like: ep.Tensor) -> ep.Tensor:
    """``(N, D)`` to images of the shape and type of ``like``."""
    return ep.from_numpy(like, flat).astype(like.dtype).reshape((len(flat), *like.shape[1:]))


@dataclass
class _Run:
    """The search on one image: what it wants to know next, and the best it found."""

    x: Image
    search: Search
    size: Any
    max_queries: int | None
    early_stop: float | None
    queries: int = 1  # of the original
    best_size: float = np.inf

    def __post_init__(self) -> None:
        self.best = self.x
        self.candidate: Image | None = None
        if self.max_queries != 1:
            self._next(None)

    def answer(self, hit: bool) -> None:
        assert self.candidate is not None
        self.queries += 1
        if hit:
            size = self.size(self.candidate - self.x)
            if size < self.best_size:
                self.best, self.best_size = self.candidate, size
        spent = self.max_queries is not None and self.queries >= self.max_queries
        if spent or (self.early_stop is not None and np.isfinite(self.best_size) and self.best_size <= self.early_stop):
            self.candidate = None
        else:
            self._next(hit)

    def _next(self, hit: bool | None) -> None:
        try:
            self.candidate = next(self.search) if hit is None else self.search.send(hit)
        except StopIteration:
            self.candidate = None


def _init_each(attack: MinimizationAttack, model: Model, criterion: Criterion, x: ep.Tensor) -> ep.Tensor:
    """Starting points of the whole batch, or, where one image makes the attack raise, image by image."""
    try:
        return attack.run(model, x, criterion)
    except (AssertionError, ValueError):
        return ep.concatenate(
            [_init_one(attack, model, some_images(criterion, np.array([i])), x[i : i + 1]) for i in range(len(x))]
        )


def _init_one(attack: MinimizationAttack, model: Model, criterion: Criterion, x: ep.Tensor) -> ep.Tensor:
    try:
        return attack.run(model, x, criterion)
    except (AssertionError, ValueError):
        return x


def _salt_and_pepper(
    x: Image, model: Model, rng: np.random.Generator, draws: int, budget: int | None
) -> Generator[Image, bool, Image | None]:
    """Noise of growing density until it is adversarial, then the least density of it by bisection; then other noise, as
    long as less than ``budget`` is spent, if it is adversarial at a density still lower. The one with the fewest
    changes, or None."""
    lower, upper = model.bounds
    levels: tuple[float, ...] = _START_LEVELS
    best, queries = None, 0
    for draw in range(draws):
        enough = draw == _HOPELESS_DRAWS if best is None else budget is not None and queries >= budget
        if enough:
            break
        u = rng.random(len(x))
        noise = np.where(rng.random(len(x)) < 0.5, lower, upper).astype(x.dtype)
        for sparse, dense in pairwise((0.0, *levels)):
            start = np.where(u < dense, noise, x)
            queries += 1
            if not (yield start):
                continue
            queries += _START_BISECTIONS
            for _ in range(_START_BISECTIONS):
                level = (sparse + dense) / 2
                candidate = np.where(u < level, noise, x)
                if (yield candidate):
                    start, dense = candidate, level
                else:
                    sparse = level
            levels = (_START_GAIN * dense,)
            if best is None or np.count_nonzero(start != x) < np.count_nonzero(best != x):
                best = start
            break
    return best


def _reset(x: Image, start: Image, rng: np.random.Generator) -> Search:
    """Set values back to those of ``x`` until no single one can be."""
    current = start
    failed = np.zeros(len(x), dtype=bool)  # single values that could not be set back since the last success
    while True:
        changed = rng.permutation(np.flatnonzero((current != x) & ~failed))
        if not len(changed):
            return current
        size = max(1, len(changed) // 8)
        while len(changed):
            group, changed = changed[:size], changed[size:]
            current = yield from _reset_group(x, current, group, failed)
            size = 2 * size if (current[group] == x[group]).all() else max(1, size // 2)


def _reset_group(
    x: Image, current: Image, group: npt.NDArray[np.int64], failed: npt.NDArray[np.bool_], known: bool = False
) -> Search:
    """Set the group back, or else its halves; ``known`` says that it cannot be set back as a whole."""
    if not known:
        candidate = current.copy()
        candidate[group] = x[group]
        if (candidate != x).any() and (yield candidate):
            failed[:] = False
            return candidate
    if len(group) == 1:
        failed[group] = True
        return current
    first, second = np.array_split(group, 2)
    current = yield from _reset_group(x, current, first, failed)
    known = bool((current[first] == x[first]).all())  # then setting back the second half repeats the whole group
    return (yield from _reset_group(x, current, second, failed, known))


def _move_closer(x: Image, current: Image, rng: np.random.Generator) -> Search:
    """Shrink the changes by bisection: all together, then one by one."""
    while True:
        size = np.linalg.norm(current - x)
        current = yield from _bisect(x, current, np.flatnonzero(current != x))
        for index in rng.permutation(np.flatnonzero(current != x)):
            current = yield from _bisect(x, current, np.array([index]))
        if np.linalg.norm(current - x) >= (1.0 - _VALUE_SEARCH_GAIN) * size:
            return current


def _bisect(x: Image, current: Image, values: npt.NDArray[np.int64]) -> Search:
    """Move ``values`` towards x as far as a bisection finds."""
    inner, outer = x[values], current[values]
    for _ in range(_VALUE_SEARCH_STEPS):
        candidate = current.copy()
        candidate[values] = middle = (inner + outer) / 2
        if (yield candidate):
            current, outer = candidate, middle
        else:
            inner = middle
    return current
