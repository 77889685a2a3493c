"""``certify``: from images and labels to certified radii."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from abs_defense._checks import check_choices, check_counts
from abs_defense._precision import full_precision
from abs_defense.certificates._estimated import LatentSearch, lowest_energies
from abs_defense.certificates._exact import ExactSearch
from abs_defense.certificates._finite import FiniteSearch
from abs_defense.certificates._lipschitz import lipschitz_radius, paper_radius
from abs_defense.certificates._points import PointSet
from abs_defense.certificates._reach import NORM_NAMES, Norm, Scene
from abs_defense.inference import IMAGE_SHAPE
from abs_defense.models import ABS
from abs_defense.models._images import check_images

Method = Literal["bisector", "lipschitz", "paper", "exact"]
METHODS: tuple[str, ...] = get_args(Method)
_BATCH = 64
_BATCH_ESTIMATED = 16


@dataclass(frozen=True)
class Certificate:
    """How far N images are from another class, at least.

    Attributes:
        radius: ``(N,)``, double precision. L2 and L-infinity: no perturbation of a smaller norm that keeps the image
            in [0, 1] changes the class. L0: no change of so many pixels does. Distances are in pixel values of [0, 1].
            0 for misclassified images; infinity where no perturbation at all is enough.
        proved: the radius holds for the model as it runs, rounding included. Else it is an estimate, because the
            minimum over the latents was searched numerically, as it is in the model's inference.
        method: as asked for.
        norm: as asked for.
        correct: ``(N,)``, whether the model gives the unperturbed image to its class.
        rival: ``(N,)``, the class that limits the radius, for misclassified images the predicted one; -1 for none.
        point: p of that class's point (p, k) that limits the radius, ``(N, 1, 28, 28)``; NaN where there is none, and
            for ``"lipschitz"`` and ``"paper"``, which bound all points at once.
        offset: its k, ``(N,)``.
        anchor: p of the point of the true class that holds it off, as ``point``; NaN for ``"exact"``, which needs all
            of them.
        anchor_offset: its k, ``(N,)``.
        adversarial: for ``"exact"``: the nearest image of another class, ``(N, 1, 28, 28)``, up to rounding; the
            image itself where it is misclassified, NaN where there is none. None for other methods.
    """

    radius: Tensor
    proved: bool
    method: Method
    norm: Norm
    correct: Tensor
    rival: Tensor
    point: Tensor
    offset: Tensor
    anchor: Tensor
    anchor_offset: Tensor
    adversarial: Tensor | None = None


def certify(
    model: ABS,
    x: Tensor,
    y: Tensor,
    norm: Norm = "l2",
    method: Method = "bisector",
    *,
    anchors: int = 20,
    starts: int = 4,
    progress: bool = False,
) -> Certificate:
    """Certified radii of images under ABS, Binary ABS and prototype ABS.

    ABS gives x to the class of the point (p, k) with the lowest energy ``||p - x||^2 + k``; the points are the
    decoded latents, ``k = beta ||z||^2 / 2``. For a point a of the true class y and a point b of another class,
    x + d can go from a to b only if ``2 d . (p_b - p_a) >= E_b(x) - E_a(x)``.

    Methods:

    - ``"bisector"`` (ours; for nearest-prototype classifiers Voracek and Hein, ICML 2022): the smallest d in the box
      that satisfies this, for the best of several a and the worst b. All norms, all models.
    - ``"exact"``: all points a at once, by quadratic programs. L2, ABS with ``steps=0``.
    - ``"lipschitz"``: ``min_c (sqrt(E_c) - sqrt(E_y)) / 2`` (the hypothesis margin of Saralajew et al., NeurIPS 2020).
      L2, ABS.
    - ``"paper"``: ``min_c (d_c^2 - E_y) / (2 (d_c + r_y))`` (Schott et al. 2018, section 5). L2, ABS.

    With ``steps=0`` the points are finitely many and all of them are looked at: the radius is proved for the model
    that runs, a bound of its rounding errors is subtracted. With latent descent it is an estimate, because a latent
    that nobody found could be better, and because next to the image the model's own descent, above all a short one
    from few prototypes, may miss one that was found.

    Args:
        model: ``ABS`` or ``BinaryABS``.
        x: images ``(N, 1, 28, 28)`` in [0, 1].
        y: their labels ``(N,)``.
        norm: ``"l2"``, ``"linf"`` or ``"l0"`` (pixels).
        method: see above.
        anchors: points of the true class that ``"bisector"`` tries with ``steps=0``; more only raise the radius.
        starts: descents from different prototypes for every class, for a model with latent descent.
        progress: show a progress bar.

    Returns:
        The certificate, on the device of the model.

    Raises:
        TypeError: the model is a wrapper around ABS, has a forward or call of its own, a hook before it or one after it
            that changes the logits of the images, or is something else; the images or labels are no tensors.
        ValueError: unknown norm or method, a method that does not serve the norm or the model, wrong images, labels
            of another shape or type or out of range.
    """
    _check(model, x, y, norm, method, anchors, starts)
    device = model.prototype_latents.device
    finite = model.settings.steps == 0
    with torch.inference_mode(False), torch.no_grad(), full_precision(device):
        x, y = x.detach().to(device).clone(), y.detach().to(device, torch.long).clone()
        out = _empty(x, y, norm, method, proved=finite)
        prediction = torch.cat([_logits(model, part).argmax(1) for part in x.split(256)]) if len(x) else y
        correct = prediction == y
        out.correct.copy_(correct)
        out.radius[~correct] = 0.0
        out.rival[~correct] = prediction[~correct]
        if out.adversarial is not None:
            out.adversarial[~correct] = x[~correct].double()
        if model.num_classes == 1:
            out.radius.fill_(torch.inf)
            return out
        scene = Scene(x.flatten(1).clamp(0.0, 1.0).double(), norm, model.binary_threshold)
        points = PointSet.of(model) if finite else None
        with tqdm(total=len(x), desc=f"certify, {method}, {norm}", unit="img", disable=not progress) as bar:
            bar.update(int((~correct).sum()))
            for rows in (
                _batches_of_one_class(correct, y) if finite else correct.nonzero()[:, 0].split(_BATCH_ESTIMATED)
            ):
                if not len(rows):
                    continue
                if method in ("lipschitz", "paper"):
                    _by_energies(out, model, points, scene.images[rows], y[rows], rows, starts)
                    bar.update(len(rows))
                elif points is None:
                    _estimated(out, model, scene[rows], y[rows], rows, starts)
                    bar.update(len(rows))
                else:
                    search = FiniteSearch(points, scene[rows], int(y[rows[0]]), anchors)
                    for i, row in enumerate(rows.tolist()):
                        (_exact if method == "exact" else _bisector)(out, points, search, i, row)
                        bar.update()
    return out


def _logits(model: ABS, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    everywhere = torch.nn.modules.module
    if model._forward_hooks or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        without = model.forward(x)
        if found.shape != without.shape or not torch.allclose(found, without, rtol=1e-4):
            raise TypeError("model: a forward hook changes its logits, of which a certificate says nothing")
    return found


def _batches_of_one_class(correct: Tensor, labels: Tensor) -> list[Tensor]:
    """Rows of correctly classified images."""
    batches: list[Tensor] = []
    for c in labels[correct].unique().tolist():
        batches += (correct & (labels == c)).nonzero()[:, 0].split(_BATCH)
    return batches


def _bisector(out: Certificate, points: PointSet, search: FiniteSearch, i: int, row: int) -> None:
    found = search.bisector(i)
    out.radius[row] = found.radius
    if found.rival >= 0:
        _set_point(out, points, row, found.rival, found.index)
        out.anchor[row] = points.images[search.label, found.anchor].double().view(IMAGE_SHAPE)
        out.anchor_offset[row] = points.offsets[search.label, found.anchor]


def _exact(out: Certificate, points: PointSet, search: FiniteSearch, i: int, row: int) -> None:
    found = ExactSearch(search, i).run()
    out.radius[row] = found.radius
    if found.rival >= 0:
        _set_point(out, points, row, found.rival, found.index)
    if found.adversarial is not None:
        assert out.adversarial is not None
        out.adversarial[row] = found.adversarial.view(IMAGE_SHAPE)


def _set_point(out: Certificate, points: PointSet, row: int, rival: int, index: int) -> None:
    out.rival[row] = rival
    out.point[row] = points.images[rival, index].double().view(IMAGE_SHAPE)
    out.offset[row] = points.offsets[rival, index]


def _estimated(out: Certificate, model: ABS, scene: Scene, labels: Tensor, rows: Tensor, starts: int) -> None:
    found = LatentSearch(model, scene, labels, starts).run()
    out.radius[rows], out.rival[rows] = found.radius, found.rival
    out.point[rows], out.offset[rows] = found.point.view(-1, *IMAGE_SHAPE), found.offset
    out.anchor[rows], out.anchor_offset[rows] = found.anchor.view(-1, *IMAGE_SHAPE), found.anchor_offset


def _by_energies(
    out: Certificate,
    model: ABS,
    points: PointSet | None,
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    starts: int,
) -> None:
    own = labels[:, None]
    if points is None:
        slack = torch.zeros_like(images[:, 0])
        energies, latents = lowest_energies(model, images, starts, model.settings.beta)
        distances = lowest_energies(model, images, starts, 0.0)[0].sqrt() if out.method == "paper" else energies
        own_energy = energies.gather(1, own)[:, 0]
        kl = 0.5 * model.settings.beta * latents.double().square().sum(-1).gather(1, own)[:, 0]
        own_distance = (own_energy - kl).clamp_min(0.0).sqrt()
    else:
        slack = points.slack[labels]
        energies, index = points.nearest(images)
        own_index = index.gather(1, own)[:, 0]
        distances = points.nearest(images, offsets=False)[0].sqrt() if out.method == "paper" else energies
        own_energy = energies.gather(1, own)[:, 0]
        own_distance = (own_energy - points.offsets[labels, own_index]).clamp_min(0.0).sqrt()
    if out.method == "paper":
        radius = paper_radius(distances, own_energy, own_distance, labels, slack)
    else:
        radius = lipschitz_radius(energies, labels, slack)
    out.radius[rows], out.rival[rows] = radius


def _empty(x: Tensor, y: Tensor, norm: Norm, method: Method, *, proved: bool) -> Certificate:
    n = len(x)
    number = x.new_full((n,), torch.nan, dtype=torch.float64)
    image = x.new_full((n, *IMAGE_SHAPE), torch.nan, dtype=torch.float64)
    return Certificate(
        radius=number.clone(),
        proved=proved,
        method=method,
        norm=norm,
        correct=torch.zeros_like(y, dtype=torch.bool),
        rival=torch.full_like(y, -1),
        point=image.clone(),
        offset=number.clone(),
        anchor=image.clone(),
        anchor_offset=number.clone(),
        adversarial=image.clone() if method == "exact" else None,
    )


def _check(model: ABS, x: Tensor, y: Tensor, norm: str, method: str, anchors: int, starts: int) -> None:
    if not isinstance(model, ABS):
        raise TypeError(
            f"model: expected ABS or BinaryABS, got {type(model).__name__}; for a wrapped model pass the module inside"
        )
    own = type(model).forward is not ABS.forward or type(model).__call__ is not ABS.__call__ or "forward" in vars(model)
    if own or model._forward_pre_hooks:
        raise TypeError(
            f"model: {type(model).__name__} changes what ABS.forward sees or returns (a forward or call of its own, or "
            "a forward pre-hook), of which a certificate says nothing"
        )
    check_choices(norm=(norm, NORM_NAMES), method=(method, METHODS))
    if method != "bisector" and norm != "l2":
        raise ValueError(f"method {method!r} is for norm 'l2', got {norm!r}; 'bisector' serves all norms")
    if method != "bisector" and model.binary_threshold is not None:
        raise ValueError(f"method {method!r} is for ABS, which sees the image itself; for Binary ABS use 'bisector'")
    if method == "exact" and model.settings.steps:
        raise ValueError(
            f"method 'exact' needs finitely many points: a model with steps=0, got steps={model.settings.steps}"
        )
    check_counts(anchors=anchors, starts=starts)
    check_images(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a torch.Tensor of labels, got {type(y).__name__}")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y: expected {len(x)} integer labels, one an image, got {tuple(y.shape)} of {y.dtype}")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < model.num_classes:
        raise ValueError(
            f"y: expected classes from 0 to {model.num_classes - 1}, got values from {int(y.min())} to {int(y.max())}"
        )
