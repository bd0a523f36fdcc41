"""Whole encoder layers in one call of the compiled kernels, where every linear is our own."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    def __init__(
        self,
        layers: Sequence[tuple],
        rotations: Sequence[tuple[Tensor, Tensor] | None],
        windows: Sequence[int],
    ) -> None:
        self._held = (layers, rotations)
        first: NativeLinear = layers[0][0]
        self._code, self._table = first._code, first._table
        self._dtype = first.dtype
        self._intermediate, self._gated = layers[0][3].out_features, layers[0][3].gated
        self._positions = max((tables[0].shape[0] for tables in rotations if tables is not None), default=0)
        rows = [
            [*(address for part in (*layer, tables) for address in _addresses(part)), window]
            for layer, tables, window in zip(layers, rotations, windows, strict=True)
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
            native.address(places), self._gated, self._positions,
        )  # fmt: skip
        calls["encoder_layer[cpu]"] += num_layers
        if size <= KEPT_BYTES:
            _workspaces.append(workspace)
        return x


def _addresses(part: NativeLinear | tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    if part is None:
        return 0, 0
    if isinstance(part, NativeLinear):
        return part.weight.data_ptr(), native.address(part.bias)
    return part[0].data_ptr(), part[1].data_ptr()


def _take_workspace(size: int) -> Tensor:
    try:
        workspace = _workspaces.pop()
    except IndexError:
        workspace = torch.empty(0, dtype=torch.uint8)
    return workspace if workspace.nbytes >= size else torch.empty(size, dtype=torch.uint8)


def encoder_layers(
    layers: Sequence[tuple], rotations: Sequence[tuple[Tensor, Tensor] | None], windows: Sequence[int]
) -> EncoderLayers | None:
    """The layers as one call, or None where a linear of theirs is not our own."""
    linears = [part for layer in layers for part in layer if part is not None and not isinstance(part, tuple)]
    if not linears or any(type(part) is not NativeLinear for part in linears):
        return None
    return EncoderLayers(layers, rotations, windows)


IMPLEMENTATIONS = {"encoder_layers": encoder_layers}
