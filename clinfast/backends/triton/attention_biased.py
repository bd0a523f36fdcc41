"""`attention_biased` on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from clinfast.backends.triton import attention, device
from clinfast.triton_kernels import configs


def prechecked(
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
    """For boundaries that `pack` made: their values are not looked at. The kernel stays inside q, k and v."""
    return attention.extended(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, bias=bias, q_places=q_places, k_places=k_places
    )


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
    """Waits for the device, to look at the boundaries."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    attention.check_values(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, seqused_k)
    result: Tensor = prechecked(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, bias, q_places, k_places
    )
    return result


def fixed(
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
    """`prechecked` in the tiles of long notes, whatever the batch: a note has the same bits in any."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    tiles = configs.attention(device.device_class(device.index_of(q)), q.itemsize, q.shape[2], "long")
    return attention.extended(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, bias=bias, q_places=q_places, k_places=k_places,
        tiles=tiles,
    )  # fmt: skip


IMPLEMENTATIONS = {
    "attention_biased": attention_biased,
    "attention_biased.prechecked": prechecked,
    "attention_biased.fixed": fixed,
}
