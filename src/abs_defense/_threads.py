"""Threads that compute side by side, one core of the CPU each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def one_core_each(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of ``count`` threads in which torch's operations use one thread; everywhere else they use as many as
    before. Pieces of work that don't depend on each other finish sooner so than one after the other on all cores."""
    threads = torch.get_num_threads()
    all_ready = threading.Barrier(count + 1)

    def use_one_core() -> None:
        torch.get_num_threads()  # takes the process's setting over, as torch would later
        torch.set_num_threads(1)
        all_ready.wait()

    with ThreadPoolExecutor(count, initializer=use_one_core) as pool:
        for _ in range(count):
            pool.submit(int)
        all_ready.wait()
        torch.set_num_threads(threads)
        yield pool


def share_out(work: Callable[[slice], T], count: int) -> list[T]:
    """``work`` on a part of ``count`` things for each core, side by side, without gradients; the results in order."""
    cores = min(count, torch.get_num_threads())
    ends = [round(i * count / cores) for i in range(cores + 1)]
    with one_core_each(cores) as pool:
        return list(pool.map(torch.no_grad()(work), map(slice, ends, ends[1:])))
