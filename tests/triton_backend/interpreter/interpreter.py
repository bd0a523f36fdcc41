"""Triton's interpreter made stricter, and right in bf16. Only where TRITON_INTERPRET=1.

What it still does not cover: tf32 (fp32 products run in full precision), the approximate exp2 and division of the
GPU, the flushing of subnormals, fused multiply-adds, least sizes of products, the order of asynchronous copies,
concurrency of any kind, and what only the compiler decides (layouts, registers, instructions: see test_compiling).

The interpreter computes bf16 on raw bits and truncates; `install` rounds as a GPU does and multiplies in fp32. It
reads and writes any address; here, each must lie within a tensor of the launch, no address may be written by two
programs, and a masked load without `other` gives NaN, where a GPU gives anything.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

NUMPY_FLOATS = (np.float16, np.float32, np.float64)


class Launch:
    """Extents of the tensors of the running launch, and which program wrote where."""

    def __init__(self) -> None:
        self.starts = self.ends = np.empty(0, np.uint64)
        self.written: dict[tuple[int, int, int], list[np.ndarray]] = {}

    def begin(self, tensors: list[torch.Tensor]) -> None:
        extents = sorted(filter(None, map(extent, tensors)))
        self.starts = np.array([a for a, _ in extents], np.uint64)
        self.ends = np.array([b for _, b in extents], np.uint64)
        self.written = {}

    def check(self, addresses: np.ndarray, size: int, what: str) -> None:
        # Views of one storage overlap, so every extent is asked.
        inside = np.zeros(addresses.shape, bool)
        for start, end in zip(self.starts, self.ends, strict=True):
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= end)
        assert inside.all(), f"{what} outside of every tensor: {addresses[~inside][:4]}, {self.starts}, {self.ends}"

    def end(self) -> None:
        mine = [np.unique(np.concatenate(parts)) for parts in self.written.values()]
        if mine:
            every, counts = np.unique(np.concatenate(mine), return_counts=True)
            assert (counts == 1).all(), f"two programs write to {every[counts > 1][:4]}"


def extent(tensor: torch.Tensor) -> tuple[int, int] | None:
    if not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


launch = Launch()


def decode(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """To bf16 bits, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def floats(handle):
    return decode(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def as_mask(mask):
    """3.9 loses the type of `tests & (scalar != 0)`, and then refuses it."""
    return interpreter.TensorHandle(np.asarray(mask.data).astype(bool), tl.int1)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    cast, binary, dot = builder.cast_impl, builder.binary_op, builder.create_dot
    fp_to_fp = builder.create_fp_to_fp
    load, store = builder.create_masked_load, builder.create_masked_store

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        values = floats(src).astype(np.float32)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(encode(values), target)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar != tl.float8e4nv:
            return fp_to_fp(self, src, dst_type, rounding_mode)
        # The interpreter halves a value that rounds up to a power of two.
        values = torch.from_numpy(np.ascontiguousarray(floats(src), np.float32))
        return interpreter.TensorHandle(values.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        result = op(floats(lhs), floats(rhs))
        return interpreter.TensorHandle(result if result.dtype == np.bool_ else encode(result), lhs.dtype.scalar)

    def create_dot(self, a, b, d, *rest):
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, *rest)
        product = np.matmul(floats(a), floats(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, *rest, **options):
        mask = as_mask(mask)
        kept = np.broadcast_to(mask.data, ptrs.data.shape)
        launch.check(ptrs.data[kept], ptrs.get_element_ty().primitive_bitwidth // 8 or 1, "a load")
        result = load(self, ptrs, mask, other, *rest, **options)
        if other is None and result.data.dtype in NUMPY_FLOATS:
            result.data = np.where(kept, result.data, np.nan).astype(result.data.dtype)
        return result

    def create_masked_store(self, ptrs, value, mask, *rest, **options):
        mask = as_mask(mask)
        kept = np.broadcast_to(mask.data, ptrs.data.shape)
        addresses = ptrs.data[kept]
        launch.check(addresses, value.dtype.primitive_bitwidth // 8 or 1, "a store")
        unique = np.unique(addresses)
        assert len(unique) == len(addresses), "one program writes to an address twice in one store"
        launch.written.setdefault(tuple(self.grid_idx), []).append(unique)
        return store(self, ptrs, value, mask, *rest, **options)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast_impl, binary_op, create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store

    executor = interpreter.GridExecutor
    call = executor.__call__

    def run(self, *args, **kwargs):
        launch.begin([getattr(a, "base", a) for a in args if isinstance(getattr(a, "base", a), torch.Tensor)])
        call(self, *args, **kwargs)
        launch.end()

    executor.__call__ = run
    # Turns on device_assert and the assertion that 32-bit arithmetic does not overflow.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
