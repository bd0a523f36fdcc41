"""Loads `clinfast._C`, chooses its instruction set, and turns tensors into what it takes."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None, str | None]:
    try:
        from clinfast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, None, f"clinfast._C does not load: {error}"
    try:
        isa = _C.select_isa(os.environ.get("CLINFAST_CPU_ISA", ""))
    except ValueError as error:
        return None, None, str(error)
    return _C, isa, None


def load_error() -> str | None:
    return _load()[2]


def isa() -> str | None:
    """The instruction set in use: amx, avx512_bf16, avx512, avx2 or plain; None without compiled kernels."""
    return _load()[1]


def kernels() -> ModuleType:
    module, _, error = _load()
    if module is None:
        raise RuntimeError(f"the compiled CPU kernels are not available: {error}")
    return module


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The kernels' number of the tensor's dtype; `dtype` demands that one."""
    code = DTYPES.get(tensor.dtype)
    if code is None or (dtype is not None and tensor.dtype is not dtype):
        wanted = "float32 or bfloat16" if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be {wanted}")
    return code


def check_rows(op: str, name: str, tensor: Tensor, shape: tuple[int, ...] | None = None, ndim: int = 2) -> None:
    """CPU memory, `ndim` dimensions (or exactly `shape`), last one contiguous."""
    if tensor.dim() != ndim or (shape is not None and tensor.shape != shape):
        wanted = f"{ndim} dimensions" if shape is None else f"shape {list(shape)}"
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must have {wanted}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}; the last dimension must be contiguous")
    if not tensor.is_cpu:
        raise ValueError(f"{op}: {name} is on {tensor.device}; the compiled CPU kernels need it on the CPU")


def check_vector(op: str, name: str, tensor: Tensor, size: int, dtype: torch.dtype = torch.float32) -> None:
    """A contiguous CPU vector of `size` elements of `dtype`."""
    if tensor.shape != (size,) or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it must be a contiguous "
            f"[{size}] {str(dtype).removeprefix('torch.')} CPU tensor"
        )


def check_boundaries(op: str, name: str, cu_seqlens: Tensor) -> int:
    """The number of notes of a [B + 1] int32 vector of boundaries; the kernels look at the values."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape {list(cu_seqlens.shape)}; it must be [B + 1]")
    entries = cu_seqlens.shape[0]
    check_vector(op, name, cu_seqlens, entries, torch.int32)
    return entries - 1
