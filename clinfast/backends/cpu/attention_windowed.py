"""`attention_windowed` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu import attention, native
from clinfast.backends.cpu.native import check_vector
from clinfast.ops.attention_windowed import check_window


def attention_windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    window: int,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    attention.refuse("attention_windowed", q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    check_window(window)
    tokens, num_heads, head_dim = q.shape
    for name, places, rows in (("q_places", q_places, tokens), ("k_places", k_places, k.shape[0])):
        if places is not None:
            check_vector("attention_windowed", name, places, rows, torch.int32)
    out = torch.empty(tokens, num_heads, head_dim, dtype=q.dtype)
    native.kernels().attention_biased(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), native.address(seqused_k),
        len(cu_seqlens_q) - 1, num_heads, head_dim, scale, native.DTYPES[q.dtype], torch.get_num_threads(), tokens,
        k.shape[0], 0, 0, native.address(q_places), native.address(k_places), window,
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"attention_windowed": attention_windowed}
