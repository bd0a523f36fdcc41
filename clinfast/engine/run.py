"""One request from padded inputs to padded outputs: packing, the executor's layers, the branches of the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clinfast.engine.executors import EagerExecutor
from clinfast.engine.outputs import lazy_zeros
from clinfast.engine.packing import PackedBatch, pack, rows_of
from clinfast.engine.spec import FIRST_ROWS, Branch, EncoderOutput, HeadSpec, Request
from clinfast.engine.weights import PackedDense, PackedWeights
from clinfast.ops import registry

# From this many outputs on, logits go from the multiplication to their padded rows without a packed copy.
SCATTERED_OUTPUTS = 1024


def run(
    executor: EagerExecutor,
    weights: PackedWeights,
    head: HeadSpec,
    request: Request,
    padding: str,
    dtype: torch.dtype,
    *,
    column_zero: bool = False,
) -> EncoderOutput:
    """Compute the request; results in `dtype`.

    Args:
        padding: `"remove"`, or `"keep"` to compute padded positions too.
        column_zero: read column 0 for first tokens as stock does, be it padding or not. A call that finds it masked
            is refused otherwise, and this one computes every position.
    """
    batch = pack(
        request,
        executor.spec,
        executor.pack,
        keep_padding=column_zero or padding == "keep",
        first_token=head.reads_first_token and not column_zero,
    )
    if not batch.tokens:
        return no_tokens(executor.spec.hidden_size, head, batch, request, dtype)
    packed = compute(executor, weights, head, request, batch, column_zero=column_zero)
    return spread(executor, weights, head, request, batch, packed, dtype)


class PackedOutput(NamedTuple):
    """What the encoder and its head give on packed rows.

    `hidden_states` [T, H]; where the head needs first tokens only, [B, H]. `branches`: [B, N] or [T, N], one for each
    of the head's; None for those that `spread` computes (`is_late`).
    """

    hidden_states: Tensor
    branches: tuple[Tensor | None, ...]


def is_late(branch: Branch) -> bool:
    """Whether a branch goes from the hidden states to padded rows at once: too large, or for chosen positions."""
    return branch.rows == "per_token" and (branch.selectable or _scattered(branch))


def _scattered(branch: Branch) -> bool:
    last = branch.layers[-1]
    bare = last.activation == "none" and last.eps is None and branch.pads == "zero"
    return branch.out_features >= SCATTERED_OUTPUTS and bare


def compute(
    executor: EagerExecutor,
    weights: PackedWeights,
    head: HeadSpec,
    request: Request,
    batch: PackedBatch,
    *,
    column_zero: bool = False,
) -> PackedOutput:
    """All that needs no length on the host, hence may stand in a CUDA graph (but for `column_zero`)."""
    if head.only_first_tokens and not column_zero:
        x = first = executor.first_hidden_states(weights, request, batch)
    else:
        x = executor.all_hidden_states(weights, request, batch)
        first = x
        if column_zero:
            first = _unpack(executor, x, batch, x.dtype)[:, 0].contiguous()
        elif any(branch.rows in FIRST_ROWS for branch in head.branches):
            first = executor.first_token(x, batch)
    rows = {"per_token": x, "first_token": first, "first_real_token": first}
    if any(branch.rows == "mean" for branch in head.branches):
        rows["mean"] = executor.mean(x, batch)
    results = [
        None if is_late(branch) else _dense(executor, branch, layers, rows[branch.rows])
        for branch, layers in zip(head.branches, weights.branches, strict=True)
    ]
    return PackedOutput(x, tuple(results))


def spread(
    executor: EagerExecutor,
    weights: PackedWeights,
    head: HeadSpec,
    request: Request,
    batch: PackedBatch,
    packed: PackedOutput,
    dtype: torch.dtype,
    *,
    copy: bool = False,
) -> EncoderOutput:
    """Padded outputs; `copy` where `packed` is memory that the next call writes to."""
    x = packed.hidden_states
    hidden = _unpack(executor, x, batch, dtype) if head.hidden_states else None
    results = []
    for branch, layers, y in zip(head.branches, weights.branches, packed.branches, strict=True):
        if y is None:
            results.append(_late(executor, branch, layers, x, request, batch, dtype))
        elif branch.rows != "per_token":
            results.append(y.to(dtype, copy=copy))
        else:
            results.append(_padded(executor, branch, y, batch, dtype))
    return EncoderOutput(hidden, tuple(results))


def _dense(executor: EagerExecutor, branch: Branch, layers: tuple[PackedDense, ...], x: Tensor) -> Tensor:
    for dense, (linear, norm) in zip(branch.layers, layers, strict=False):
        x = linear(x, dense.activation)
        if norm is not None:
            assert dense.eps is not None
            x = executor.layer_norm(x, None, *norm, dense.eps)
    return x


def _late(
    executor: EagerExecutor,
    branch: Branch,
    layers: tuple[PackedDense, ...],
    x: Tensor,
    request: Request,
    batch: PackedBatch,
    dtype: torch.dtype,
) -> Tensor:
    if branch.selectable and request.positions is not None:
        rows = rows_of(request.positions, batch)
        return _dense(executor, branch, layers, x[rows]).to(dtype)
    if not _scattered(branch):
        return _padded(executor, branch, _dense(executor, branch, layers, x), batch, dtype)
    x = _dense(executor, branch, layers[:-1], x)
    out = lazy_zeros((batch.batch * batch.seqlen, branch.out_features), dtype, x.device)
    layers[-1].linear.scatter(x, batch.indices, out)
    return out.view(batch.batch, batch.seqlen, branch.out_features)


def _padded(executor: EagerExecutor, branch: Branch, y: Tensor, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    if branch.pads == "zero":
        return _unpack(executor, y, batch, dtype)
    padded = _pads(branch, (batch.batch * batch.seqlen, branch.out_features), dtype, y.device)
    padded.index_copy_(0, batch.indices.long(), y.to(dtype))
    return padded.view(batch.batch, batch.seqlen, branch.out_features)


def no_tokens(
    hidden_size: int, head: HeadSpec, batch: PackedBatch, request: Request, dtype: torch.dtype
) -> EncoderOutput:
    """A batch that is all padding, under a head that does not read the first token."""
    device = request.input_ids.device
    results = []
    for branch in head.branches:
        shape: tuple[int, ...] = (batch.batch, batch.seqlen) if branch.rows == "per_token" else (batch.batch,)
        if branch.selectable and request.positions is not None:
            shape = (len(rows_of(request.positions, batch)),)
        results.append(_pads(branch, (*shape, branch.out_features), dtype, device))
    shape = (batch.batch, batch.seqlen, hidden_size)
    return EncoderOutput(torch.zeros(shape, dtype=dtype, device=device) if head.hidden_states else None, tuple(results))


def _pads(branch: Branch, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 0.0 if branch.pads == "zero" else torch.finfo(dtype).min, dtype=dtype, device=device)


def _unpack(executor: EagerExecutor, packed: Tensor, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """[T, N] to [B, S, N] with zeros at padded positions."""
    kernel_dtype = dtype if dtype in registry.KERNEL_DTYPES[executor.device] else torch.float32
    padded = executor.unpack(packed, batch.indices, batch.batch * batch.seqlen, kernel_dtype)
    return padded.view(batch.batch, batch.seqlen, packed.shape[1]).to(dtype)
