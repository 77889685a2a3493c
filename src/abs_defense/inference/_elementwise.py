"""The decoders' functions of single elements, as fast as they come, with results that depend on no other element."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_LOG2_E = math.log2(math.e)
_VECTORS = 64
_GRAIN = 32768  # of at::parallel_for
_ROW = 1024  # elements that the compiled loop takes at once
_WORTH_A_THREAD = 2**18  # elements, of which the compiled loop does four in a nanosecond

_Floats = npt.NDArray[np.float32]
_Kernel = Callable[[_Floats, _Floats], None]


def whole_vectors(number: int, device: torch.device) -> int:
    """The next size of which each of torch's threads on a CPU takes whole vectors: a function of the elements left over
    is computed by other code, with other rounding."""
    if device.type != "cpu":
        return number
    threads = max(1, min(torch.get_num_threads(), -(-number // _GRAIN)))
    return number + -number % (_VECTORS * threads)


def elu_of_sum(a: Tensor, bias: Tensor, parts: int = 1) -> Tensor:
    """elu(a + bias) = max(a + bias, exp(min(a + bias, 0)) - 1); in place unless autograd watches.

    On a CPU torch's ELU takes longer than the convolution before it; the same from ``exp2``, which is vectorised, half
    as long; in one pass over memory, compiled by numba where that is installed, a fifth.

    Args:
        a: ``(parts, N, C)`` or ``(N, C, H, W)``, without gaps in memory; with ``parts`` contiguous.
        bias: that can be added to ``a``, one value for each of the C channels, and of the ``parts``.
        parts: 1 for ``(N, C, H, W)``.
    """
    if torch.is_grad_enabled():
        return F.elu(a + bias)
    if a.device.type != "cpu":
        return F.elu_(a.add_(bias))
    kernel = _elu_kernel() if a.dtype == torch.float32 else None
    if kernel is not None and a.is_contiguous(
        memory_format=torch.channels_last if a.ndim == 4 else torch.contiguous_format
    ):
        _run(kernel, a.as_strided((a.numel(),), (1,)).numpy(), bias.numpy().reshape(parts, -1))
        return a
    a.add_(bias)
    flat = a.as_strided((a.numel(),), (1,))
    padded = flat.new_empty(whole_vectors(len(flat), flat.device))
    torch.clamp_max(flat, 0.0, out=padded[: len(flat)])
    torch.maximum(flat, padded.mul_(_LOG2_E).exp2_().sub_(1.0)[: len(flat)], out=flat)
    return a


def elu_backward(grad: Tensor, activation: Tensor) -> Tensor:
    """``grad * elu'``, from the activation elu(a): 1 above zero, activation + 1 below; one pass over memory, in place
    unless autograd watches."""
    constants = (1.0, 1.0, 1.0, True)
    if torch.is_grad_enabled():
        out: Tensor = torch.ops.aten.elu_backward(grad, *constants, activation)
    else:
        out = torch.ops.aten.elu_backward(grad, *constants, activation, grad_input=grad)
    return out


def sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    """``grad * output * (1 - output)``."""
    out: Tensor = torch.ops.aten.sigmoid_backward(grad, output)
    return out


def _run(kernel: _Kernel, a: _Floats, bias: _Floats) -> None:
    """``kernel`` in at most as many threads as torch's operations would take."""
    threads = min(torch.get_num_threads(), len(a) // _WORTH_A_THREAD)
    if threads < 2 or len(bias) > 1:
        kernel(a, bias)
        return
    rows = -(-a.size // (threads * bias.size))
    pieces = [a[start : start + rows * bias.size] for start in range(0, a.size, rows * bias.size)]
    pool = _threads(os.getpid())

    def begin(piece: _Floats) -> Future[None] | None:
        try:
            return pool.submit(kernel, piece, bias)
        except RuntimeError:  # the interpreter is shutting down
            kernel(piece, bias)
            return None

    for future in [begin(piece) for piece in pieces]:
        if future is not None:
            future.result()


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """A pool that lasts as long as the process: those forked from it have none of its threads."""
    return ThreadPoolExecutor()


@functools.cache
def _elu_kernel() -> _Kernel | None:
    """``_elu_in_place`` compiled, or None without numba. The first time on a machine takes half a second."""
    try:
        import numba
    except ImportError:
        return None
    compiler = functools.partial(
        numba.njit, "void(float32[::1], float32[:,::1])", nogil=True, error_model="numpy", fastmath={"contract"}
    )
    try:
        kernel: _Kernel = compiler(cache=True)(_elu_in_place)
    except Exception:  # nowhere to keep it, a full disk, a damaged file
        kernel = compiler()(_elu_in_place)
    return kernel


_ZERO, _HALF, _ONE, _LEAST = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(-126.0)
_EXPONENT_OF_ONE = np.float32(127.0)
_LOG2_E_SINGLE = np.float32(_LOG2_E)
# 2^f for |f| <= 1/2, to 1e-8: Chebyshev interpolation of (2^f - 1) / f.
_C1, _C2, _C3 = np.float32(6.93147188e-01), np.float32(2.40226508e-01), np.float32(5.55035711e-02)
_C4, _C5, _C6 = np.float32(9.61808256e-03), np.float32(1.33908634e-03), np.float32(1.54531629e-04)


def _elu_in_place(a: _Floats, bias: _Floats) -> None:
    parts, channels = bias.shape
    row = channels * max(1, _ROW // channels)
    repeated = np.empty(row, np.float32)
    length = len(a) // parts
    for part in range(parts):
        for i in range(row):
            repeated[i] = bias[part, i % channels]
        for start in range(part * length, (part + 1) * length, row):
            values = a[start : min(start + row, (part + 1) * length)]
            for i in range(len(values)):
                x = values[i] + repeated[i]
                # e^x = 2^k 2^f
                exponent = max(min(x, _ZERO) * _LOG2_E_SINGLE, _LEAST)
                k = np.floor(exponent + _HALF)
                f = exponent - k
                less_one = f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
                power = np.int32(np.int32(k + _EXPONENT_OF_ONE) << 23).view(np.float32)
                values[i] = max(x, less_one * power + (power - _ONE))
