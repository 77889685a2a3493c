"""Misclassified or not: are decisions those of the whole inference, and what do they save?

    python benchmarks/decisions.py --data-dir FOLDER [--images 10000] [--attacked 40] [--weights mnist]

For ABS and Binary ABS with each solver: decisions of `misclassification_only` that differ from those of all logits, and
the share of the whole inference's time. The images: digits with their labels and with wrong ones; means of two digits
with the label of the first; and the queries of attacks that need nothing else (Boundary doesn't ask for it in the
suite; these rows say why). Finished rows are kept in --out, so that a stopped run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import eagerpy as ep
import foolbox as fb
import torch
from torch import Tensor

from abs_defense import ABS, BinaryABS
from abs_defense.attacks import PointwiseAttack, StartedAttack
from abs_defense.attacks._base import WrappedModel
from abs_defense.data import ImageSet, foolbox_digits, load_idx_dataset
from abs_defense.inference import asked_labels, misclassification_only

KINDS = {"abs": ABS, "binary-abs": BinaryABS}
SOLVERS = ("bfgs", "adam")
BATCH = 100
ADAM_SHARE = 5  # takes five times as long, so it gets fewer digits
ATTACKS = {
    "HopSkipJump": StartedAttack(
        fb.attacks.HopSkipJumpAttack(steps=2, initial_gradient_eval_steps=30, max_gradient_eval_steps=30)
    ),
    "Pointwise": PointwiseAttack(restarts=1, max_queries=100),
}
BOUNDARY = StartedAttack(fb.attacks.BoundaryAttack(steps=200))

Source = Callable[["Compared"], object]


@dataclass
class Tally:
    """What comparing both inferences on some images came to."""

    images: int = 0
    misclassified: int = 0
    changed: int = 0
    seconds: float = 0.0
    seconds_whole: float = 0.0


class Compared(WrappedModel):
    """A foolbox model of ABS, which answers every question twice and keeps count."""

    def __init__(self, model: ABS) -> None:
        super().__init__(fb.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu"))
        self.classes, self.tally = model.num_classes, Tally()

    def __call__(self, inputs: Any) -> Any:
        labels = asked_labels(len(inputs), self.classes)
        started = time.perf_counter()
        hasty = self._model(inputs)
        between = time.perf_counter()
        if labels is not None:
            whole = Context().run(self._model, inputs)
            ended = time.perf_counter()
            wrong = ep.astensor(whole).raw.argmax(1) != labels
            self.tally.images += len(inputs)
            self.tally.misclassified += int(wrong.sum())
            self.tally.changed += int(((ep.astensor(hasty).raw.argmax(1) != labels) != wrong).sum())
            self.tally.seconds += between - started
            self.tally.seconds_whole += ended - between
        return hasty


def sources(data: ImageSet, few: ImageSet) -> Iterator[tuple[str, Source]]:
    def ask(images: Tensor, labels: Tensor) -> Source:
        def source(model: Compared) -> None:
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                with misclassification_only(y):
                    model(x)

        return source

    def attacked(attack: fb.attacks.base.MinimizationAttack) -> Source:
        def source(model: Compared) -> None:
            torch.manual_seed(0)
            attack(model, few.images, few.labels, epsilons=None)

        return source

    yield "digits", ask(data.images, data.labels)
    yield "digits with wrong labels", ask(data.images, (data.labels + 1 + torch.arange(len(data)) % 9) % 10)
    half = data.head(max(1, len(data) // 2))
    yield "means of two digits", ask((half.images + half.images.flip(0)) / 2, half.labels)
    for name, attack in ATTACKS.items():
        yield f"{name}, {len(few)} images", attacked(attack)

    def boundary(model: Compared) -> None:
        with misclassification_only(few.labels):
            attacked(BOUNDARY)(model)

    yield f"Boundary, {len(few)} images", boundary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="IDX files; default: foolbox's 20 digits")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--attacked", type=int, default=40, help="the first so many images")
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--model", choices=KINDS, action="append")
    parser.add_argument("--solver", choices=SOLVERS, action="append")
    parser.add_argument("--out", type=Path, default=Path("decisions"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    whole = (foolbox_digits() if args.data_dir is None else load_idx_dataset(args.data_dir)).head(args.images)
    print("| | decisions | misclassified | other than of the whole inference | its time |")
    print("|---|---|---|---|---|")
    for name in args.model or KINDS:
        for solver in args.solver or SOLVERS:
            model = KINDS[name](args.weights, solver=solver)
            data = whole.head(max(1, len(whole) // (ADAM_SHARE if solver == "adam" else 1)))
            few = whole.head(args.attacked)
            for title, source in sources(data, few):
                key = hashlib.sha256(f"{name} {solver} {title} {args.weights} {len(data)} {len(few)}".encode())
                kept = args.out / f"{key.hexdigest()[:12]}.json"
                if not kept.exists():
                    compared = Compared(model)
                    source(compared)
                    kept.write_text(json.dumps(asdict(compared.tally)))
                row = Tally(**json.loads(kept.read_text()))
                print(
                    f"| {type(model).__name__}, {solver}: {title} | {row.images} | "
                    f"{100 * row.misclassified / row.images:.0f} % | {row.changed} | "
                    f"{100 * row.seconds / row.seconds_whole:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
