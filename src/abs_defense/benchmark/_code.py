"""Which code of a user a result depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

# Packages whose versions are part of every result, and Python's own.
_KNOWN = {"abs_defense", "torch", "foolbox", "art", "eagerpy", "numpy", *sys.stdlib_module_names}


def code_digests(*objects: Any) -> dict[str, str]:
    """Digests of the files that define functions, classes or objects, by module; packages whose versions are kept
    otherwise are left out."""
    digests: dict[str, str] = {}
    for found in objects:
        if isinstance(found, partial):
            digests |= code_digests(found.func, *found.args, *found.keywords.values())
            continue
        named = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
        module = str(named.__module__)
        if module.partition(".")[0] in _KNOWN:
            continue
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is not None and Path(file).is_file():
            digests[module] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return dict(sorted(digests.items()))


def attributes_digest(model: nn.Module) -> str:
    """Digest of the numbers and texts that a module and its parts keep beside their weights."""
    plain = {
        name: {key: value for key, value in sorted(vars(part).items()) if not key.startswith("_") and _is_plain(value)}
        for name, part in model.named_modules()
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=repr).encode()).hexdigest()[:12]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, complex, str))
