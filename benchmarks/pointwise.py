"""Our PointwiseAttack beside foolbox's: the same model, images and starting points, in one run.

    python benchmarks/pointwise.py [--model prototype-abs] [--images 20] [--data-dir FOLDER] [--starts]

The starting points are foolbox's salt-and-pepper noise (1000 steps, their queries not counted). Both attacks run
without the L2 search first, then foolbox's default (with it) beside our norm="l2".

With --starts instead: ours with ten restarts from its own starting points, by number of draws a restart.
"""

from __future__ import annotations

import argparse
import time

import foolbox as fb
import numpy as np
import torch

from abs_defense import load_model
from abs_defense.attacks import PointwiseAttack, QueryCounter
from abs_defense.data import foolbox_digits, load_idx_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="prototype-abs")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--data-dir")
    parser.add_argument("--start-steps", type=int, default=1000)
    parser.add_argument("--starts", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    data = foolbox_digits() if args.data_dir is None else load_idx_dataset(args.data_dir)
    data = data.head(args.images)
    x, y = data.images.to(args.device), data.labels.to(args.device)
    model = fb.PyTorchModel(load_model(args.model), bounds=(0, 1), device=args.device)

    if args.starts:
        correct = model(x).argmax(1) == y
        compare_starts(model, x[correct], y[correct])
        return
    starts = fb.attacks.SaltAndPepperNoiseAttack(steps=args.start_steps).run(model, x, y)
    usable = (model(starts).argmax(1) != y) & (model(x).argmax(1) == y)
    x, y, starts = x[usable], y[usable], starts[usable]
    print(f"{args.model} on {data.name}: {len(x)} of {len(usable)} images have a starting point")
    print(f"starting points: median L0 {fb.distances.l0(x, starts).median():.0f}")
    print(f"{'attack':38s} {'queries':>8s} {'seconds':>8s} {'L0':>6s} {'L2':>6s}   (queries an image; medians)")
    for name, attack in (
        ("foolbox, without L2 search", fb.attacks.PointwiseAttack(l2_binary_search=False)),
        ("ours, norm='l0'", PointwiseAttack()),
        ("foolbox, default", fb.attacks.PointwiseAttack()),
        ("ours, norm='l2'", PointwiseAttack(norm="l2")),
    ):
        counter = QueryCounter(model, len(x))
        started = time.perf_counter()
        adversarials = attack.run(counter, x, fb.criteria.Misclassification(y), starting_points=starts)
        seconds = time.perf_counter() - started
        assert (model(adversarials).argmax(1) != y).all()
        l0, l2 = (float(d(x, adversarials).median()) for d in (fb.distances.l0, fb.distances.l2))
        print(f"{name:38s} {counter.queries.mean():8.0f} {seconds:8.1f} {l0:6.1f} {l2:6.2f}", flush=True)


def compare_starts(model: fb.PyTorchModel, x: torch.Tensor, y: torch.Tensor) -> None:
    print(f"{'draws':>8s} {'queries':>8s} {'seconds':>8s} {'median':>8s} {'mean':>8s}   (L0, of {len(x)} images)")
    for draws in (1, 5, 20, 50):
        counter = QueryCounter(model, len(x))
        started = time.perf_counter()
        adversarials, _, success = PointwiseAttack(restarts=10, start_draws=draws)(counter, x, y, epsilons=None)
        distance = fb.distances.l0(x, adversarials).where(success, torch.inf)
        print(
            f"{draws:8d} {counter.queries.mean():8.0f} {time.perf_counter() - started:8.1f} "
            f"{distance.median():8.1f} {distance.mean():8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
