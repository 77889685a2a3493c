"""Writes IDX files for tests."""

import gzip
import struct

import numpy as np


def idx_bytes(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_split(folder, images, labels, *, prefix="train", compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        raw = idx_bytes(array)
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / stem).write_bytes(raw)


def write_toy_set(folder, *, per_class=24, classes=3, seed=0):
    """Bars, one place or width a class (up to 12), both splits."""
    rng = np.random.default_rng(seed)
    for prefix, count in (("train", per_class), ("t10k", max(4, per_class // 4))):
        labels = np.repeat(np.arange(classes), count)
        images = np.zeros((len(labels), 28, 28))
        for image, label in zip(images, labels, strict=True):
            top = 4 + 7 * (label % 3) + rng.integers(0, 3)
            image[top : top + 4, 5 : 23 - 5 * (label // 3)] = 200 + rng.integers(0, 55)
        order = rng.permutation(len(labels))
        write_split(folder, images[order], labels[order], prefix=prefix)
    return folder
