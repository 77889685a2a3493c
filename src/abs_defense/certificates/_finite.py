"""The least bisector bound over all points of a finite set: a proof."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abs_defense.certificates._points import PointSet
from abs_defense.certificates._reach import PointBatch, Scene

_FIRST_SHORTLIST = 64
_FIRST_CHUNK = 8
_LARGEST_CHUNK = 512
_TINY = 1e-150


@dataclass(frozen=True)
class Binding:
    """What limits the radius of one image: point ``index`` of class ``rival``, held off by ``anchor`` of its own."""

    radius: float
    rival: int
    index: int
    anchor: int


@dataclass
class Candidates:
    """Points of other classes for one image, in the order of a cheap lower bound of their radii.

    Attributes:
        bounds: ``(M,)``, rising.
        classes, index: ``(M,)``.
        rest: no other point has a lower bound than this.
    """

    bounds: Tensor
    classes: Tensor
    index: Tensor
    rest: float


@dataclass
class Anchors:
    """The nearest points of the image's own class, ``(A,)``."""

    index: Tensor
    points: PointBatch


class FiniteSearch:
    """Bounds for images of one class against all points of the others.

    A matrix product gives a lower bound for every point; in its order, points are looked at more closely, until the
    next bound exceeds the best radius. The products are of single precision: what rounding can do is subtracted from
    them. All that decides is computed in double precision.

    Args:
        points: of all classes.
        scene: the images.
        label: their class.
        anchors: how many points of the class to hold against each attacker.
    """

    def __init__(self, points: PointSet, scene: Scene, label: int, anchors: int) -> None:
        self.points, self.scene, self.label = points, scene, label
        self.slack = float(points.slack[label])
        self.seen = scene.seen
        self.product = points.images.dtype if points.images.dtype == torch.float64 else torch.float32
        own = self._energies(label)
        self._anchor_index = own.topk(min(anchors, own.shape[1]), largest=False).indices
        self._bounds: dict[int, Tensor] = {}
        self._shortlist_size = _FIRST_SHORTLIST
        self._make_shortlists()

    def anchors(self, row: int) -> Anchors:
        index = self._anchor_index[row]
        return Anchors(index, self.points.batch(torch.full_like(index, self.label), index, self.seen[row : row + 1]))

    def candidates(self, row: int, size: int) -> Candidates:
        """At least ``size`` points of other classes, or all of them."""
        while self._shortlist_size < size and self._shortlist_size < self.points.offsets.shape[1]:
            self._shortlist_size *= 8
            self._make_shortlists()
        return Candidates(
            self._short_bounds[row], self._short_classes[row], self._short_index[row], float(self._rest[row])
        )

    def _make_shortlists(self) -> None:
        """Of every class its points of the lowest bounds, merged."""
        size = min(self._shortlist_size, self.points.offsets.shape[1])
        bounds, classes, index = [], [], []
        for c in range(len(self.points.gamma)):
            if c != self.label:
                found = self._cheap_bounds(c).topk(size, largest=False)
                bounds.append(found.values)
                index.append(found.indices)
                classes.append(torch.full_like(found.indices, c))
        order = torch.cat(bounds, 1).sort(dim=1)
        self._short_bounds = order.values
        self._short_classes = torch.cat(classes, 1).gather(1, order.indices)
        self._short_index = torch.cat(index, 1).gather(1, order.indices)
        complete = size == self.points.offsets.shape[1]
        last = torch.stack([part.amax(1) for part in bounds]).amin(0)
        self._rest = torch.full_like(last, torch.inf) if complete else last

    def _energies(self, c: int) -> Tensor:
        """Of all points of a class at all images ``(n, K)``, less what all share, in the precision of the products."""
        points, offsets = self.points.images[c].to(self.product), self.points.offsets[c]
        squares = (self.points.squares[c] + offsets).to(self.product)
        return torch.addmm(squares, self.seen.to(self.product), points.T, alpha=-2.0)

    def _cheap_bounds(self, c: int) -> Tensor:
        """Lower bounds ``(n, K)`` of the radii of all points of a class, by one anchor and without the box."""
        if c not in self._bounds:
            self._bounds[c] = self._compute_cheap_bounds(c)
        return self._bounds[c]

    def _compute_cheap_bounds(self, c: int) -> Tensor:
        points = self.points
        dtype = self.product
        gamma = float(points.gamma[c])
        first = self._anchor_index[:, 0]
        own = points.batch(torch.full_like(first, self.label), first, self.seen)
        others = points.images[c].to(dtype)
        error = _product_error(points, others)
        energies = gamma * (self._energies(c).double() + self.seen.square().sum(1, keepdim=True))
        lacking = (energies - own.energies[:, None] - self.slack - gamma * error).clamp_min(0.0)
        if self.scene.threshold is not None:
            return self._cheap_bounds_of_flips(lacking, own, others, gamma)
        distances = _squared_distances(own.images.to(dtype), others).sqrt().clamp_min(_TINY)
        if self.scene.norm == "l0":
            return _count(0.5 * lacking, distances, 1.0)
        if self.scene.norm == "linf":
            brighter, darker = self.scene.images < 1.0, self.scene.images > 0.0
            useful = 0.5 * self._sums_of_gains(own, others, 1.0, brighter.double(), darker.double())
            distances = torch.minimum(useful.clamp_min(_TINY), self.scene.images.shape[1] ** 0.5 * distances)
        return 0.5 * lacking / distances

    def _cheap_bounds_of_flips(self, lacking: Tensor, own: PointBatch, others: Tensor, gamma: float) -> Tensor:
        gamma_own = float(own.gamma[0])
        highest = gamma + gamma_own
        if self.scene.norm == "l0":
            ways = _squared_distances(
                (gamma_own * (1.0 - 2.0 * own.images)).to(others.dtype), gamma * (1.0 - 2.0 * others)
            )
            return _count(lacking, ways.sqrt(), highest)
        assert self.scene.threshold is not None
        across = (self.scene.images - self.scene.threshold).abs()
        bound = torch.zeros_like(lacking)
        for level in torch.linspace(0.02, 0.5, 25).tolist():
            if self.scene.norm == "linf":
                # Flips nearer than the level don't gain enough.
                gains = self._sums_of_flips(own, others, gamma, (across < level).double())
                bound = torch.where(gains < lacking, level, bound)
            else:
                # min sum of prices with enough gain >= t lacking - sum (t gain - price)^+ for any t, and the last
                # term is convex in the gain, so at most its chord between 0 and the highest gain.
                t = level**2 / highest
                chord = (level**2 - across.square()).clamp_min(0.0) / highest
                least = t * lacking - self._sums_of_flips(own, others, gamma, chord)
                bound = torch.maximum(bound, least.clamp_min(0.0).sqrt())
        return bound

    def _sums_of_flips(self, own: PointBatch, others: Tensor, gamma: float, weights: Tensor) -> Tensor:
        dark = 1.0 - self.seen
        return self._sums_of_gains(own, others, gamma, weights * dark, weights * self.seen)

    def _sums_of_gains(self, own: PointBatch, others: Tensor, gamma: float, up: Tensor, down: Tensor) -> Tensor:
        """Upper bounds ``(n, K)`` of weighted sums over the pixels: of the gains of becoming brighter with weights
        ``up`` and of becoming darker with weights ``down``, ``(n, D)``.

        With P = gamma_b p_b and Q = gamma_a p_a, both at most g, the gains are ``(2 P - 2 Q + gamma_a - gamma_b)^+``
        and its opposite, and ``(P - Q)^+ = P - min(P, Q) <= P - P Q / g``: products again, and tight where points
        are nearly binary.
        """
        gamma_own = float(own.gamma[0])
        scaled = gamma_own * own.images
        shared = scaled / max(gamma, gamma_own)
        way = 2.0 * gamma * (up * (1.0 - shared) - down * shared)
        constant = 2.0 * (down * scaled).sum(1)
        constant += max(gamma_own - gamma, 0.0) * up.sum(1) + max(gamma - gamma_own, 0.0) * down.sum(1)
        error = 4.0 * _terms(others) * float(way.abs().sum(1).amax())
        return constant[:, None] + (way.to(others.dtype) @ others.T).double() + error

    def refine(
        self, row: int, candidates: Candidates, part: slice, anchors: Anchors, every: bool
    ) -> tuple[Tensor, Tensor]:
        """Radii ``(m,)`` of points with the box, and which anchor holds them off best.

        Args:
            every: try every anchor, not only the one that is best without the box.
        """
        classes, index = candidates.classes[part], candidates.index[part]
        m, count = len(classes), len(anchors.index)
        attackers = self.points.batch(classes, index, self.seen[row : row + 1])
        attackers = PointBatch(attackers.images, attackers.energies - self.slack, attackers.gamma)
        if every:
            attacker = torch.arange(m, device=classes.device).repeat_interleave(count)
            anchor = torch.arange(count, device=classes.device).repeat(m)
        else:
            attacker = torch.arange(m, device=classes.device)
            anchor = self._best_without_box(attackers, anchors.points)
        scene = self.scene[torch.full_like(attacker, row)]
        radius, _ = scene.reach(attackers[attacker], anchors.points[anchor])
        best = radius.view(m, -1).max(1)
        return best.values, anchor.view(m, -1).gather(1, best.indices[:, None])[:, 0]

    def _best_without_box(self, attackers: PointBatch, anchors: PointBatch) -> Tensor:
        lacking = attackers.energies[:, None] - anchors.energies
        if self.scene.threshold is None:
            ways = torch.cdist(attackers.images, anchors.images, p=1.0 if self.scene.norm == "linf" else 2.0)
        else:
            ways = torch.cdist(
                attackers.gamma[:, None] * (1.0 - 2.0 * attackers.images),
                anchors.gamma[:, None] * (1.0 - 2.0 * anchors.images),
            )
        return (lacking / ways.clamp_min(_TINY)).argmax(1)

    def bisector(self, row: int) -> Binding:
        """The least radius over all points of other classes."""
        anchors = self.anchors(row)
        size, chunk = _FIRST_SHORTLIST, _FIRST_CHUNK
        candidates = self.candidates(row, size)
        radii, holders = candidates.bounds[:0], candidates.index[:0]
        final: set[int] = set()
        while True:
            least, done = float(radii.amin()) if len(radii) else torch.inf, len(radii)
            more = int((candidates.bounds[done : done + chunk] < least).sum())
            if more:
                found = self.refine(row, candidates, slice(done, done + more), anchors, every=False)
                radii, holders = torch.cat([radii, found[0]]), torch.cat([holders, found[1]])
                chunk = min(2 * chunk, _LARGEST_CHUNK)
            elif candidates.rest < least:
                size *= 8
                candidates = self.candidates(row, size)
                radii, holders, final = radii[:0], holders[:0], set()
            elif not done or (best := int(radii.argmin())) in final:
                break
            else:
                radii[best : best + 1], holders[best : best + 1] = self.refine(
                    row, candidates, slice(best, best + 1), anchors, every=True
                )
                final.add(best)
        if not len(radii) or float(radii[best]) == torch.inf:
            return Binding(torch.inf, -1, -1, -1)
        return Binding(
            float(radii[best]),
            int(candidates.classes[best]),
            int(candidates.index[best]),
            int(anchors.index[holders[best]]),
        )


