"""`attention_disentangled` on the compiled CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.cpu import attention, native
from clinfast.backends.cpu.native import check_dtype, check_rows, check_vector

OP = "attention_disentangled"


def check_tables(q: Tensor, position_keys: Tensor | None, position_queries: Tensor | None, buckets: Tensor) -> int:
    """The number of their rows."""
    tables = {"position_keys": position_keys, "position_queries": position_queries}
    given = [(name, table) for name, table in tables.items() if table is not None]
    rows = given[0][1].shape[1] if given and given[0][1].dim() == 3 else 1
    for name, table in given:
        check_dtype(OP, name, table, q.dtype)
        check_rows(OP, name, table, (q.shape[1], rows, q.shape[2]), ndim=3)
        if not table.is_contiguous() or not rows:
            raise ValueError(f"{OP}: {name} is {list(table.shape)}; it must be contiguous and have rows")
    if buckets.dim() != 1 or buckets.shape[0] % 2 == 0:
        raise ValueError(f"{OP}: buckets has shape {list(buckets.shape)}; it must be [2 D + 1]")
    check_vector(OP, "buckets", buckets, buckets.shape[0], torch.int32)
    return rows


def attention_disentangled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    position_keys: Tensor | None,
    position_queries: Tensor | None,
    buckets: Tensor,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    attention.refuse(OP, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    tokens, num_heads, head_dim = q.shape
    rows = check_tables(q, position_keys, position_queries, buckets)
    for name, places, count in (("q_places", q_places, tokens), ("k_places", k_places, k.shape[0])):
        if places is not None:
            check_vector(OP, name, places, count, torch.int32)
    out = torch.empty(tokens, num_heads, head_dim, dtype=q.dtype)
    native.kernels().attention_disentangled(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_heads * head_dim, head_dim, cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), native.address(seqused_k),
        len(cu_seqlens_q) - 1, num_heads, head_dim, scale, native.DTYPES[q.dtype], torch.get_num_threads(), tokens,
        k.shape[0], native.address(position_keys), native.address(position_queries), buckets.data_ptr(),
        buckets.shape[0] // 2, rows, native.address(q_places), native.address(k_places),
    )  # fmt: skip
    return out


IMPLEMENTATIONS = {OP: attention_disentangled}
