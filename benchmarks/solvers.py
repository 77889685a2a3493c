"""The solvers of latent descent compared, on clean and on adversarial images.

    python benchmarks/solvers.py --data-dir FOLDER [--images 10000] [--adversarials 200] [--weights mnist]

For ABS and Binary ABS: accuracy with each solver, predictions that change (and how many of them the paper's solver got
right), the mean energy of each class, and how far the envelope gradients of the energies' difference between the two
best classes agree. Adversarial images are of DDN (20 steps) against the paper's solver, and ones half and three
quarters on the way to them. Energies come from batches of 500; finished batches are kept in --out, so that a stopped
run continues.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import foolbox as fb
import torch
import torch.nn.functional as F
from torch import Tensor

from abs_defense import ABS, BinaryABS
from abs_defense.data import foolbox_digits, load_idx_dataset

SOLVERS = ("adam", "bfgs")
KINDS = {"abs": ABS, "binary-abs": BinaryABS}
BATCH = 500


def energies(model: ABS, images: Tensor, kept: Path) -> tuple[Tensor, float]:
    """E of all images, ``(N, C)``, and the seconds that it took."""
    parts, seconds = [], 0.0
    for start in range(0, len(images), BATCH):
        file = kept.with_name(f"{kept.name}-{start}.pt")
        if not file.exists():
            started = time.perf_counter()
            found = model.infer(images[start : start + BATCH]).energy
            torch.save({"energy": found, "seconds": time.perf_counter() - started}, file)
        saved = torch.load(file, weights_only=True)
        parts.append(saved["energy"])
        seconds += saved["seconds"]
    return torch.cat(parts), seconds


def adversarials(model: ABS, images: Tensor, labels: Tensor, file: Path) -> Tensor:
    if not file.exists():
        attack = fb.attacks.DDNAttack(steps=20)
        found, _, _ = attack(fb.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=None)
        torch.save(torch.cat([images + share * (found - images) for share in (0.5, 0.75, 1.0)]), file)
    return torch.load(file, weights_only=True)


def margin_gradient(model: ABS, images: Tensor, first: Tensor, second: Tensor) -> Tensor:
    live = images.clone().requires_grad_()
    logits = model(live)
    rows = torch.arange(len(images))
    (gradient,) = torch.autograd.grad((logits[rows, first] - logits[rows, second]).sum(), live)
    return gradient.flatten(1)


def compare(title: str, models: dict[str, ABS], images: Tensor, labels: Tensor, out: Path) -> None:
    found = {}
    for solver, model in models.items():
        found[solver], seconds = energies(model, images, out / f"{title.replace(' ', '-')}-{solver}")
        accuracy = (found[solver].argmin(1) == labels).float().mean()
        print(f"{title}, {solver}: accuracy {100 * accuracy:.2f} %, {1e3 * seconds / len(images):.1f} ms an image")
    adam, bfgs = (found[solver] for solver in SOLVERS)
    changed = adam.argmin(1) != bfgs.argmin(1)
    lost = changed & (adam.argmin(1) == labels)
    won = changed & (bfgs.argmin(1) == labels)
    print(
        f"  predictions that change: {int(changed.sum())}; right with adam only: {int(lost.sum())}, "
        f"with bfgs only: {int(won.sum())}"
    )
    gains = (bfgs - adam).mean(0)
    print("  mean energy, bfgs less adam, by class: " + " ".join(f"{v:.3f}" for v in gains.tolist()))
    pairs = (bfgs > adam + 0.1).float().mean()
    print(f"  pairs of an image and a class with a higher energy (0.1 nats or more): {100 * pairs:.2f} %")
    order = adam.argsort(1)[:20]
    gradients = [margin_gradient(models[s], images[:20], order[:, 0], order[:, 1]) for s in SOLVERS]
    cosine = F.cosine_similarity(*gradients)
    print(
        f"  cosine of the envelope gradients, first 20 images: median {cosine.median():.4f}, least {cosine.min():.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="IDX files; default: foolbox's 20 digits")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--adversarials", type=int, default=200, help="of the first so many images")
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--model", choices=KINDS, action="append")
    parser.add_argument("--out", type=Path, default=Path("solvers"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = (foolbox_digits() if args.data_dir is None else load_idx_dataset(args.data_dir)).head(args.images)
    for kind in (KINDS[name] for name in args.model or KINDS):
        models = {solver: kind(args.weights, solver=solver) for solver in SOLVERS}
        compare(f"{kind.__name__} clean", models, data.images, data.labels, args.out)
        few = data.head(min(args.adversarials, len(data)))
        found = adversarials(models["adam"], few.images, few.labels, args.out / f"{kind.__name__}-adversarials.pt")
        compare(f"{kind.__name__} adversarial", models, found, few.labels.repeat(3), args.out)


if __name__ == "__main__":
    main()
