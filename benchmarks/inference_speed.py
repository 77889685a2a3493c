"""Speed and memory of latent inference: milliseconds an image by batch size, warm-up, peak memory.

    python benchmarks/inference_speed.py [--device cuda] [--weights mnist] [--repeats 3]

Warm-up is everything before the first answer but Python's imports: loading the weights, decoding the prototypes, and
the first image. Times are medians of the repeats.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time

import torch

from abs_defense import ABS
from abs_defense.data import foolbox_digits


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(model: ABS, images: torch.Tensor) -> float:
    synchronize(images.device)
    started = time.perf_counter()
    with torch.no_grad():
        model(images)
    synchronize(images.device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 100, 400])
    args = parser.parse_args()
    device = torch.device(args.device)
    digits = foolbox_digits().images.to(device)

    started = time.perf_counter()
    model = ABS(args.weights).to(device)
    timed(model, digits[:1])
    warm_up = time.perf_counter() - started

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{len(model.prototype_latents)} prototypes, {model.settings.steps} steps, {model.num_classes} classes")
    print(f"warm-up: {warm_up:.1f} s")
    for batch in args.batches:
        images = digits.repeat(-(-batch // len(digits)), 1, 1, 1)[:batch]
        seconds = statistics.median(timed(model, images) for _ in range(args.repeats))
        print(f"batch {batch:4d}: {1e3 * seconds / batch:7.1f} ms an image")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB of the process")


if __name__ == "__main__":
    main()
