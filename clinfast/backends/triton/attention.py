"""`attention` on the Triton kernels."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from clinfast.backends.triton import checks, cubins, device
from clinfast.backends.triton.launch import launch, or_torch
from clinfast.triton_kernels import configs

MAX_HEAD_DIM = 256
LOG2E = 1.4426950408889634
# Where a note is about one tile of keys, a program takes so many heads, if that leaves every multiprocessor this many.
HEADS, PROGRAMS = 4, 8
SHORT = 64
_latest = threading.local()


def check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> None:
    checks.rows("attention", "q", q, ndim=3)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim is {q.shape[2]}; the kernel serves 1 to {MAX_HEAD_DIM}")
    for name, tensor in (("k", k), ("v", v)):
        checks.rows("attention", name, tensor, q.dtype, (k.shape[0], *q.shape[1:]), ndim=3)
    batch = checks.boundaries("attention", "cu_seqlens_q", cu_seqlens_q)
    checks.vector("attention", "cu_seqlens_k", cu_seqlens_k, batch + 1, torch.int32)
    if seqused_k is not None:
        checks.vector("attention", "seqused_k", seqused_k, batch, torch.int32)


def check_values(
    q_tokens: int, k_tokens: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> None:
    """What the CPU's kernels look at as they go; here it waits for the device."""
    for name, cu_seqlens, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q_tokens),
        ("cu_seqlens_k", cu_seqlens_k, k_tokens),
    ):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens:
            raise ValueError(
                f"attention: {name} goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to the number of rows, "
                f"{tokens}"
            )
        for note in range(len(bounds) - 1):
            if bounds[note + 1] < bounds[note]:
                raise ValueError(f"attention: {name} decreases after entry {note}")
    for note, used in enumerate([] if seqused_k is None else seqused_k.tolist()):
        keys = bounds[note + 1] - bounds[note]
        if not 0 <= used <= keys:
            raise ValueError(f"attention: seqused_k[{note}] is {used}; the note has {keys} keys")


def _tiles(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, q_tokens: int, k_tokens: int, block_m: int
) -> tuple[Tensor, int]:
    """The list of tiles, and how many it has room for. One batch asks for the same one in every layer."""
    sources = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    versions = tuple(None if t is None or t.is_inference() else t._version for t in sources)
    key = (*versions, q_tokens, k_tokens, block_m, cubins.stream(device.index_of(cu_seqlens_q)))
    kept = getattr(_latest, "kept", None)
    if kept is not None:
        references, kept_key, tiles, bound = kept
        same = all(
            (ref is None and t is None) or (ref is not None and ref() is t)
            for ref, t in zip(references, sources, strict=True)
        )
        if same and key == kept_key:
            return tiles, bound
    batch = cu_seqlens_q.shape[0] - 1
    bound = q_tokens // block_m + batch
    tiles = torch.empty(5 * bound, dtype=torch.int32, device=cu_seqlens_q.device)
    used = cu_seqlens_k if seqused_k is None else seqused_k
    launch(
        "tiles_kernel", (checks.cdiv(batch, 32), 1, 1),
        (cu_seqlens_q, cu_seqlens_k, used, tiles, batch, q_tokens, k_tokens, int(seqused_k is not None), block_m,
         bound),
        (32, 128),
    )  # fmt: skip
    # Tensors of inference mode keep no version, so that a write to them would not show.
    if not any(t is not None and t.is_inference() for t in sources):
        references = tuple(None if t is None else weakref.ref(t) for t in sources)
        _latest.kept = (references, key, tiles, bound)
    return tiles, bound


def _kind_and_heads(index: int, q_tokens: int, batch: int, heads: int) -> tuple[str, int]:
    mean = q_tokens / batch
    if mean > SHORT:
        return "long", 1
    kind, block_m = ("few", 16) if mean <= 16 else ("short", 64)
    together = HEADS if heads % HEADS == 0 else 1
    programs = (q_tokens // block_m + batch) * heads // together
    return kind, together if programs >= PROGRAMS * device.multiprocessors(index) else 1


def extended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    scale: float,
    window: int | None = None,
    bias: Tensor | None = None,
    q_places: Tensor | None = None,
    k_places: Tensor | None = None,
    heads_together: int | None = None,
    tiles: configs.Attention | None = None,
) -> Tensor:
    """`attention` with two options of later architectures.

    Args:
        window: a query looks at keys at most so far from its own place in the note; those outside are skipped.
        bias: [heads, 2 R + 1] fp32, added to the scaled scores by the key's place minus the query's, clamped to R.
        q_places, k_places: [Tq] and [Tk] int32, places for the bias, None where they are ranks.
        heads_together, tiles: heads a program takes, which must divide their number, and its tiles, for tuning.
    """
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    q_tokens, heads, head_dim = q.shape
    batch = cu_seqlens_q.shape[0] - 1
    reach = 0
    if bias is not None:
        if bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0 or not bias.is_contiguous():
            raise ValueError(f"attention: bias has shape {list(bias.shape)}; it must be [{heads}, 2 R + 1], contiguous")
        checks.rows("attention", "bias", bias, torch.float32)
        reach = bias.shape[1] // 2
    for name, places, rows in (("q_places", q_places, q_tokens), ("k_places", k_places, k.shape[0])):
        if places is not None:
            checks.vector("attention", name, places, rows, torch.int32)
    if window is not None and window < 0:
        raise ValueError(f"attention: window is {window}; it must not be negative")
    out = torch.empty((q_tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if not out.numel() or not batch:
        return out
    index = device.index_of(q)
    kind, together = _kind_and_heads(index, q_tokens, batch, heads)
    together = heads_together or together
    if window is not None or bias is not None:
        kind, together = "few" if kind == "few" else "long", 1
    if tiles is None:
        tiles = configs.attention(device.device_class(index), q.itemsize, head_dim, kind)
    if bias is not None:
        tiles = configs.biased(tiles, q.itemsize, head_dim)
    block_m, block_n, warps, stages = tiles
    work, bound = _tiles(cu_seqlens_q, cu_seqlens_k, seqused_k, q_tokens, k.shape[0], block_m)
    if scale <= 0:  # the kernel takes the maximum before the factor, and masked scores are infinite
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    launch(
        "attention_kernel", (heads // together, bound, 1),
        (q, k, v, out, work, bias, q_places, k_places, bound, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
         heads * head_dim, head_dim, reach, scale * LOG2E),
        (head_dim, max(16, checks.power_of_two(head_dim)), block_m, block_n, together,
         -1 if window is None else window, "ieee"),
        warps, stages,
    )  # fmt: skip
    return out


@or_torch("attention")
def prechecked(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, scale: float
) -> Tensor:
    """For boundaries that `pack` made: their values are not looked at. The kernel stays inside q, k and v."""
    return extended(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, scale: float
) -> Tensor:
    """Waits for the device, to look at the boundaries."""
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    check_values(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, seqused_k)
    result: Tensor = prechecked(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale)
    return result


@or_torch("attention")
def fixed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None, scale: float
) -> Tensor:
    """`prechecked` in the tiles of long notes, whatever the batch: a note has the same bits in any."""
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k)
    tiles = configs.attention(device.device_class(device.index_of(q)), q.itemsize, q.shape[2], "long")
    return extended(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, heads_together=1, tiles=tiles)


IMPLEMENTATIONS = {"attention": attention, "attention.prechecked": prechecked, "attention.fixed": fixed}
