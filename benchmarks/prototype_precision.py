"""What it costs to keep the starting points of ``solver="bfgs"`` in half precision, and what it saves.

    python benchmarks/prototype_precision.py --data-dir FOLDER [--images 10000]

For ABS and Binary ABS on test images, and on means of two test images, whose decisions are close: how many pairs of an
image and a class start elsewhere than with prototypes in single precision, how many energies and predictions that
changes, and the time of the search. Only images with such a pair are inferred, the others can't differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from abs_defense import ABS, BinaryABS
from abs_defense.data import load_idx_dataset
from abs_defense.inference import Prototypes, infer_latents

BATCH = 125
REPEATS = 9


def starts(prototypes: Prototypes, seen: Tensor, beta: float) -> Tensor:
    """``(2, C, N)``."""
    return torch.cat([prototypes.nearest_two(part, beta)[0] for part in seen.split(BATCH)], dim=2)


def milliseconds(prototypes: Prototypes, seen: Tensor, beta: float) -> float:
    """Of the search for one batch, a median."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        prototypes.nearest_two(seen, beta)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10000)
    arguments = parser.parse_args()
    images = load_idx_dataset(arguments.data_dir).head(arguments.images).images
    sets = {"test images": images, "means of two": (images + images.roll(1, dims=0)) / 2}
    for kind in (ABS, BinaryABS):
        model = kind()
        decoders, settings = model.decoders.class_decoders(), model.settings
        single = Prototypes.decode(decoders, model.prototype_latents, settings.beta)
        single = replace(single, curvature=model.curvature)
        half = Prototypes.decode(decoders, model.prototype_latents, settings.beta, torch.float16)
        half = replace(half, curvature=model.curvature)
        print(
            f"{kind.__name__}: {single.images.nbytes / 2**20:.0f} and {half.images.nbytes / 2**20:.0f} MiB", flush=True
        )
        threshold = model.binary_threshold
        for name, x in sets.items():
            seen = (x if threshold is None else (x > threshold).float()).flatten(1)
            differ = (starts(single, seen, settings.beta) != starts(half, seen, settings.beta)).any(dim=0)
            rows = differ.any(dim=0).nonzero()[:, 0]
            found = [infer_latents(decoders, p, seen[rows], settings)[0] for p in (single, half)]
            gamma = model.gamma if isinstance(model, BinaryABS) else torch.ones(model.num_classes)
            change = found[1] - found[0]
            predictions = [(gamma * energies).argmin(dim=1) for energies in found]
            print(
                f"{name}: {int(differ.sum())} of {differ.numel()} start elsewhere; energies higher, lower by 0.01: "
                f"{int((change > 0.01).sum())}, {int((change < -0.01).sum())}; predictions that differ: "
                f"{int((predictions[0] != predictions[1]).sum())} of {len(seen)}",
                flush=True,
            )
        for count in (1, 8, 128):
            seen = images[:count].flatten(1)
            old, new = (milliseconds(p, seen, settings.beta) for p in (single, half))
            print(f"search for {count} images: {old:.0f} and {new:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
