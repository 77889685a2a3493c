"""The models that the paper compares ABS with (Schott et al. 2018, section 5 and appendix)."""

from __future__ import annotations

import importlib.resources
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from abs_defense._files import replace_atomically
from abs_defense.data import load_idx_dataset
from abs_defense.inference import PIXELS
from abs_defense.models._classifier import Classifier
from abs_defense.models._images import BINARY_THRESHOLD, check_images

CLASSES = 10


class Network(Classifier):
    """A feed-forward classifier. Weights are frozen parameters in single precision; training unfreezes them."""

    def __init__(self, layers: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.layers = layers
        self._num_classes = num_classes
        self.requires_grad_(False)
        self.eval()

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def describe(self) -> dict[str, Any]:
        return {}

    def see(self, images: Tensor) -> Tensor:
        """What the layers see of the images."""
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 1, 28, 28) -> (N, C)``, float32.

        Raises:
            TypeError, ValueError: the images are not ``(N, 1, 28, 28)`` floats in [0, 1] ([-1, 2] for gradients).
        """
        check_images(images)
        dtype = next(self.layers.parameters()).dtype
        logits: Tensor = self.layers(self.see(images).to(dtype))
        return logits.flatten(1).float()


class CNN(Network):
    """The paper's CNN: kernels 5 4 3 5, strides 1 2 2 1, feature maps 20 70 256 C, ELU, batch norm on all but the
    last."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        features, kernels, strides = (1, 20, 70, 256, num_classes), (5, 4, 3, 5), (1, 2, 2, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            layers[f"conv_{i}"] = nn.Conv2d(features[i], features[i + 1], kernel, stride)
            if i < len(kernels) - 1:
                layers[f"bn_{i}"] = nn.BatchNorm2d(features[i + 1])
                layers[f"elu_{i}"] = nn.ELU()
        super().__init__(nn.Sequential(layers), num_classes)


