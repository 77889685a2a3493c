"""Speed and memory of latent inference beside the authors' procedure, all in one process.

    python benchmarks/inference_speed.py [--device cuda] [--weights mnist] [--repeats 3] [--images 10000]
        [--scaling scaling.png]

The authors' procedure is written plainly in PyTorch, as they wrote it: one loop over the classes, transposed
convolutions and batch norm as modules, weights that ask for gradients, the default layout. It is measured first, before
this package changes anything about the process, and again at the end. Ratios compare medians at batch 100. Warm-up is
everything before the first answer but Python's imports: loading the weights, decoding the prototypes, the first image.

With ``--images``, which a GPU has by default, so many images go through each model in one call, and through the
authors' procedure in the faster of two batch sizes; then ten times as many, to see whether memory grows; and the logits
are compared with a CPU's.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from abs_defense import ABS
from abs_defense.data import foolbox_digits
from abs_defense.inference import PIXELS, sample_latents
from abs_defense.models import load_weights, unfold_decoders

PAPERS = "adam, 50 steps (the paper's)"
FLOP_OF_THE_DECODER = 2 * (8 * 32 * 16 + 16 * 32 * 16 * 25 + 121 * 16 * 16 * 25 + 625 * 16 * 16)


class AuthorsProcedure:
    """Nearest of 8000 decoded samples, then 50 steps of Adam, class by class."""

    def __init__(self, weights: str, device: torch.device, prototypes: int = 8000, steps: int = 50) -> None:
        self.decoders = [
            d.to(device).eval().requires_grad_(True) for d in unfold_decoders(load_weights(weights).decoders)
        ]
        self.latents = sample_latents(prototypes, 8, 0).to(device)
        self.steps = steps
        with torch.no_grad():
            self.samples = [torch.cat([d(z[:, :, None, None]) for z in self.latents.split(100)]) for d in self.decoders]

    def __call__(self, x: Tensor) -> Tensor:
        scores = []
        for decoder, samples in zip(self.decoders, self.samples, strict=True):
            with torch.no_grad():
                flat = samples.flatten(1)
                energy = flat.square().sum(1) - 2.0 * x.flatten(1) @ flat.T + 0.5 * self.latents.square().sum(1)
                start = self.latents[energy.argmin(1)]
            z = nn.Parameter(start[:, :, None, None].clone())
            optimizer = torch.optim.Adam([z], lr=0.05)
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = ((decoder(z) - x).square().flatten(1).sum(1) + 0.5 * z.square().flatten(1).sum(1)) / PIXELS
                loss.sum().backward()
                optimizer.step()
                with torch.no_grad():
                    norm = z.norm(dim=1, keepdim=True)
                    z.copy_(torch.where(norm > 5.0, z * 5.0 / norm, z))
            scores.append(-loss.detach())
        return torch.stack(scores, dim=1)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of the repeats."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def answer(model: ABS, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
        return logits


def peak(device: torch.device) -> float:
    """FLOP/s of a large product in single precision."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device)
    torch.mm(a, b)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), device, 7)


def numba_version() -> str:
    """Of numba, which compiles a part of the work on a CPU where it is installed."""
    try:
        return f"numba {version('numba')}"
    except PackageNotFoundError:
        return "without numba"


def memory(device: torch.device) -> str:
    """The most that was in use so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB of the process"


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def flop(images: int) -> float:
    """Of the paper's procedure: 50 forward and backward passes and the search, for ten classes."""
    return images * 10 * (50 * 2 * FLOP_OF_THE_DECODER + 2 * 8000 * PIXELS)


