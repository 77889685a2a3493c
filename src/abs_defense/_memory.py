"""One setting of the C library's allocator, on which latent inference and training depend for half of their speed."""

from __future__ import annotations

import functools

import torch

_LARGEST_THRESHOLD = 32 * 2**20


@functools.cache
def reuse_freed_memory() -> None:
    """Keep glibc from giving every freed activation back to the system, which faults in each page of the next one.

    glibc raises its threshold for that (up to 32 MiB) to the size of the largest block that was ever freed, so one
    block that is allocated, never touched and freed is enough. Other allocators don't mind.
    """
    torch.empty(_LARGEST_THRESHOLD - 2**14, dtype=torch.uint8, device="cpu")
