"""Whether CUDA graphs or torch.compile make the paper's descent faster on a GPU, and for how many images at once.

    python benchmarks/descent_on_gpu.py [--device cuda] [--images 1 16 128 512 2048 8192] [--repeats 5]

Fifty steps of Adam for one class (and for all ten in one pass, where that is printed as "joint"), as
``abs_defense.inference`` runs them, operation by operation; then the same recorded once in a CUDA graph and replayed,
with the step compiled by torch.compile, and both. Needs a GPU; with ``--device cpu`` the forms without graphs run, to
try the script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from inference_speed import FLOP_OF_THE_DECODER, seconds
from torch import Tensor

from abs_defense._precision import full_precision
from abs_defense.inference import PIXELS
from abs_defense.inference._decoder import ClassDecoder, JointDecoder
from abs_defense.inference._descent import adam_in_ball
from abs_defense.models import load_weights

STEPS, BETA = 50, 0.5

Gradient = Callable[[Tensor], Tensor]


def descent(gradient: Gradient, latents: Tensor) -> Callable[[], Tensor]:
    return lambda: adam_in_ball(gradient, latents, steps=STEPS, lr=0.05, radius=5.0)


def recorded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` in a CUDA graph, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def forms(gradient: Gradient, latents: Tensor) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """Names of the ways to run the descent, and what prepares them."""

    def compiled() -> Callable[[], Tensor]:
        torch._dynamo.reset()
        return descent(torch.compile(gradient, fullgraph=latents.is_cuda, dynamic=False), latents)

    yield "as it is", lambda: descent(gradient, latents)
    if latents.is_cuda:
        yield "CUDA graph", lambda: recorded(descent(gradient, latents))
    yield "compiled", compiled
    if latents.is_cuda:
        yield "compiled, CUDA graph", lambda: recorded(compiled())


def gradients(decoders: list[ClassDecoder], images: Tensor) -> Iterator[tuple[str, Gradient, int]]:
    """Of E / 784, for one class and for all of them: name, function of the latents, number of classes."""
    joint = JointDecoder(decoders)

    def of_one(z: Tensor) -> Tensor:
        return (decoders[0].squared_error_gradient(z, images) + BETA * z) / PIXELS

    def of_all(z: Tensor) -> Tensor:
        return (joint.squared_error_and_gradient(z, images)[1] + BETA * z) / PIXELS

    yield "class", of_one, 1
    yield "joint", of_all, len(decoders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", default="mnist")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16, 128, 512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    decoders = load_weights(args.weights).decoders.to(device).class_decoders()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), full_precision(device):
        for number in args.images:
            images = torch.rand(number, PIXELS, generator=generator).to(device)
            start = torch.randn(len(decoders), number, 8, generator=generator).to(device)
            for name, gradient, classes in gradients(decoders, images):
                latents = start if classes > 1 else start[0]
                expected = None
                for form, prepare in forms(gradient, latents):
                    started = time.perf_counter()
                    run = prepare()
                    found = run().clone()
                    ready = time.perf_counter() - started
                    expected = found if expected is None else expected
                    took = seconds(run, device, args.repeats) / (number * classes)
                    rate = STEPS * 2 * FLOP_OF_THE_DECODER / took
                    print(
                        f"{number:5d} images, {name}, {form}: {1e6 * took:8.2f} us a pair of image and class, "
                        f"{rate / 1e12:.3f} TFLOP/s; first run {ready:.1f} s; latents "
                        f"{(found - expected).abs().max():.0e} apart",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