def many_images(
    models: dict[str, ABS], authors: AuthorsProcedure, digits: Tensor, number: int, repeats: int, peak_flop: float
) -> None:
    """One call with many images, ten of them one after the other, and the same logits on a CPU."""
    device = digits.device
    noise = torch.rand(number, *digits.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
    images = (digits.repeat(-(-number // len(digits)), 1, 1, 1)[:number] + 0.2 * (noise - 0.5)).clamp(0.0, 1.0)

    def authors_seconds(batch: int) -> float:
        part = images[: 10 * batch]
        return number / len(part) * seconds(lambda: [authors(x) for x in part.split(batch)], device, repeats)

    theirs = {batch: authors_seconds(batch) for batch in (100, 1000)}
    best = min(theirs, key=lambda batch: theirs[batch])
    print(f"{number} images, the authors' procedure: {theirs[best]:.3f} s in batches of {best}")
    for name, model in models.items():
        forget_peak(device)
        took = seconds(lambda m=model: answer(m, images), device, repeats)  # type: ignore[misc]
        print(f"{number} images, {name}: {took:.3f} s, {theirs[best] / took:.1f} times as fast")
        if name == PAPERS:
            print(f"    {100 * flop(number) / took / peak_flop:.0f} % of the peak (median)")
        before = memory(device)
        for _ in range(10):
            answer(model, images)
        print(f"    peak memory {before}, after {10 * number} images more {memory(device)}")
        there = answer(model, images[:100]).cpu()
        here = answer(model.to("cpu"), images[:100].cpu())
        model.to(device)
        other = int((here.argmax(1) != there.argmax(1)).sum())
        print(
            f"    {len(here)} images on a CPU: logits {(here - there).abs().max():.1e} apart, {other} other predictions"
        )


def scaling(weights: str, device: torch.device, images: Tensor, repeats: int, path: str) -> None:
    """Milliseconds a call against batch size, prototypes, steps and classes, as a plot."""
    from dataclasses import replace

    import matplotlib.pyplot as plt

    from abs_defense.inference import DecoderStack

    loaded = load_weights(weights)

    def classes(count: int) -> ABS:
        stack = loaded.decoders
        picked = torch.arange(count) % stack.num_classes
        names = [n for n, _ in stack.named_parameters()]
        tensors = {n: stack.get_parameter(n)[picked] for n in names}
        parts = [[tensors[f"{kind}_{i}"] for i in range(4)] for kind in ("weight", "bias")]
        gamma = (1.0,) * count
        more = replace(loaded, decoders=DecoderStack(*parts), calibration=replace(loaded.calibration, gamma=gamma))
        return ABS(replace(more, prototypes=None), prototypes=1000, solver="adam")

    digits = images.repeat(20, 1, 1, 1)
    panels: list[tuple[str, list[int], Callable[[int], Callable[[], object]]]] = []
    usual = {solver: ABS(weights, prototypes=1000, solver=solver).to(device) for solver in ("adam", "bfgs")}

    def measured(model: ABS, x: Tensor) -> Callable[[], object]:
        model = model.to(device)
        return lambda: answer(model, x)

    panels.append(("images in the batch", [1, 10, 50, 100, 200, 400], lambda n: measured(usual["adam"], digits[:n])))
    panels.append(
        (
            "prototypes",
            [500, 2000, 8000, 16000],
            lambda n: measured(ABS(weights, prototypes=n, steps=5, solver="adam"), digits[:100]),
        )
    )
    panels.append(
        (
            "steps of Adam",
            [0, 10, 25, 50],
            lambda n: measured(ABS(weights, prototypes=1000, steps=n, solver="adam"), digits[:100]),
        )
    )
    panels.append(("classes", [2, 5, 10, 20], lambda n: measured(classes(n), digits[:50])))
    panels.append(
        ("images in the batch, bfgs", [1, 10, 50, 100, 200, 400], lambda n: measured(usual["bfgs"], digits[:n]))
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), layout="constrained")
    for axis, (name, sizes, make) in zip(axes, panels, strict=True):
        values = []
        for size in sizes:
            call = make(size)
            call()
            values.append(1e3 * seconds(call, device, repeats))
        print(f"{name}: " + ", ".join(f"{n}: {v:.0f} ms" for n, v in zip(sizes, values, strict=True)))
        axis.plot(sizes, values, "o-")
        axis.set(xlabel=name, xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("ms a call")
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 100, 400])
    parser.add_argument("--images", type=int, help="in one call; on a GPU by default 10,000")
    parser.add_argument("--scaling", metavar="PNG", help="also draw how the cost grows")
    args = parser.parse_args()
    device = torch.device(args.device)
    digits = foolbox_digits().images.to(device)
    hundred = digits.repeat(5, 1, 1, 1)

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    libraries = f"torch {torch.__version__}, {numba_version()}"
    print(f"{hardware}, {torch.get_num_threads()} threads, {libraries}; 8000 prototypes, 10 classes")
    peaks = [peak(device)]
    print(f"peak of a product in single precision: {peaks[0] / 1e9:.0f} GFLOP/s")

    authors = AuthorsProcedure(args.weights, device)
    first = seconds(lambda: authors(hundred), device, args.repeats)
    print(f"the authors' procedure, batch 100: {10 * first:.1f} ms an image")
    if device.type == "cpu":
        before = memory(device)
    started = time.perf_counter()
    models = {PAPERS: ABS(args.weights, solver="adam").to(device)}
    answer(models[PAPERS], digits[:1])
    print(f"warm-up: {time.perf_counter() - started:.1f} s")
    models["bfgs"] = ABS(args.weights, solver="bfgs").to(device)
    models["prototypes only"] = ABS(args.weights, steps=0).to(device)

    medians = {}
    for name, model in models.items():
        for batch in args.batches:
            images = digits.repeat(-(-batch // len(digits)), 1, 1, 1)[:batch]
            answer(model, images)
            took = seconds(lambda m=model, x=images: answer(m, x), device, args.repeats)  # type: ignore[misc]
            print(f"{name}, batch {batch:4d}: {1e3 * took / batch:7.2f} ms an image")
        answer(model, hundred)
        medians[name] = seconds(lambda m=model: answer(m, hundred), device, args.repeats)  # type: ignore[misc]
        peaks.append(peak(device))
    print("peak of a product again, after each: " + ", ".join(f"{p / 1e9:.0f}" for p in peaks[1:]) + " GFLOP/s")
    again = seconds(lambda: authors(hundred), device, args.repeats)
    print(f"the authors' procedure again: {10 * again:.1f} ms an image")
    for name, took in medians.items():
        print(f"{name}: {first / took:.1f} times as fast as at first, {again / took:.1f} times as fast as again")
    share = flop(100) / medians[PAPERS] / statistics.median(peaks)
    print(f"the paper's procedure: {flop(1) / 1e9:.2f} GFLOP an image, {100 * share:.0f} % of the peak (median)")
    if device.type == "cpu":
        print(f"peak memory: {before} before, {memory(device)} with three models")
    else:
        print(f"peak memory: {memory(device)}")
    if args.images is None and device.type == "cuda":
        args.images = 10_000
    if args.images:
        many_images(models, authors, digits, args.images, args.repeats, statistics.median(peaks))
    if args.scaling:
        scaling(args.weights, device, digits, args.repeats, args.scaling)


if __name__ == "__main__":
    main()
