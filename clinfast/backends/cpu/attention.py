"""`attention` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu import native
from clinfast.backends.cpu.native import check_dtype, check_rows, check_vector

MAX_HEAD_DIM = 256


def refuse(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> None:
    """Raises where an argument is wrong; returns where the caller's quick test was only too strict."""
    check_dtype(op, "q", q)
    check_rows(op, "q", q, ndim=3)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim is {q.shape[2]}; the kernel serves 1 to {MAX_HEAD_DIM}")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(op, name, tensor, q.dtype)
        check_rows(op, name, tensor, (k.shape[0], *q.shape[1:]), ndim=3)
    batch = native.check_boundaries(op, "cu_seqlens_q", cu_seqlens_q)
    check_vector(op, "cu_seqlens_k", cu_seqlens_k, batch + 1, torch.int32)
    if seqused_k is not None:
        check_vector(op, "seqused_k", seqused_k, batch, torch.int32)


def _is_like(vector: Tensor, shape: tuple[int, ...]) -> bool:
    return vector.dtype is torch.int32 and vector.shape == shape and vector.is_contiguous() and vector.is_cpu


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    dtype, q_shape, k_shape = q.dtype, q.shape, k.shape
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    boundaries = cu_seqlens_q.shape
    if not (
        dtype in native.DTYPES
        and k.dtype is dtype is v.dtype
        and len(q_shape) == 3
        and v.shape == k_shape
        and (k_shape == q_shape or k_shape[1:] == q_shape[1:])
        and q_strides[2] == k_strides[2] == v_strides[2] == 1
        and q.is_cpu and k.is_cpu and v.is_cpu
        and 1 <= q_shape[2] <= MAX_HEAD_DIM
        and cu_seqlens_q.dtype is torch.int32
        and len(boundaries) == 1
        and boundaries[0] > 0
        and cu_seqlens_q.is_contiguous()
        and cu_seqlens_q.is_cpu
        and (cu_seqlens_k is cu_seqlens_q or _is_like(cu_seqlens_k, boundaries))
        and (seqused_k is None or _is_like(seqused_k, (boundaries[0] - 1,)))
    ):  # fmt: skip
        refuse("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    tokens, num_heads, head_dim = q_shape
    out = torch.empty(tokens, num_heads, head_dim, dtype=dtype)
    native.kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q_strides[0], q_strides[1], k_strides[0],
        k_strides[1], v_strides[0], v_strides[1], num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(), 0 if seqused_k is None else seqused_k.data_ptr(), boundaries[0] - 1,
        num_heads, head_dim, scale, native.DTYPES[dtype], torch.get_num_threads(), tokens, k_shape[0],
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"attention": attention}