def _count(lacking: Tensor, length: Tensor, highest: float) -> Tensor:
    """A number of gains that do not add up to ``lacking``, if none is above ``highest`` and the root of the sum of
    their squares is at most ``length``."""
    least = torch.maximum((lacking / length.clamp_min(_TINY)).square(), lacking / highest)
    return (least * (1.0 - 1e-9)).ceil().clamp_min(1.0) - 1.0


def _squared_distances(own: Tensor, others: Tensor) -> Tensor:
    """||own - others||^2, ``(n, K)``, rounded up: each square may be wrong by ``_terms`` of itself, the product by four
    times as much of the largest."""
    squares = own.square().sum(1, keepdim=True), others.square().sum(1)
    error = 6.0 * _terms(own) * float(torch.maximum(squares[0].amax(), squares[1].amax()))
    return torch.addmm(squares[0] + squares[1], own, others.T, alpha=-2.0).double().clamp_min(0.0) + error


def _product_error(points: PointSet, images: Tensor) -> float:
    """What rounding can change in ``||p||^2 + k - 2 s . p`` for a class's points and any s in [0, 1]."""
    finite = points.offsets[points.offsets.isfinite()]
    largest = float(points.squares.amax())
    return _terms(images) * (largest + float(finite.amax()) + 2.0 * math.sqrt(images.shape[-1] * largest))


def _terms(images: Tensor) -> float:
    """Relative error of a sum of products over the pixels, see ``PointSet.slack``."""
    terms = (images.shape[-1] + 16) * 0.5 * torch.finfo(images.dtype).eps
    return float(terms / (1.0 - terms))
