"""Image data sets: local IDX files, a checked download of MNIST, and foolbox's 20 digits."""

from abs_defense.data._digits import foolbox_digits
from abs_defense.data._download import download_mnist
from abs_defense.data._idx import ImageSet, load_idx_dataset, read_idx

__all__ = ["ImageSet", "download_mnist", "foolbox_digits", "load_idx_dataset", "read_idx"]
