"""A GPU that is none: tensors that claim to be on `GPU` and compute on the CPU.

Operations see the devices that real ones would see, and are refused where CUDA would refuse them:
tensors of two devices in one operation, NumPy on a tensor of the GPU. Values are real, so code that
reads them runs as it does on a GPU. What it cannot show: numerics, kernels that are missing there,
and what is slow. Waits of the host for the device are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten: Any = torch.ops.aten
#: The name that torch has for devices it does not know.
GPU = torch.device("privateuseone", 0)
#: Operations whose tensors may lie anywhere.
_COPIES = {aten.copy_.default, aten._to_copy.default}
#: Operations whose indices may be on the CPU.
_INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}


class Claimed(Tensor):
    """A tensor of the pretended GPU; `inner` is where it really is."""

    inner: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Claimed:
        with torch.inference_mode(False):  # views of others may outlive the mode they are made in
            made = Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                layout=inner.layout,
                device=GPU,
            )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("a tensor of the GPU has no NumPy array: copy it to the CPU first")
        return self.cpu().numpy()

    def __repr__(self) -> str:
        return f"Claimed({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran after the pretended GPU was gone")


class PretendedGpu(TorchDispatchMode):
    """While it is entered, `device=GPU` works. `waits` counts reads of values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # what is made of other operations; inference mode brings it here whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        claimed = [tensor for tensor in tensors if isinstance(tensor, Claimed)]
        asked = kwargs.get("device")
        on_gpu = bool(claimed) if asked is None else torch.device(asked).type == GPU.type
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if claimed and len(claimed) < len(tensors):
            _check(func, args, tensors)
        if func is aten._fused_sdp_choice.default and claimed:
            return 0  # plain products: what CUDA takes for float32 and grouped queries
        if func is aten._to_copy.default and claimed and not on_gpu:
            self.waits += 1
        if func in (aten._local_scalar_dense.default, aten.nonzero.default) and claimed:
            self.waits += 1
        if func is aten.copy_.default:
            self.waits += isinstance(args[1], Claimed) and not isinstance(args[0], Claimed)
            on_gpu = isinstance(args[0], Claimed)
        found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        written = _written(func, args, kwargs)
        if written:
            return written[0] if len(written) == 1 else type(found)(written)
        return _outer(found, on_gpu)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Claimed) else value


def _outer(found: Any, on_gpu: bool) -> Any:
    if not on_gpu:
        return found
    return tree_map(lambda each: Claimed(each) if isinstance(each, Tensor) else each, found)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors that an operation writes and returns."""
    schema = func._schema
    if not any(each.alias_info and each.alias_info.is_write for each in schema.returns):
        return []
    return [
        kwargs[each.name] if each.name in kwargs else args[place]
        for place, each in enumerate(schema.arguments)
        if each.alias_info and each.alias_info.is_write
    ]


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses: a tensor of the CPU beside one of the GPU."""
    if func in _COPIES:
        return
    if func in _INDEXED:
        home, _, *values = args
        if not isinstance(home, Claimed):
            raise RuntimeError(f"{func}: indices on the GPU for a tensor on the CPU")
        tensors = [each for each in values if isinstance(each, Tensor)]
    for tensor in tensors:
        if not isinstance(tensor, Claimed) and tensor.dim():
            raise RuntimeError(
                f"{func}: {tuple(tensor.shape)} {tensor.dtype} on the CPU beside tensors on the GPU"
            )


@cache
def _register() -> None:
    """Let torch know of the device, for the rest of the process."""
    _setup_privateuseone_for_python_backend()


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Let tensors be made on `GPU`."""
    _register()
    lifting = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with PretendedGpu() as gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(lifting)
