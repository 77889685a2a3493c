"""Evaluations side by side: the paper's table, a column a model; and the same models of two runs, image by image."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import stats

from abs_defense.benchmark._job import Finished, read_evaluation
from abs_defense.benchmark._published import PUBLISHED
from abs_defense.benchmark._runner import Result
from abs_defense.benchmark._suite import NORMS
from abs_defense.benchmark._table import Row, certified, of_certificates, smallest_distances
from abs_defense.certificates import Norm
from abs_defense.data import ImageSet

_CLOSE = 1e-3  # relative; distances no further apart count as the same
_RESAMPLES = 9999
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """What ``compare_evaluations`` found.

    Attributes:
        table: one row a norm and attack, with the median distance over all images (0 where the model errs) on each
            model, the column of that name; then all attacks together and what the paper reports, both with the accuracy
            at the threshold; then certificates: mean radius and certified accuracy. Blank: not
            run, or not finished.
        pairs: one row a norm and pair of models that have the same name in different folders: mean distances and
            accuracies at the threshold under the attacks that both met, by how much the first mean is larger, and the
            95 % interval of that by bootstrap over the images, which both share.
        against: one row a reference attack, model and other attack of its norm, image by image: how many images the
            model classifies correctly; on how many the attack's distance is smaller and larger than the reference's, by
            more than a thousandth; the least, median and largest ratio of the two distances, over images that the
            reference broke; on how many images the attack's is smaller than that of every adversarial that another
            attack found, those made for another norm included.
    """

    table: list[Row]
    pairs: list[Row]
    against: list[Row]


@dataclass(frozen=True)
class _Column:
    """A model with the results of every folder that evaluated it."""

    name: str
    model: str
    kind: str
    settings: Any
    results: list[Result]

    def arrays(self, measurement: str, field: str) -> npt.NDArray[Any] | None:
        return next((r.arrays[field] for r in self.results if r.attack == measurement), None)

    def smallest(self, norm: Norm, data: ImageSet, attacks: Collection[str] | None = None) -> npt.NDArray[Any] | None:
        """Per image the smallest distance of all attacks, or of some."""
        chosen = [r for r in self.results if attacks is None or r.attack in attacks]
        return smallest_distances(chosen, self.model, norm, data)


def compare_evaluations(folders: Sequence[str | Path], against: Sequence[str] = ()) -> Comparison:
    """Compare finished evaluations of the same images.

    A model that several folders evaluated with the same weights and settings is one column, with the attacks of all of
    them.

    Args:
        folders: of ``run_evaluation``; one will do.
        against: attacks to compare all others of their norm with, image by image.

    Raises:
        FileNotFoundError: a folder holds no evaluation.
        ValueError: no folder; evaluations of different images; an attack with different settings on one model; an
            attack in ``against`` that met no model.
    """
    if not folders:
        raise ValueError("folders: expected at least one evaluation, got none")
    found = [read_evaluation(folder) for folder in folders]
    data = found[0].data
    for folder, evaluation in zip(folders, found, strict=True):
        if evaluation.data.sha256() != data.sha256():
            raise ValueError(
                f"evaluations: expected the same images in all, got {len(data)} of {data.name} in {folders[0]} and "
                f"other {len(evaluation.data)} of {evaluation.data.name} in {folder}"
            )
    columns = _columns([str(folder) for folder in folders], found)
    met = {r.attack for c in columns for r in c.results if "distances" in r.arrays}
    for reference in against:
        if reference not in met:
            raise ValueError(
                f"against: expected an attack that met a model, of {', '.join(sorted(met))}; got {reference}"
            )
    rows = (row for reference in against for column in columns for row in _against(reference, column, data))
    return Comparison(list(_table(columns, data)), list(_pairs(columns, data)), list(rows))


def _columns(folders: Sequence[str], evaluations: Sequence[Finished]) -> list[_Column]:
    columns: list[_Column] = []
    origins: list[str] = []
    settings_of: dict[tuple[int, str], Any] = {}
    for folder, evaluation in zip(folders, evaluations, strict=True):
        for model, kind in evaluation.kinds.items():
            settings = evaluation.manifest["models"][model]
            own = [r for r in evaluation.results if r.model == model and r.arrays]
            index = next((i for i, c in enumerate(columns) if (c.model, c.settings) == (model, settings)), len(columns))
            if index == len(columns):
                columns.append(_Column(model, model, kind, settings, []))
                origins.append(folder)
            known = {r.attack for r in columns[index].results}
            for result in own:
                wanted = evaluation.manifest["measurements"][result.attack]
                if settings_of.setdefault((index, result.attack), wanted) != wanted:
                    where = f"{origins[index]} and {folder}"
                    raise ValueError(f"{model}: {result.attack} has different settings in {where}")
                if result.attack not in known:
                    columns[index].results.append(result)
    names = [c.model for c in columns]
    return [
        replace(c, name=f"{c.model} ({origin})") if names.count(c.model) > 1 else c
        for c, origin in zip(columns, origins, strict=True)
    ]


def _table(columns: Sequence[_Column], data: ImageSet) -> Iterator[Row]:
    for norm, spec in NORMS.items():
        attacks = [r.attack for c in columns for r in c.results if r.norm == norm and "distances" in r.arrays]
        for attack in dict.fromkeys(attacks):
            distances = [c.arrays(attack, "distances") for c in columns]
            yield _row(norm, attack, columns, [None if d is None else _median(d, norm) for d in distances])
        smallest = [c.smallest(norm, data) for c in columns]
        if any(d is not None for d in smallest):
            title = f"all attacks, at {spec.threshold:g}"
            cells = [
                None if d is None else f"{_median(d, norm)}, {_percent((d > spec.threshold).mean())}" for d in smallest
            ]
            yield _row(norm, title, columns, cells)
            reported = [PUBLISHED.get(c.kind, {}).get(norm) for c in columns]
            cells = [None if p is None else f"{_distance(p.median, norm)}, {_percent(p.accuracy)}" for p in reported]
            yield _row(norm, f"published, at {spec.threshold:g}", columns, cells)
        certificates = [r.attack for c in columns for r in of_certificates(c.results, c.model, norm)]
        for name in dict.fromkeys(certificates):
            cells = []
            for column in columns:
                radii = column.arrays(name, "radius")
                if radii is None:
                    cells.append(None)
                else:
                    share = certified(radii, spec.threshold, norm).mean()
                    cells.append(f"{radii.mean():.3f}, {_percent(share)}")
            yield _row(norm, f"{name}: mean radius, at {spec.threshold:g}", columns, cells)


def _pairs(columns: Sequence[_Column], data: ImageSet) -> Iterator[Row]:
    for first, second in itertools.combinations(columns, 2):
        if first.model != second.model:
            continue
        for norm, spec in NORMS.items():
            met = {r.attack for r in first.results} & {r.attack for r in second.results}
            a, b = (c.smallest(norm, data, met) for c in (first, second))
            if a is None or b is None:
                continue
            row: Row = {"norm": spec.label, "models": f"{first.name} / {second.name}", "images": len(data)}
            finite = bool(np.isfinite([a, b]).all()) and b.mean() > 0
            means = [_distance(float(d.mean()), norm, more=1) for d in (a, b)] if finite else []
            row["mean distances"] = " / ".join(means) or "not all images were broken"
            row["accuracy at threshold"] = " / ".join(_percent((d > spec.threshold).mean()) for d in (a, b))
            if finite:
                low, high = _interval(a, b)
                row["difference"] = f"{a.mean() / b.mean() - 1.0:+.1%}"
                row[f"{_CONFIDENCE:.0%} interval"] = f"{low - 1.0:+.1%} to {high - 1.0:+.1%}"
            yield row


def _against(reference: str, column: _Column, data: ImageSet) -> Iterator[Row]:
    base = column.arrays(reference, "distances")
    if base is None:
        return
    own = next(r.norm for r in column.results if r.attack == reference)
    norm = next(norm for norm in NORMS if norm == own)
    for result in column.results:
        if result.norm != norm or result.attack == reference or "distances" not in result.arrays:
            continue
        found = result.arrays["distances"]
        others = column.smallest(norm, data, [r.attack for r in column.results if r.attack != result.attack])
        assert others is not None
        correct = base > 0
        broken = correct & np.isfinite(base)
        ratios = np.sort(found[broken] / base[broken])
        yield {
            "norm": NORMS[norm].label,
            "model": column.name,
            "attack": result.attack,
            "against": reference,
            "images": int(correct.sum()),
            "smaller": int((found < (1.0 - _CLOSE) * base).sum()),
            "larger": int((found > (1.0 + _CLOSE) * base).sum()),
            "ratio": ", ".join(f"{r:.3f}" for r in (ratios[0], np.median(ratios), ratios[-1])) if len(ratios) else "",
            "alone smallest": int((found < (1.0 - _CLOSE) * others).sum()),
        }


def _interval(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[float, float]:
    """Of mean(a) / mean(b), by the paired percentile bootstrap."""

    def ratio(x: npt.NDArray[Any], y: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
        return cast("npt.NDArray[Any]", x.mean(axis=axis) / y.mean(axis=axis))

    found = stats.bootstrap(
        (a.astype(np.float64), b.astype(np.float64)),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _row(norm: Norm, name: str, columns: Sequence[_Column], cells: Sequence[str | None]) -> Row:
    return {"norm": NORMS[norm].label, "": name, **{c.name: x or "" for c, x in zip(columns, cells, strict=True)}}


def _median(distances: npt.NDArray[Any], norm: Norm) -> str:
    return _distance(float(np.median(distances)), norm)


def _distance(value: float, norm: Norm, more: int = 0) -> str:
    if np.isinf(value):
        return "none found"
    if norm == "l0" and not more:
        return f"{value:g}"
    return f"{value:.{ {'l2': 2, 'linf': 3, 'l0': 1}[norm] + more }f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
