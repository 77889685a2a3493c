"""What users wait for, before and after: attacks on foolbox's 20 digits and the quick evaluation, in seconds.

    python benchmarks/end_to_end.py [--model abs] [--images 20] [--authors] [--attack Pointwise] [--no-evaluation]

Before is the paper's procedure, 50 steps of Adam (``solver="adam"``); with ``--authors`` Pointwise also meets its plain
form, as the authors wrote it (the other attacks need the latents or gradients, which that does not give). After is the
default solver. The same attacks, settings and images for all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

import foolbox as fb
import torch
from inference_speed import AuthorsProcedure
from torch import Tensor, nn

from abs_defense import load_model
from abs_defense.attacks import LatentDescentAttack, PointwiseAttack, QueryCounter
from abs_defense.data import foolbox_digits

ATTACKS = {
    "Latent Descent": LatentDescentAttack(),
    "Pointwise": PointwiseAttack(),
    "DDN, 40 steps": fb.attacks.DDNAttack(steps=40),
}


class Plain(nn.Module):
    """The authors' procedure as a model of ABS."""

    def __init__(self) -> None:
        super().__init__()
        self.procedure = AuthorsProcedure("mnist", torch.device("cpu"))

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.procedure(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="abs", choices=("abs", "binary-abs"))
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--attack", choices=ATTACKS, action="append", help="default: all")
    parser.add_argument("--authors", action="store_true", help="also the authors' procedure, of ABS")
    parser.add_argument("--evaluation", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    data = foolbox_digits().head(args.images)
    models: dict[str, nn.Module] = {"authors'": Plain()} if args.authors else {}
    models |= {solver: load_model(args.model, solver=solver) for solver in ("adam", "bfgs")}
    print(f"{args.model}, {len(data)} digits, {torch.get_num_threads()} threads")
    print(f"{'':16s} {'procedure':10s} {'seconds':>8s} {'queries':>8s} {'distance':>9s}   (queries an image; medians)")
    for name in args.attack or ATTACKS:
        attack = ATTACKS[name]
        for solver, model in models.items():
            if solver == "authors'" and name != "Pointwise":
                continue
            wrapped = fb.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
            right = wrapped(data.images).argmax(1) == data.labels
            x, y = data.images[right], data.labels[right]
            torch.manual_seed(0)
            counter = QueryCounter(wrapped, len(x))
            started = time.perf_counter()
            found, _, _ = attack(counter, x, y, epsilons=None)
            seconds = time.perf_counter() - started
            distance = fb.distances.l0 if name == "Pointwise" else fb.distances.l2
            far = torch.where(wrapped(found).argmax(1) != y, distance(x, found), torch.inf).median()
            print(f"{name:16s} {solver:10s} {seconds:8.1f} {counter.queries.mean():8.0f} {far:9.2f}", flush=True)
    if args.evaluation:
        for solver in ("adam", "bfgs"):
            with tempfile.TemporaryDirectory() as folder:
                command = ["evaluate", "--solver", solver, "--out", folder]
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", "from abs_defense.cli import main; main()", *command],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                print(f"{'quick evaluation':16s} {solver:10s} {time.perf_counter() - started:8.1f}", flush=True)


if __name__ == "__main__":
    main()
