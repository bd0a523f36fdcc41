"""`rotate` on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from clinfast.backends.triton import checks
from clinfast.backends.triton.launch import launch
from clinfast.ops.rotate import check, outside, ranks

ROWS, HEADS = 4, 4


def prechecked(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    """For boundaries and places that `pack` made: their values are not looked at."""
    checks.rows("rotate", "x", x, ndim=3)
    check(x, cos, sin, cu_seqlens, places)
    tokens, heads, head_dim = x.shape
    batch, half = cu_seqlens.shape[0] - 1, head_dim // 2
    if tokens and heads and batch:
        launch(
            "rotate_kernel", (checks.cdiv(tokens, ROWS), checks.cdiv(heads, HEADS), 1),
            (x, cos, sin, cu_seqlens, places, tokens, batch, cos.shape[0], heads, *x.stride()[:2], batch.bit_length()),
            (half, checks.power_of_two(half), ROWS, HEADS),
        )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, places: Tensor | None = None) -> None:
    """Waits for the device, to look at the boundaries and places."""
    check(x, cos, sin, cu_seqlens, places)
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0]:
        raise ValueError(
            f"rotate: cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to the number of rows, "
            f"{x.shape[0]}"
        )
    at = ranks(x.shape[0], cu_seqlens) if places is None else places
    bad = (at.abs() >= cos.shape[0]).nonzero()
    if len(bad):
        raise outside(int(bad[0]), cos.shape[0])
    prechecked(x, cos, sin, cu_seqlens, places)


IMPLEMENTATIONS = {"rotate": rotate, "rotate.prechecked": prechecked}
