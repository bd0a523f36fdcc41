"""`rotate`: rotary position embedding, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry


def tables(inverse_frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim / 2] of position * inverse frequency, in fp32 as transformers computes them."""
    at = torch.arange(positions, dtype=torch.float32, device=inverse_frequencies.device)
    angles = at[:, None] * inverse_frequencies.float()[None, :]
    return angles.cos(), angles.sin()


def ranks(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """[tokens] int64: each token's rank in its note."""
    at = torch.arange(tokens, device=cu_seqlens.device)
    note = torch.bucketize(at, cu_seqlens[1:].long(), right=True)
    return at - cu_seqlens.long()[note]


def reference(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> Tensor:
    """Not in place."""
    at = ranks(x.shape[0], cu_seqlens) if places is None else places.long()
    c, s = (table[:, None].to(x.dtype) for table in (cos[at.abs()], sin[at.abs()] * at.sign()[:, None]))
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def fake(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    return None


_run = registry.define(
    registry.Op(
        "rotate",
        "(Tensor(a!) x, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor? places=None) -> ()",
        reference,
        fake,
    )
)


def check(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None) -> None:
    """Raises ValueError where shapes or dtypes do not go together."""
    if x.dim() != 3 or x.shape[2] % 2 or x.shape[2] == 0 or x.stride(2) != 1:
        raise ValueError(
            f"rotate: x is {list(x.shape)} with strides {x.stride()}; it must be [tokens, heads, head_dim] with an "
            "even head_dim, its last dimension contiguous"
        )
    half = x.shape[2] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (cos.shape[0], half) or table.dtype is not torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"rotate: {name} is {list(table.shape)} {table.dtype}; it must be [positions, {half}] float32, "
                "contiguous"
            )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype is not torch.int32:
        raise ValueError(f"rotate: cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be [B + 1] int32")
    if places is not None and (places.shape != x.shape[:1] or places.dtype is not torch.int32):
        raise ValueError(f"rotate: places is {list(places.shape)} {places.dtype}; it must be [{x.shape[0]}] int32")
    for name, other in (("cos", cos), ("sin", sin), ("cu_seqlens", cu_seqlens), ("places", places)):
        if other is not None and (other.device != x.device or not other.is_contiguous()):
            raise ValueError(f"rotate: {name} must be contiguous and on {x.device}, as x is")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    """Turns the halves (a, b) of each head by its token's place p: (a cos[p] - b sin[p], b cos[p] + a sin[p]).

    RoFormer's position embedding (arXiv:2104.09864) on halves, as transformers has it; computed in fp32, rounded once.

    Args:
        x: [T, heads, head_dim], fp32 or bf16, written in place: queries and keys of a packed QKV tensor as one view.
        cos, sin: [positions, head_dim / 2] fp32, contiguous (`tables`).
        cu_seqlens: [B + 1] int32, contiguous, from 0 to T.
        places: [T] int32, contiguous: each token's place; None where it is its rank in its note. A negative place turns
            backwards.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take.
        IndexError: a place beyond the tables; such a token is left as it was.
    """
    torch.ops.clinfast.rotate(x, cos, sin, cu_seqlens, places)


def outside(token: int, positions: int) -> IndexError:
    return IndexError(f"rotate: the place of token {token} is beyond the tables, which have {positions} positions")
