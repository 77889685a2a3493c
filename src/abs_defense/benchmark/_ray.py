"""The pieces of an evaluation on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from abs_defense._versions import versions
from abs_defense.benchmark._measure import describe
from abs_defense.benchmark._runner import Executor, Failure, Outcome, Piece, attempt
from abs_defense.benchmark._store import CODE, Arrays, PieceKey

_RETRIES = 3


def ray_executor(address: str, *, cpus: int = 1, gpus: float = 0.0) -> Executor:
    """An executor for ``run_plan`` that computes the pieces on Ray workers.

    A piece whose worker or machine is lost is repeated up to 3 times. Every worker keeps the models that it has made.
    Results come back to the caller, who alone writes them, so the machines need no common file system for them. All
    need this package in the same versions, and the files of weights, data and modules that the models name; a piece
    of a worker where they differ fails.

    Args:
        address: of a running cluster (``"auto"``, ``"host:6379"``, ``"ray://host:10001"``), or ``"local"`` to start
            one on this machine.
        cpus: cores, and threads, for a piece.
        gpus: GPU for a piece; a fraction lets several share one. 0 computes on CPUs.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is not installed: pip install 'abs-defense[ray]'") from error
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_work)

    def execute(pieces: Sequence[Piece]) -> Iterator[Outcome]:
        pending = {work.remote(piece, cpus, "cuda" if gpus else "cpu"): piece for piece in pieces}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            piece = pending.pop(done)
            try:
                outcome: Arrays | Failure = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Failure(f"{type(error).__name__}: {error}")
            yield piece, outcome

    return execute


_models: dict[str, tuple[dict[str, Any], nn.Module]] = {}


def _work(piece: Piece, threads: int, device: str) -> Arrays | Failure:
    torch.set_num_threads(threads)
    name = piece.model.name
    try:
        if name not in _models or _differences(piece.key, _models[name][0]):
            model = piece.model.make()
            _models[name] = describe(piece.model, model), model.to(device)
        described, model = _models[name]
        if differences := _differences(piece.key, described):
            return Failure(f"the worker is not like the machine that plans: {', '.join(differences)}")
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")
    return attempt(piece, model, device)


def _differences(key: PieceKey, described: Mapping[str, Any]) -> list[str]:
    """Between the model and the versions of a key and those of this worker. Not of a user's files: what a script
    defines itself comes to the worker without them."""
    here, there = {**described, **versions()}, {**key.model_settings, **key.versions}
    return [
        f"{what}: expected {there.get(what)}, got {here.get(what)}"
        for what in dict.fromkeys([*there, *here])
        if what != CODE and repr(here.get(what)) != repr(there.get(what))
    ]
