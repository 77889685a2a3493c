"""Products in full single precision, whatever the user allows elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_put_back = contextlib.ExitStack()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor reduced products (TF32, bfloat16) inside; what the caller had set is put back.

    The settings of products belong to the process: the first thread that enters changes them, the last that leaves
    puts them back.
    """
    global _inside
    with torch.autocast(device.type, enabled=False):
        with _lock:
            if not _inside:
                with contextlib.ExitStack() as put_back:
                    _forbid_reduced_products(put_back)
                    _put_back.push(put_back.pop_all())
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if not _inside:
                    _put_back.close()


def _forbid_reduced_products(put_back: contextlib.ExitStack) -> None:
    """torch has an older and a newer way to allow them. The older getters raise where they can't express what was set
    in the newer way; otherwise the older way keeps both consistent, as CUDA's products require."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        _make_ieee(torch.backends.cuda.matmul, put_back)
        _make_ieee(torch.backends.mkldnn.matmul, put_back)  # type: ignore[attr-defined]
    else:
        if precision != "highest":
            put_back.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
    if torch.backends.cudnn.is_available():
        with contextlib.suppress(RuntimeError):
            if torch.backends.cudnn.allow_tf32:
                put_back.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
                torch.backends.cudnn.allow_tf32 = False
        if hasattr(torch.backends.cudnn, "conv"):
            _make_ieee(torch.backends.cudnn.conv, put_back)
    if hasattr(torch.backends.mkldnn, "conv"):
        _make_ieee(torch.backends.mkldnn.conv, put_back)


def _make_ieee(products: Any, put_back: contextlib.ExitStack) -> None:
    found = products.fp32_precision
    if found in ("ieee", "none"):
        return
    products.fp32_precision = "none"
    inherited = products.fp32_precision == found
    put_back.callback(setattr, products, "fp32_precision", "none" if inherited else found)
    products.fp32_precision = "ieee"
