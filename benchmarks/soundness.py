"""Certified radii against attacks: does any attack ever come below a proved radius, and how often below an estimate?

    python benchmarks/soundness.py --data-dir FOLDER [--images 300] [--model prototype-abs] [--norm l2]

For every image: the certified radius (bisector; in L2 also Lipschitz and, where radii are proved, exact), and the
smallest perturbation that any of several attacks finds. Besides the minimal attacks, projected gradient descent runs
inside each image's own radius, where a proof allows no success, and starts right outside of it: the images that the
certificate's own worst point claims to win, pushed on until they are misclassified. For estimates, radii that an attack
beats are counted and listed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import foolbox as fb
import torch
from torch import Tensor

from abs_defense import BinaryABS, certify, load_model
from abs_defense.attacks import L0BisectorAttack, L2BisectorAttack, LInfBisectorAttack, PointwiseAttack
from abs_defense.certificates import NORM_NAMES
from abs_defense.data import foolbox_digits, load_idx_dataset

ATTACKS = {
    "l2": {
        "bisector": L2BisectorAttack(),
        "DDN, 100 steps": fb.attacks.DDNAttack(steps=100),
        "FMN, 100 steps": fb.attacks.L2FMNAttack(steps=100),
    },
    "linf": {
        "bisector": LInfBisectorAttack(),
        "FMN, 100 steps": fb.attacks.LInfFMNAttack(steps=100),
    },
    "l0": {"bisector": L0BisectorAttack(), "Pointwise": PointwiseAttack(restarts=3)},
}
PGD = {
    "l2": fb.attacks.L2ProjectedGradientDescentAttack(steps=20),
    "linf": fb.attacks.LinfProjectedGradientDescentAttack(steps=20),
}


def sizes(change: Tensor, norm: str) -> Tensor:
    flat = change.flatten(1).double()
    return {"l2": flat.norm(dim=1), "linf": flat.abs().amax(1), "l0": (flat != 0).sum(1).double()}[norm]


def misclassified(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) for x in images.split(500)]) != labels


def at_the_radius(norm: str, model: torch.nn.Module, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Smallest perturbation that PGD finds inside balls of 0.9 to 1.3 radii, image by image; infinity if none."""
    best = torch.full_like(radius, torch.inf)
    for share in (0.9, 0.99, 1.0, 1.02, 1.05, 1.1, 1.3):
        for i in (radius > 0).nonzero()[:, 0].tolist():
            wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
            epsilon = float(share * radius[i])
            found = PGD[norm].run(wrapped, x[i : i + 1], fb.Misclassification(y[i : i + 1]), epsilon=epsilon)
            if misclassified(model, found, y[i : i + 1]):
                best[i] = min(float(best[i]), float(sizes(found - x[i : i + 1], norm)))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="IDX files; default: foolbox's 20 digits")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--model", default="prototype-abs")
    parser.add_argument("--weights")
    parser.add_argument("--solver", default="bfgs", help="of a model with latent descent")
    parser.add_argument("--norm", choices=NORM_NAMES, action="append")
    parser.add_argument("--pgd-images", type=int, default=50, help="images on which PGD runs at their own radius")
    args = parser.parse_args()
    torch.manual_seed(0)  # of foolbox's PGD
    data = (foolbox_digits() if args.data_dir is None else load_idx_dataset(args.data_dir)).head(args.images)
    model = load_model(args.model, weights=args.weights, solver=args.solver)
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
    x, y = data.images, data.labels
    for norm in args.norm or NORM_NAMES:
        started = time.perf_counter()
        certificate = certify(model, x, y, norm)
        radius, kind = certificate.radius, "proved" if certificate.proved else "estimated"
        seconds = time.perf_counter() - started
        print(f"{args.model}, {data.name}, {len(x)} images, {norm}, {kind}: mean radius {radius.mean():.3f}, ", end="")
        print(f"{1e3 * seconds / len(x):.0f} ms an image", flush=True)
        if norm == "l2" and not isinstance(model, BinaryABS):
            order = [certify(model, x, y, "l2", "lipschitz").radius, radius]
            if certificate.proved:
                order.append(certify(model, x, y, "l2", "exact").radius)
            means = " <= ".join(f"{r.mean():.3f}" for r in order)
            broken = sum(int((a > b + 1e-9).sum()) for a, b in itertools.pairwise(order))
            print(f"  lipschitz <= bisector{' <= exact' if certificate.proved else ''}: {means}; broken {broken} times")
            radius = order[-1]
        smallest = torch.full_like(radius, torch.inf)
        for name, attack in ATTACKS[norm].items():
            found, _, _ = attack(wrapped, x, y, epsilons=None)
            distance = torch.where(misclassified(model, found, y), sizes(found - x, norm), torch.inf)
            smallest = torch.minimum(smallest, distance)
            below = int((distance < radius).sum())
            print(f"  {name}: median {distance.median():.3f}, below the radius {below} times", flush=True)
        if norm in PGD:
            few = slice(args.pgd_images)
            distance = at_the_radius(norm, model, x[few], y[few], radius[few])
            smallest[few] = torch.minimum(smallest[few], distance)
            print(f"  PGD at each radius: below the radius {int((distance < radius[few]).sum())} times")
        right = radius > 0
        ratio = (smallest / radius)[right]
        print(f"  smallest distance over radius: least {ratio.min():.4f}, median {ratio.median():.4f}")
        for i in (smallest < radius).nonzero()[:, 0].tolist():
            print(f"  image {i}, class {int(y[i])}: attack {smallest[i]:.4f}, radius {radius[i]:.4f}")


if __name__ == "__main__":
    main()
