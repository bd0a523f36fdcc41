"""`attention` on the compiled CUDA kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from clinfast.backends.cuda import native
from clinfast.backends.cuda.native import check_boundaries, check_dtype, check_rows, check_vector
from clinfast.backends.cuda.values import check_attention

MAX_HEAD_DIM = 256
# What CLINFAST_CUDA_ATTENTION may name: the kernel's number.
KERNELS = {"": 0, "simt": 1, "mma": 2, "wgmma": 3, "few": 4}
FEW = KERNELS["few"]
WIDTHS = (32, 64, 128, 256)


def chosen_kernel() -> int:
    asked = os.environ.get("CLINFAST_CUDA_ATTENTION", "")
    if asked not in KERNELS:
        raise ValueError(f"CLINFAST_CUDA_ATTENTION is {asked!r}; choose one of {', '.join(filter(None, KERNELS))}")
    return KERNELS[asked]


KERNEL = chosen_kernel()


def _refuse(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> None:
    """Raises where an argument is wrong; returns where the caller's quick test was only too strict."""
    check_dtype("attention", "q", q)
    device = check_rows("attention", "q", q, ndim=3)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim is {q.shape[2]}; the kernel serves 1 to {MAX_HEAD_DIM}")
    for name, tensor in (("k", k), ("v", v)):
        check_dtype("attention", name, tensor, q.dtype)
        check_rows("attention", name, tensor, device, (k.shape[0], *q.shape[1:]), ndim=3)
    batch = check_boundaries("attention", "cu_seqlens_q", cu_seqlens_q, device)
    check_vector("attention", "cu_seqlens_k", cu_seqlens_k, batch + 1, device, torch.int32)
    if seqused_k is not None:
        check_vector("attention", "seqused_k", seqused_k, batch, device, torch.int32)


def _is_like(vector: Tensor, shape: tuple[int, ...], device: int) -> bool:
    return (
        vector.dtype is torch.int32
        and vector.shape == shape
        and vector.is_contiguous()
        and vector.get_device() == device
        and native.is_ours(vector)
    )


def prechecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    kernel: int | None = None,
) -> Tensor:
    """Boundaries outside the tensors are held inside them, and rows of no note give NaN: raising would wait for the
    device."""
    dtype, q_shape, k_shape = q.dtype, q.shape, k.shape
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    boundaries, device = cu_seqlens_q.shape, q.get_device()
    if not (
        dtype in native.DTYPES
        and k.dtype is dtype is v.dtype
        and len(q_shape) == 3
        and v.shape == k_shape
        and (k_shape == q_shape or k_shape[1:] == q_shape[1:])
        and q_strides[2] == k_strides[2] == v_strides[2] == 1
        and k.get_device() == device == v.get_device()
        and native.is_ours(q)
        and 1 <= q_shape[2] <= MAX_HEAD_DIM
        and len(boundaries) == 1
        and boundaries[0] > 0
        and _is_like(cu_seqlens_q, boundaries, device)
        and (cu_seqlens_k is cu_seqlens_q or _is_like(cu_seqlens_k, boundaries, device))
        and (seqused_k is None or _is_like(seqused_k, (boundaries[0] - 1,), device))
    ):  # fmt: skip
        _refuse(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    if scale <= 0:  # the kernels take the maximum before the factor, and masked scores are infinite
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
        q_strides = q.stride()
    tokens, num_heads, head_dim = q_shape
    out = torch.empty(tokens, num_heads, head_dim, dtype=dtype, device=q.device)
    kernel = KERNEL if kernel is None else kernel
    kernels, partial, segments = native.on(device), 0, 1
    if kernel == FEW:
        segments = kernels.attention_segments(k_shape[0])
        if segments > 1:
            width = 2 + next(width for width in WIDTHS if head_dim <= width)
            room = torch.empty(tokens * num_heads * segments * width, dtype=torch.float32, device=q.device)
            partial = room.data_ptr()
    kernels.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q_strides[0], q_strides[1], k_strides[0],
        k_strides[1], v_strides[0], v_strides[1], num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(), 0 if seqused_k is None else seqused_k.data_ptr(), boundaries[0] - 1, num_heads,
        head_dim, tokens, k_shape[0], scale, partial, segments, native.DTYPES[dtype], kernel, device,
        native.stream(device),
    )  # fmt: skip
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    out = prechecked(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale)
    check_attention(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, seqused_k)
    return out


def first_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
) -> Tensor:
    """`prechecked` for one query a note: the keys of a note are split over warps, and over blocks from 1,024 on."""
    kernel = KERNEL or FEW
    return prechecked(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, kernel)


IMPLEMENTATIONS = {
    "attention": attention,
    "attention.prechecked": prechecked,
    "attention.first_token.prechecked": first_token,
}
