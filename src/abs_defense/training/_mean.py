"""Means of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from abs_defense.inference import DecoderStack
from abs_defense.inference._decoder import KERNELS
from abs_defense.models import Weights, load_weights


def mean_weights(
    sources: Sequence[str | Path], shares: Sequence[float] | None = None, *, prototypes: bool = False
) -> Weights:
    """Decoders that are the weighted mean of others', with the calibration of the first.

    Args:
        sources: weights, as for ``ABS``.
        shares: of each, with sum 1; None for equal ones.
        prototypes: also of the latents of prototypes, each with those of the same place.

    Raises:
        ValueError: no sources, or ones of different classes or architectures; other shares than sources, or a sum
            that is not 1; prototypes asked for that some don't have, or not as many.
        FileNotFoundError: no such weights.
    """
    if not sources:
        raise ValueError("sources: expected weights to average, got none")
    if shares is None:
        shares = [1.0 / len(sources)] * len(sources)
    if len(shares) != len(sources) or abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(f"shares: expected one for each of {len(sources)} weights, with sum 1, got {list(shares)}")
    loaded = [load_weights(source) for source in sources]
    shapes = [{name: tuple(value.shape) for name, value in w.decoders.state_dict().items()} for w in loaded]
    latents = [w.prototypes for w in loaded]
    for source, shape, z in zip(sources, shapes, latents, strict=True):
        if shape != shapes[0]:
            raise ValueError(f"sources: {source} and {sources[0]} have other classes or another architecture")
        if prototypes and (z is None or latents[0] is None or z.shape != latents[0].shape):
            raise ValueError(f"sources: expected {source} and {sources[0]} to have as many prototypes")
    if prototypes and len({w.prototype_beta for w in loaded}) > 1:
        raise ValueError(f"sources: expected prototypes of one beta, got {[w.prototype_beta for w in loaded]}")

    def mean(values: Sequence[Tensor]) -> Tensor:
        total = sum(share * value.double() for share, value in zip(shares, values, strict=True))
        return torch.as_tensor(total).to(values[0].dtype)

    def of_decoders(name: str) -> Tensor:
        return mean([w.decoders.get_parameter(name).detach() for w in loaded])

    layers = range(len(KERNELS))
    decoders = DecoderStack([of_decoders(f"weight_{i}") for i in layers], [of_decoders(f"bias_{i}") for i in layers])
    points = mean([z for z in latents if z is not None]) if prototypes else None
    return replace(loaded[0], decoders=decoders, prototypes=points)
