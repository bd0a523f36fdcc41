"""`attention` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu.native import DTYPES, check_boundaries, check_dtype, check_rows, check_vector, kernels

MAX_HEAD_DIM = 256


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtype("attention", "q", q)
    check_rows("attention", "q", q, ndim=3)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim is {q.shape[2]}; the kernel serves 1 to {MAX_HEAD_DIM}")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype("attention", name, tensor, q.dtype)
        check_rows("attention", name, tensor, (k.shape[0], *q.shape[1:]), ndim=3)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    dtype = q.dtype
    _check_rows(q, k, v)
    tokens, num_heads, head_dim = q.shape
    batch = check_boundaries("attention", "cu_seqlens_q", cu_seqlens_q)
    check_vector("attention", "cu_seqlens_k", cu_seqlens_k, batch + 1, torch.int32)
    used = 0
    if seqused_k is not None:
        check_vector("attention", "seqused_k", seqused_k, batch, torch.int32)
        used = seqused_k.data_ptr()
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    out = torch.empty((tokens, num_heads, head_dim), dtype=dtype)
    kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q_strides[0], q_strides[1], k_strides[0],
        k_strides[1], v_strides[0], v_strides[1], num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(), used, batch, num_heads, head_dim, scale, DTYPES[dtype], torch.get_num_threads(),
        tokens, k.shape[0],
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"attention": attention}
