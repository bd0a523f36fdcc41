"""`attention_disentangled` on the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.backends.triton import attention, checks
from clinfast.backends.triton.launch import launch
from clinfast.triton_kernels import configs

OP = "attention_disentangled"


def _check(
    q: Tensor, k: Tensor, position_keys: Tensor | None, position_queries: Tensor | None, buckets: Tensor,
    q_places: Tensor | None, k_places: Tensor | None,
) -> int:  # fmt: skip
    """The number of table rows."""
    tables = {"position_keys": position_keys, "position_queries": position_queries}
    given = {name: table for name, table in tables.items() if table is not None}
    rows = next((table.shape[1] for table in given.values() if table.dim() == 3), 1)
    for name, table in given.items():
        checks.rows(OP, name, table, q.dtype, (q.shape[1], rows, q.shape[2]), ndim=3)
        if not table.is_contiguous() or not rows:
            raise ValueError(f"{OP}: {name} is {list(table.shape)}; it must be contiguous and have rows")
    if buckets.dim() != 1 or buckets.shape[0] % 2 == 0:
        raise ValueError(f"{OP}: buckets has shape {list(buckets.shape)}; it must be [2 D + 1]")
    checks.vector(OP, "buckets", buckets, buckets.shape[0], torch.int32)
    for name, places, count in (("q_places", q_places, q.shape[0]), ("k_places", k_places, k.shape[0])):
        if places is not None:
            checks.vector(OP, name, places, count, torch.int32)
    return rows


def prechecked(
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
    """For boundaries that `pack` made: their values are not looked at. A note has the same bits in any batch."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    table_rows = _check(q, k, position_keys, position_queries, buckets, q_places, k_places)
    q_tokens, heads, head_dim = q.shape
    out = torch.empty((q_tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if not out.numel() or cu_seqlens_q.shape[0] < 2:
        return out
    (block_m, block_n, warps, stages, _), block_r = configs.disentangled(q.itemsize, head_dim)
    work, bound = attention._tiles(cu_seqlens_q, cu_seqlens_k, seqused_k, q_tokens, k.shape[0], block_m)
    launch(
        "attention_disentangled_kernel", (heads, bound, 1),
        (q, k, v, out, work, position_keys, position_queries, buckets, q_places, k_places, bound, *q.stride()[:2],
         *k.stride()[:2], *v.stride()[:2], heads * head_dim, head_dim, table_rows, buckets.shape[0] // 2,
         scale * attention.LOG2E),
        (head_dim, max(16, checks.power_of_two(head_dim)), block_m, block_n, block_r, "ieee"),
        warps, stages,
    )  # fmt: skip
    return out


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
    """Waits for the device, to look at the boundaries and at the rows that `buckets` names."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    attention.check_values(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, seqused_k)
    rows = _check(q, k, position_keys, position_queries, buckets, q_places, k_places)
    for i, row in enumerate(buckets.tolist()):
        if not 0 <= row < rows:
            raise ValueError(f"{OP}: buckets[{i}] is {row}; buckets must lie within the {rows} rows of the tables")
    result: Tensor = prechecked(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, position_keys, position_queries, buckets, q_places,
        k_places,
    )  # fmt: skip
    return result


IMPLEMENTATIONS = {OP: attention_disentangled, f"{OP}.prechecked": prechecked, f"{OP}.fixed": prechecked}
