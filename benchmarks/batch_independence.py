"""How far an image's energies depend on the images beside it.

    python benchmarks/batch_independence.py --data-dir FOLDER [--images 1000] [--solver bfgs]

For ABS and Binary ABS on test images in batches of 1, 7, 33 and 100: how many energies of an image and a class differ
from those in batches of 100 at all, by more than 1e-6 and by more than 1e-4 of their size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from abs_defense import ABS, BinaryABS
from abs_defense.data import load_idx_dataset

SIZES = (1, 7, 33)
COMPARED_WITH = 100


def energies(model: ABS, images: Tensor, size: int) -> Tensor:
    return torch.cat([model.infer(batch).energy for batch in images.split(size)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--solver", default="bfgs")
    args = parser.parse_args()
    images = load_idx_dataset(args.data_dir).images[: args.images]
    print(f"{len(images)} images, solver {args.solver}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for make in (ABS, BinaryABS):
        model = make(solver=args.solver)
        expected = energies(model, images, COMPARED_WITH)
        for size in SIZES:
            apart = (energies(model, images, size) - expected).abs() / expected.abs()
            counts = [int((apart > threshold).sum()) for threshold in (0.0, 1e-6, 1e-4)]
            print(
                f"{make.__name__}, batches of {size}: of {apart.numel()} energies {counts[0]} differ, {counts[1]} by "
                f"more than 1e-6, {counts[2]} by more than 1e-4; largest {apart.max():.1e}"
            )


if __name__ == "__main__":
    main()
