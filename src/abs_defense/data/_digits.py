"""The 20 MNIST test digits that foolbox ships: the data of the embedded default."""

from __future__ import annotations

from pathlib import Path

import foolbox
import numpy as np
import torch
from PIL import Image

from abs_defense.data._idx import ImageSet


def foolbox_digits() -> ImageSet:
    """The 20 MNIST test digits inside the installed foolbox, in its order; nothing is downloaded.

    The files are read directly, because ``foolbox.samples`` takes its shape from a model.

    Raises:
        FileNotFoundError: the installed foolbox does not carry them.
    """
    folder = Path(foolbox.__file__).parent / "data"
    paths = sorted(folder.glob("mnist_*.png"))
    if not paths:
        raise FileNotFoundError(f"the installed foolbox ({foolbox.__version__}) has no mnist_*.png in {folder}")
    pixels = np.stack([np.asarray(Image.open(path).convert("L")) for path in paths])
    labels = [int(path.stem.rsplit("_", 1)[1]) for path in paths]
    return ImageSet(
        images=torch.from_numpy(pixels).float().div_(255).unsqueeze(1),
        labels=torch.tensor(labels),
        name="foolbox-digits",
    )