class BinaryCNN(CNN):
    """The paper's CNN on images binarised at 0.5. Gradients pass the threshold straight through (BPDA)."""

    binary_threshold = BINARY_THRESHOLD

    def see(self, images: Tensor) -> Tensor:
        binary: Tensor = _StraightThrough.apply(images, self.binary_threshold)  # type: ignore[no-untyped-call]
        return binary


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, threshold: float) -> Tensor:
        return (images > threshold).to(images.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Madry(Network):
    """The network of Madry et al. 2018: convolutions 32 and 64 (5x5, ReLU, max pooling), dense 1024."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        layers = nn.Sequential(
            OrderedDict(
                conv_0=nn.Conv2d(1, 32, 5, padding=2),
                relu_0=nn.ReLU(),
                pool_0=nn.MaxPool2d(2),
                conv_1=nn.Conv2d(32, 64, 5, padding=2),
                relu_1=nn.ReLU(),
                pool_1=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                dense_0=nn.Linear(64 * 7 * 7, 1024),
                relu_2=nn.ReLU(),
                dense_1=nn.Linear(1024, num_classes),
            )
        )
        super().__init__(layers, num_classes)


class NearestNeighbor(Classifier):
    """The logit of a class is minus the L2 distance to its nearest stored image: ``-min_j ||x - t_j||``.

    The paper stores all 60,000 training images; so do the bundled weights, but only their first principal components
    (see the card).

    Args:
        images: ``(M, 784)`` or ``(M, 1, 28, 28)`` in [0, 1].
        labels: ``(M,)``, each class at least once.

    Raises:
        ValueError: shapes don't fit, or a class has no image.
    """

    images: Tensor
    labels: Tensor
    _half_squares: Tensor

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        flat = images.flatten(1).float()
        if flat.shape[1:] != (PIXELS,) or labels.shape != (len(flat),) or not len(flat):
            raise ValueError(
                f"expected images (M, {PIXELS}) with labels (M,), got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        counts = torch.bincount(labels)
        if not bool((counts > 0).all()):
            raise ValueError(f"expected at least one image of each class, got {counts.tolist()} a class")
        order = labels.argsort(stable=True)
        self.register_buffer("images", flat[order])
        self.register_buffer("labels", labels[order])
        self.register_buffer("_half_squares", 0.5 * self.images.square().sum(1), persistent=False)
        self._counts = counts.tolist()
        self.eval()

    @property
    def num_classes(self) -> int:
        return len(self._counts)

    def describe(self) -> dict[str, Any]:
        return {"images": len(self.images)}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 1, 28, 28) -> (N, C)``, float32; differentiable.

        Raises:
            TypeError, ValueError: the images are not ``(N, 1, 28, 28)`` floats in [0, 1] ([-1, 2] for gradients).
        """
        check_images(images)
        flat = images.flatten(1).to(self.images.dtype)
        distances = [(part[:, None] - self.images[self._nearest(part)]).norm(dim=2) for part in flat.split(256)]
        return -torch.cat(distances).float()

    @torch.no_grad()
    def _nearest(self, flat: Tensor) -> Tensor:
        """Index of each class's nearest image, ``(N, 784) -> (N, C)``."""
        scores = torch.addmm(self._half_squares, flat, self.images.T, alpha=-1.0)
        nearest, first = [], 0
        for own in scores.split(self._counts, dim=1):
            nearest.append(own.argmin(1) + first)
            first += own.shape[1]
        return torch.stack(nearest, 1)


NETWORKS: dict[str, Callable[[], Network]] = {"cnn": CNN, "binary-cnn": BinaryCNN, "madry": Madry}
NEAREST_NEIGHBOR = "nearest-neighbor"
BASELINE_NAMES = ("cnn", "binary-cnn", NEAREST_NEIGHBOR, "madry")


def bundled_baselines() -> dict[str, Path]:
    """Names and files of the baselines' weights in this package."""
    folder = Path(str(importlib.resources.files("abs_defense.models") / "bundled" / "baselines"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load_baseline(name: str, source: str | Path | None = None) -> Classifier:
    """A baseline with its bundled weights, or with those of a file written by ``save_baseline``.

    For ``"nearest-neighbor"`` the source may also be a folder with MNIST's IDX files: then it stores all training
    images, as in the paper.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: the file is damaged or belongs to another model.
    """
    if source is None:
        if name not in bundled_baselines():
            raise FileNotFoundError(
                f"this installation has no weights of {name!r}: train them with abs-defense train {name}"
            )
        source = bundled_baselines()[name]
    path = Path(source)
    if path.is_dir() and name == NEAREST_NEIGHBOR:
        data = load_idx_dataset(path, "train")
        return NearestNeighbor(data.images, data.labels)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors file of {name!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("format")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, truncated, or not a safetensors file: {error}") from error
    if kind != _format(name):
        raise ValueError(f"{path}: expected weights of {name!r} (format {_format(name)!r}), got format {kind!r}")
    try:
        if name == NEAREST_NEIGHBOR:
            return _expanded(tensors)
        network = untrained_network(name)
        network.load_state_dict(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: these are not the weights of {name!r}: {error}") from error
    return network


def untrained_network(name: str, seed: int = 0) -> Network:
    """A network with random weights; the global random state is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed seeds GPUs, too
        return NETWORKS[name]()


def save_baseline(path: str | Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a ``.safetensors`` file that ``load_baseline`` reads, from a network's ``state_dict`` or from
    ``compress_images``; floating point values are rounded to half precision."""
    rounded = {
        key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in tensors.items()
    }
    with replace_atomically(path) as temporary:
        safetensors.torch.save_file(rounded, temporary, {"format": _format(name)})


def compress_images(images: Tensor, labels: Tensor, components: int) -> dict[str, Tensor]:
    """Images ``(M, 1, 28, 28)`` as their first principal components, a byte each: ``mean + (codes * scale) basis``."""
    from sklearn.decomposition import PCA

    flat = images.flatten(1).numpy()
    fitted = PCA(components, svd_solver="covariance_eigh").fit(flat)
    coefficients = torch.from_numpy(fitted.transform(flat)).float()
    scale = coefficients.abs().amax(0) / 127.0
    return {
        "codes": (coefficients / scale).round().to(torch.int8),
        "scale": scale,
        "basis": torch.from_numpy(fitted.components_).float(),
        "mean": torch.from_numpy(fitted.mean_).float(),
        "labels": labels.to(torch.uint8),
    }


def _expanded(tensors: Mapping[str, Tensor]) -> NearestNeighbor:
    codes, scale, basis, mean = (tensors[key].float() for key in ("codes", "scale", "basis", "mean"))
    return NearestNeighbor(torch.addmm(mean, codes * scale, basis), tensors["labels"].long())


def _format(name: str) -> str:
    return f"abs-defense/{name}/1"
