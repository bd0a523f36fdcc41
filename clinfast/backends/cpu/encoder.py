"""Whole encoder layers in one call of the compiled kernels, where every linear is our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinfast.backends.cpu import native
from clinfast.backends.cpu.linear import NativeLinear
from clinfast.ops.linear import ACTIVATIONS
from clinfast.ops.registry import calls

# A workspace above this size is given back after the call; smaller ones wait for the next one.
KEPT_BYTES = 64 << 20

_workspaces: list[Tensor] = []


class EncoderLayers:
    """Addresses of the packed weights of a run of layers.

    Args:
        layers: for each layer `(qkv, attention_output, attention_norm, ffn_in, ffn_out, output_norm)`; linears are
            `NativeLinear`, norms pairs of fp32 vectors (weight, shift). Under pre-norm `attention_norm` may be None.
        rotations: for each layer its tables of `rotate`, cos and sin, or None.
        windows: for each layer the window of its attention, -1 for none.
        positions: for each layer the tables `position_keys` and `position_queries` of disentangled attention, each of
            which may be None.
        buckets: what goes with them; None where attention is not disentangled.
    """

    def __init__(
        self,
        layers: Sequence[tuple],
        rotations: Sequence[tuple[Tensor, Tensor] | None],
        windows: Sequence[int],
        positions: Sequence[tuple[Tensor | None, Tensor | None]],
        buckets: Tensor | None,
    ) -> None:
        self._held = layers, rotations, positions
        self._buckets = buckets
        tables = [table for pair in positions for table in pair if table is not None]
        self._position_rows = tables[0].shape[1] if tables else 0
        first: NativeLinear = layers[0][0]
        self._code, self._table = first._code, first._table
        self._dtype = first.dtype
        self._intermediate, self._gated = layers[0][3].out_features, layers[0][3].gated
        self._rotation_rows = max((rotation[0].shape[0] for rotation in rotations if rotation is not None), default=0)
        rows = [
            [*(address for part in (*layer, pair, rotation) for address in _addresses(part)), window]
            for layer, pair, rotation, window in zip(layers, positions, rotations, windows, strict=True)
        ]
        self._addresses = torch.tensor(rows, dtype=torch.int64)

    def run(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        seqused_k: Tensor | None,
        num_heads: int,
        scale: float,
        eps: float,
        activation: str,
        pre_norm: bool,
        bias: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Overwrites and returns `x` [T, H], contiguous. `cu_seqlens` [B + 1] int32 as `pack` made it; `bias` and
        `places` [T] as in `attention_biased`. Under a rotation, places are below the number of positions that its
        tables have; so are ranks, which None stands for."""
        kernels = native.kernels()
        tokens, hidden = x.shape
        size = kernels.encoder_workspace_bytes(tokens, hidden, self._intermediate, self._code, self._table)
        workspace = _take_workspace(size)
        num_layers = len(self._addresses)
        kernels.encoder(
            self._addresses.data_ptr(), x.data_ptr(), workspace.data_ptr(), cu_seqlens.data_ptr(),
            native.address(seqused_k), num_layers, tokens, len(cu_seqlens) - 1, num_heads, hidden // num_heads,
            self._intermediate, scale, eps, ACTIVATIONS.index(activation), pre_norm, self._code, self._table,
            torch.get_num_threads(), native.address(bias), 0 if bias is None else bias.shape[1] // 2,
            native.address(places), native.address(self._buckets),
            0 if self._buckets is None else self._buckets.shape[0] // 2, self._position_rows, self._gated,
            self._rotation_rows,
        )  # fmt: skip
        calls["encoder_layer[cpu]"] += num_layers
        if size <= KEPT_BYTES:
            _workspaces.append(workspace)
        return x


def _addresses(part: NativeLinear | tuple[Tensor | None, Tensor | None] | None) -> tuple[int, int]:
    if part is None:
        return 0, 0
    if isinstance(part, NativeLinear):
        return part.weight.data_ptr(), native.address(part.bias)
    return native.address(part[0]), native.address(part[1])


def _take_workspace(size: int) -> Tensor:
    try:
        workspace = _workspaces.pop()
    except IndexError:
        workspace = torch.empty(0, dtype=torch.uint8)
    return workspace if workspace.nbytes >= size else torch.empty(size, dtype=torch.uint8)


def encoder_layers(layers: Sequence[tuple], *terms: Any) -> EncoderLayers | None:
    """The layers as one call, or None where a linear of theirs is not our own."""
    linears = [part for layer in layers for part in layer if part is not None and not isinstance(part, tuple)]
    if not linears or any(type(part) is not NativeLinear for part in linears):
        return None
    return EncoderLayers(layers, *terms)


IMPLEMENTATIONS = {"encoder_layers": encoder_layers}
