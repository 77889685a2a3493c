"""A second device: CUDA if there is one, else a pretended one.

The pretended one's tensors compute on the CPU and refuse to be mixed with the CPU's: so it shows on any
machine that nothing stays behind when a model moves.
"""

import contextlib

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

CUDA = torch.cuda.is_available()

try:
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
except ImportError:  # older torch
    AVAILABLE = CUDA
else:
    AVAILABLE = True

if AVAILABLE and not CUDA:

    class _Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.float16, torch.bfloat16]

        def get_rng_state(self, device=None):
            return torch.empty(0)

        def set_rng_state(self, state, device=None):
            pass

        def manual_seed_all(self, seed):
            pass

        def _is_in_bad_fork(self):
            return False

    _setup_privateuseone_for_python_backend("elsewhere", _Backend())

DEVICE = "elsewhere"

# As on CUDA: an index may lie on the CPU, and these copy from one device to another.
_MAY_MIX = ("aten::index", "aten::_index", "aten::_unsafe_index", "aten::copy_", "aten::_to_copy")


class Elsewhere(Tensor):
    """A tensor of the second device; ``held`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __module__ = "torch"  # eagerpy asks for it
    is_cuda = True

    @staticmethod
    def __new__(cls, held):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, 0),
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def __repr__(self):
        return f"Elsewhere({self.held})"


def _dispatch(func, args, kwargs):
    here, there = [], []

    def held(value):
        if isinstance(value, Elsewhere):
            there.append(value)
            return value.held
        if isinstance(value, Tensor) and value.dim() > 0:
            here.append(value)
        return value

    plain_args, plain_kwargs = tree_map(held, args), tree_map(held, kwargs)
    name, device = func._schema.name, kwargs.get("device")
    if there and here and not (name.startswith(_MAY_MIX) and (isinstance(args[0], Elsewhere) or "copy" in name)):
        raise RuntimeError(f"{func}: expected all tensors on one device, got some here and some elsewhere")
    if device is None:
        to = bool(there) and not (name == "aten::copy_" and not isinstance(args[0], Elsewhere))
    else:
        to = torch.device(device).type == DEVICE
        plain_kwargs["device"] = torch.device("cpu")
    out = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and name.endswith("_"):
        return None if out is None else args[0]
    if not to:
        return out
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _indices(index):
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(_indices(part) for part in index) if isinstance(index, tuple) else index


class _Literals(TorchFunctionMode):
    """``torch.tensor`` of numbers and lists as indices do not reach a dispatch mode."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], _indices(args[1]), *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def second_device():
    if CUDA:
        yield "cuda"
        return
    # Assigning to ``parameter.data`` would leave ``held`` behind.
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Factories(), _Literals():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
