"""Arguments of the ops as the kernels take them; errors name the argument, its value, and what would work."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import device
from clinfast.ops.registry import NotOffered

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"


def on_gpu(op: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type != device.TYPE:
        raise ValueError(f"{op}: {name} is on {tensor.device}; the Triton kernels need it on the GPU")


def floats(op: str, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    if tensor.dtype not in FLOATS or (dtype is not None and tensor.dtype is not dtype):
        wanted = FLOAT_NAMES if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be {wanted}")


def rows(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    ndim: int = 2,
) -> None:
    """A float tensor of `ndim` dimensions (or exactly `shape`) on the GPU, the last one contiguous."""
    floats(op, name, tensor, dtype)
    if tensor.dim() != ndim or (shape is not None and tensor.shape != shape):
        wanted = f"{ndim} dimensions" if shape is None else f"shape {list(shape)}"
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must have {wanted}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}; the last dimension must be contiguous")
    on_gpu(op, name, tensor)


def vector(op: str, name: str, tensor: Tensor, size: int, dtype: torch.dtype = torch.float32) -> None:
    if (
        tensor.shape != (size,)
        or tensor.dtype is not dtype
        or not tensor.is_contiguous()
        or tensor.device.type != device.TYPE
    ):
        raise ValueError(
            f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it must be a contiguous "
            f"[{size}] {str(dtype).removeprefix('torch.')} GPU tensor"
        )


def ids(op: str, name: str, tensor: Tensor, shape: torch.Size | None = None) -> None:
    """int32 or int64 [B, S] on the GPU."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be int32 or int64")
    if tensor.dim() != 2 or (shape is not None and tensor.shape != shape):
        wanted = "two dimensions, [B, S]" if shape is None else f"the shape of input_ids, {list(shape)}"
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must have {wanted}")
    on_gpu(op, name, tensor)


def boundaries(op: str, name: str, cu_seqlens: Tensor) -> int:
    """The number of notes of a [B + 1] int32 vector of boundaries; its values are not looked at."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape {list(cu_seqlens.shape)}; it must be [B + 1]")
    vector(op, name, cu_seqlens, cu_seqlens.shape[0], torch.int32)
    return cu_seqlens.shape[0] - 1


def width(op: str, hidden: int, largest: int) -> int:
    """The power of two that holds a row. The next backend serves wider ones."""
    if hidden < 1:
        raise ValueError(f"{op}: hidden is {hidden}; it must be at least 1")
    if hidden > largest:
        raise NotOffered(f"hidden is {hidden}, and Triton's kernel has rows of at most {largest}")
    return max(128, power_of_two(hidden))


def power_of_two(n: int) -> int:
    """The least that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
