"""Tries whether this machine's linears give a row the same bits whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clinfast.ops.linear import PackedLinear

ROWS = (1, 2, 3, 7, 16, 33, 64)

_proved: dict[tuple[str, torch.dtype, int, int, torch.device], bool] = {}


def proved(linears: Sequence[PackedLinear], device: torch.device) -> bool:
    """True where every distinct shape among `linears` passed the trial."""
    return all([_proved_one(linear, device) for linear in linears])


def _proved_one(linear: PackedLinear, device: torch.device) -> bool:
    key = (linear.library, linear.dtype, linear.in_features, linear.out_features, device)
    if key not in _proved:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(ROWS[-1], linear.in_features, generator=generator).to(device, linear.dtype)
        with torch.no_grad():
            whole = linear(x)
            _proved[key] = all(torch.equal(linear(x[:rows]), whole[:rows]) for rows in ROWS)
    return _proved[key]
