"""The pieces of an evaluation on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from abs_defense.benchmark._runner import Executor, Failure, Outcome, Piece, attempt
from abs_defense.benchmark._store import Arrays

_RETRIES = 3


def ray_executor(address: str, *, cpus: int = 1, gpus: float = 0.0) -> Executor:
    """An executor for ``run_plan`` that computes the pieces on Ray workers.

    A piece whose worker or machine is lost is repeated up to 3 times. Every worker keeps the models that it has made.
    Results come back to the caller, who alone writes them, so the machines need no common file system; but all need
    this package.

    Args:
        address: of a running cluster (``"auto"``, ``"ray://host:10001"``), or ``"local"`` to start one on this machine.
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
        ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
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


_models: dict[str, tuple[dict[str, Any], Any]] = {}


def _work(piece: Piece, threads: int, device: str) -> Arrays | Failure:
    torch.set_num_threads(threads)
    name = piece.model.name
    try:
        described = piece.key.model_settings
        if name not in _models or _models[name][0] != described:
            _models[name] = described, piece.model.make().to(device)
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")
    return attempt(piece, _models[name][1], device)
