"""Finished pieces of an evaluation on disk: whole or absent."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abs_defense._files import replace_atomically

CODE = "code"  # in settings: digests of a user's files


@dataclass(frozen=True)
class PieceKey:
    """What a piece is the result of; two pieces with equal keys are interchangeable.

    Attributes:
        model: name of the model.
        model_settings: its hyperparameters and the hash of its weights.
        attack: name of the attack, ``"clean"`` for none.
        attack_settings: its arguments.
        images_sha256: of the shard's images and labels, so that a run on more images finds the pieces of a shorter one.
        start, stop: the shard.
        seed: of the global random state that foolbox's attacks draw from.
        versions: of the libraries.
    """

    model: str
    model_settings: dict[str, Any]
    attack: str
    attack_settings: dict[str, Any]
    images_sha256: str
    start: int
    stop: int
    seed: int
    versions: dict[str, str]

    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @functools.cached_property
    def file(self) -> str:
        """Name of the piece's file; equal for pieces that have the same result."""
        return f"{self.model}-{self.attack}-{self.start:05d}-{self.digest()}.npz"


Arrays = dict[str, npt.NDArray[Any]]


class Store:
    """A folder of pieces, each one ``.npz`` with its arrays and, as ``manifest``, its key as JSON."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def load(self, key: PieceKey) -> Arrays | None:
        """The arrays of a finished piece, or None if it is not there or not readable."""
        return self.load_file(key.file)

    def load_file(self, name: str) -> Arrays | None:
        """The same by the name of the file."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files if name != "manifest"}
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
            return None

    def save(self, key: PieceKey, arrays: Arrays) -> None:
        manifest = json.dumps(asdict(key), sort_keys=True, default=repr)
        with replace_atomically(self.folder / key.file) as path, path.open("wb") as file:
            # Without allow_pickle, which numpy before 2.2 would store as one more array.
            np.savez_compressed(file, manifest=np.array(manifest), **arrays)  # type: ignore[arg-type]
