"""Which gradient breaks ABS most cheaply? DDN with envelope, unrolled and estimated gradients on the same images.

    python benchmarks/gradients.py [--weights FOLDER] [--images 10] [--steps 40]

The first table has the cosine between each gradient and central finite differences of the logits' margin on clean
images (in double precision, along 100 random directions); a gradient that is zero or points elsewhere is masked. The
second has the attack; with 15 steps DDN finds nothing. Where no solver is named it is the default one.
"""

from __future__ import annotations

import argparse
import time

import foolbox as fb
import torch
import torch.nn.functional as F
from torch import Tensor

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import (
    FiniteDifferenceModel,
    L2BisectorAttack,
    QueryCounter,
    RandomDirectionModel,
    snap_to_threshold,
)
from abs_defense.data import foolbox_digits, load_idx_dataset

KINDS = {"abs": ABS, "binary-abs": BinaryABS}
GRADIENTS = [
    "envelope",
    "envelope, Adam",
    "unrolled, Adam",
    "random directions",
    "finite differences",
    "none: bisector",
]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.amax(1)


def directions(x: Tensor, count: int, width: float) -> Tensor:
    """Random directions ``(count, N, 1, 28, 28)`` that keep the images in the box."""
    u = torch.randn((count, *x.shape), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return u * ((x > 10 * width) & (x < 1 - 10 * width))


def measured_slopes(model: torch.nn.Module, x: Tensor, y: Tensor, u: Tensor, width: float) -> Tensor:
    """Central differences of the margin along the directions, ``(count, N)``."""
    with torch.no_grad():
        shifted = torch.stack([x + width * u, x - width * u]).flatten(0, 2)
        margins = margin(model(shifted), y.repeat(2 * len(u))).view(2, len(u), len(x))
    return (margins[0] - margins[1]) / (2 * width)


def slopes_of_gradient(model: torch.nn.Module, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    live = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(model(live), y).sum(), live)
    return (gradient * u).flatten(2).sum(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--alignment-images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--model", choices=KINDS, action="append", help="default: both")
    parser.add_argument("--gradient", choices=GRADIENTS, action="append", help="default: all")
    parser.add_argument("--finite-difference-images", type=int, default=0, help="784 pixels x steps queries each")
    args = parser.parse_args()
    data = (foolbox_digits() if args.data_dir is None else load_idx_dataset(args.data_dir)).head(args.images)
    x, y = data.images, data.labels
    print(f"{data.name}, {len(x)} images, DDN with {args.steps} steps")

    wanted = args.gradient or GRADIENTS
    for kind in (KINDS[name] for name in args.model or KINDS):
        exact = {
            "envelope": kind(args.weights),
            "envelope, Adam": kind(args.weights, solver="adam"),
            "unrolled, Adam": kind(args.weights, gradient="unrolled"),
        }
        exact = {name: model for name, model in exact.items() if name in wanted}
        if kind is ABS and args.alignment_images and exact:
            n = args.alignment_images
            few, width = x[:n].double(), 1e-3
            u = directions(few, 100, width)
            measured = {}
            for name, model in exact.items():
                model.double()
                solver = model.settings.solver
                if solver not in measured:
                    measured[solver] = measured_slopes(model, few, y[:n], u, width)
                cosine = F.cosine_similarity(slopes_of_gradient(model, few, y[:n], u), measured[solver], dim=0)
                print(f"{name}: cosine with measured slopes {cosine.mean():.4f}, least {cosine.min():.4f}", flush=True)
                model.float()
        foolbox_models = {g: fb.PyTorchModel(m, bounds=(0, 1), device="cpu") for g, m in exact.items()}
        plain = fb.PyTorchModel(kind(args.weights), bounds=(0, 1), device="cpu")
        print(f"{kind.__name__:26s}    found  median L2  unsnapped  queries  gradients  seconds")
        for name in wanted:
            count = args.finite_difference_images if name == "finite differences" else len(x)
            if not count:
                continue
            counter = QueryCounter(foolbox_models.get(name, plain), count)
            attacked: fb.Model = counter
            if name == "random directions":
                attacked = RandomDirectionModel(counter, directions=args.directions)
            if name == "finite differences":
                attacked = FiniteDifferenceModel(counter)
            attack = L2BisectorAttack() if name == "none: bisector" else fb.attacks.DDNAttack(steps=args.steps)
            started = time.perf_counter()
            adversarials, _, success = attack(attacked, x[:count], y[:count], epsilons=None)
            seconds = time.perf_counter() - started
            unsnapped = fb.distances.l2(x[:count], adversarials).where(success, torch.inf)
            if kind is BinaryABS:
                adversarials = snap_to_threshold(x[:count], adversarials)
            distances = fb.distances.l2(x[:count], adversarials)
            distances = torch.where(success, distances, torch.inf)
            print(
                f"  {name:24s} {int(success.sum()):4d}/{count:<3d} {distances.median():10.2f} "
                f"{unsnapped.median():10.2f} {counter.queries.mean():8.0f} "
                f"{counter.gradients.mean():10.0f} {seconds:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
