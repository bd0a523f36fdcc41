"""`attention_biased` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu import attention, native
from clinfast.backends.cpu.native import check_dtype, check_rows, check_vector


def check_bias(bias: Tensor, heads: int) -> int:
    """Its reach."""
    check_dtype("attention_biased", "bias", bias, torch.float32)
    if bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0 or not bias.is_contiguous():
        raise ValueError(
            f"attention_biased: bias has shape {list(bias.shape)}; it must be [{heads}, 2 R + 1], contiguous"
        )
    check_rows("attention_biased", "bias", bias)
    return bias.shape[1] // 2


def attention_biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    bias: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    attention.refuse("attention_biased", q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    tokens, num_heads, head_dim = q.shape
    reach = check_bias(bias, num_heads)
    for name, places, rows in (("q_places", q_places, tokens), ("k_places", k_places, k.shape[0])):
        if places is not None:
            check_vector("attention_biased", name, places, rows, torch.int32)
    out = torch.empty(tokens, num_heads, head_dim, dtype=q.dtype)
    native.kernels().attention_biased(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), native.address(seqused_k),
        len(cu_seqlens_q) - 1, num_heads, head_dim, scale, native.DTYPES[q.dtype], torch.get_num_threads(), tokens,
        k.shape[0], bias.data_ptr(), reach, native.address(q_places), native.address(k_places), -1,
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {"attention_biased": attention_biased}
