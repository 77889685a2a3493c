"""Reader for the IDX files in which MNIST, Fashion-MNIST and their relatives come."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Split = Literal["train", "test"]

_PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class ImageSet:
    """Grey images with labels.

    Attributes:
        images: ``(N, 1, 28, 28)``, floating point in [0, 1].
        labels: ``(N,)``, int64.
        name: what the images are, for tables and manifests.

    Raises:
        TypeError: images or labels are no tensors.
        ValueError: they have another shape or type, values outside [0, 1], or different numbers.
    """

    images: Tensor
    labels: Tensor
    name: str

    def __post_init__(self) -> None:
        for name, value in {"images": self.images, "labels": self.labels}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{self.name}: {name}: expected a torch.Tensor, got {type(value).__name__}")
        if self.images.shape[1:] != (1, 28, 28) or not self.images.is_floating_point():
            raise ValueError(
                f"{self.name}: images: expected floating point values of shape (N, 1, 28, 28), got {self.images.dtype} "
                f"of shape {tuple(self.images.shape)}"
            )
        if self.images.numel():
            low, high = (float(value) for value in self.images.aminmax())
            if not (low >= 0.0 and high <= 1.0):
                raise ValueError(f"{self.name}: images: expected values in [0, 1], got {low:g} to {high:g}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise ValueError(
                f"{self.name}: labels: expected int64 of shape (N,), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{self.name}: {len(self.images)} images but {len(self.labels)} labels; "
                "the two files do not belong together"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes: the largest label plus one."""
        return int(self.labels.max()) + 1 if len(self) else 0

    def head(self, count: int) -> ImageSet:
        """The first ``count`` images (all of them if there are fewer)."""
        return ImageSet(self.images[:count], self.labels[:count], self.name)

    def sha256(self) -> str:
        """Digest of pixels (as bytes 0..255) and labels: which images a number was measured on."""
        digest = hashlib.sha256()
        digest.update((self.images * 255).round().to(torch.uint8).numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def read_idx(path: str | Path) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzip-compressed or raw.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not IDX, is damaged, or has fewer or more values than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no IDX file at {path}")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(f"{path}: not an IDX file (it starts with {raw[:4]!r})")
    kind, dims = raw[2], raw[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(f"{path}: expected unsigned bytes (IDX type 0x08), got type {kind:#04x}")
    header = 4 + 4 * dims
    if len(raw) < header:
        raise ValueError(f"{path}: IDX header cut short ({len(raw)} of {header} bytes)")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=dims, offset=4))
    expected = int(np.prod(shape, dtype=np.int64))
    if len(raw) - header != expected:
        raise ValueError(
            f"{path}: the header announces {shape}, {expected} values, but {len(raw) - header} follow; "
            "the file is truncated or damaged"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, stem: str, rank: int) -> Path:
    names = [f"{stem}-idx{rank}-ubyte", f"{stem}.idx{rank}-ubyte"]
    candidates = [folder / (name + suffix) for name in names for suffix in (".gz", "")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{folder} has no {candidates[0].name} (nor {', '.join(c.name for c in candidates[1:])})")


def load_idx_dataset(folder: str | Path, split: Split = "test") -> ImageSet:
    """Load one half of an IDX data set of 28x28 grey images, with any number of classes.

    Args:
        folder: holds ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the ``t10k-`` pair.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: a file is damaged, the images are not 28x28, or the counts differ.
    """
    folder = Path(folder)
    if split not in _PREFIX:
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}")
    image_path = _find(folder, f"{_PREFIX[split]}-images", 3)
    label_path = _find(folder, f"{_PREFIX[split]}-labels", 1)
    pixels, labels = read_idx(image_path), read_idx(label_path)
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28):
        raise ValueError(f"{image_path}: expected images of shape (N, 28, 28), got {pixels.shape}")
    if labels.ndim != 1:
        raise ValueError(f"{label_path}: expected labels of shape (N,), got {labels.shape}")
    return ImageSet(
        images=torch.from_numpy(pixels.copy()).float().div_(255).unsqueeze(1),
        labels=torch.from_numpy(labels.copy()).long(),
        name=f"{folder.resolve().name}/{split}",
    )
