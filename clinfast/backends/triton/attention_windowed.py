"""`attention_windowed` on the Triton kernels, which skip tiles of keys by rank; by given places, PyTorch serves."""

from __future__ import annotations

from torch import Tensor

from clinfast.backends.triton import attention, device
from clinfast.backends.triton.launch import KernelUnavailable
from clinfast.ops.attention_windowed import check_window
from clinfast.triton_kernels import configs


def _no_places(q_places: Tensor | None, k_places: Tensor | None) -> None:
    if q_places is not None or k_places is not None:
        raise KernelUnavailable("a mask has holes: the kernel's window counts ranks")


def prechecked(
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
    """For boundaries that `pack` made: their values are not looked at. The kernel stays inside q, k and v."""
    check_window(window)
    _no_places(q_places, k_places)
    return attention.extended(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window)


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
    """Waits for the device, to look at the boundaries."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    attention.check_values(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, seqused_k)
    result: Tensor = prechecked(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window, q_places, k_places
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
    window: int,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
) -> Tensor:
    """`prechecked` in the tiles of long notes, whatever the batch: a note has the same bits in any."""
    attention.check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    check_window(window)
    _no_places(q_places, k_places)
    tiles = configs.attention(device.device_class(device.index_of(q)), q.itemsize, q.shape[2], "long")
    return attention.extended(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window, tiles=tiles)


IMPLEMENTATIONS = {
    "attention_windowed": attention_windowed,
    "attention_windowed.prechecked": prechecked,
    "attention_windowed.fixed": fixed,
}
