"""Light augmentation of the training digits."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

_global_random_state = threading.Lock()


def light_augmentation(probability: float = 0.1) -> nn.Module:
    """Zoom, shear, skew and elastic distortion, each with ``probability`` an image.

    The kinds and the default probability are those of the second author's reimplementation; the strengths are ours:
    zoom by up to 10 %, shear by up to 10 degrees, corners moved by up to 5 % of the side, elastic fields of about one
    pixel.
    """
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomAffine(degrees=0.0, scale=(0.9, 1.1), p=probability),
        K.RandomAffine(degrees=0.0, shear=(-10.0, 10.0, -10.0, 10.0), p=probability),
        K.RandomPerspective(distortion_scale=0.1, p=probability),
        K.RandomElasticTransform(kernel_size=(25, 25), sigma=(4.0, 4.0), alpha=(1.5, 1.5), p=probability),
        data_keys=["input"],
    )


def augment(images: Tensor, pipeline: nn.Module, seed: int) -> Tensor:
    """Apply ``pipeline`` with its own seed; the global random state, which it draws from, is put back."""
    devices = [images.device] if images.is_cuda else []
    with _global_random_state, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if images.is_cuda:
            torch.cuda.default_generators[images.device.index].manual_seed(seed)
        augmented: Tensor = pipeline(images)
        return augmented.clamp(0.0, 1.0)
