"""Download of MNIST with checksums, kept in the user's cache folder."""

from __future__ import annotations

from pathlib import Path

from abs_defense.data._idx import ImageSet, Split, load_idx_dataset

_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def download_mnist(split: Split = "test", cache: str | Path | None = None) -> ImageSet:
    """MNIST from the cache, or from the first mirror that answers; every file is checked against its SHA-256.

    Args:
        split: ``"train"`` or ``"test"``.
        cache: folder for the files; the user's cache folder by default.

    Raises:
        ConnectionError: the files are not in the cache and no mirror could be reached; says what to do offline.
    """
    import pooch

    folder = Path(cache) if cache is not None else Path(pooch.os_cache("abs-defense")) / "mnist"
    prefix = "train" if split == "train" else "t10k"
    for name in (n for n in _SHA256 if n.startswith(prefix)):
        failures: list[str] = []
        for mirror in MIRRORS:
            try:
                pooch.retrieve(mirror + name, known_hash="sha256:" + _SHA256[name], fname=name, path=folder)
                break
            except (OSError, ValueError) as error:
                failures.append(f"{mirror}: {error}")
        else:
            raise ConnectionError(
                f"could not fetch MNIST's {name} from any mirror. Without internet, put the four IDX files "
                f"({', '.join(_SHA256)}) into {folder}, or pass a folder that holds them (--data-dir on the "
                "command line). Tried:\n  " + "\n  ".join(failures)
            )
    return load_idx_dataset(folder, split)
