"""What the kernels do not look at: values on the device. Each function here fetches them, and so waits for the device;
the `prechecked` forms of the ops, for values that `pack` made, do without."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def check_attention(
    q_tokens: int, k_tokens: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_k: Tensor | None
) -> None:
    bounds: list[int] = []
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
        for note, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if end < begin:
                raise ValueError(f"attention: {name} decreases after entry {note}")
    for note, used in enumerate([] if seqused_k is None else seqused_k.tolist()):
        keys = bounds[note + 1] - bounds[note]
        if not 0 <= used <= keys:
            raise ValueError(f"attention: seqused_k[{note}] is {used}; the note has {keys} keys")


def check_pooling(rows: int, cu_seqlens: Tensor) -> None:
    for note, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if not 0 <= begin <= end <= rows:
            raise ValueError(
                f"pooling: cu_seqlens gives note {note} the rows {begin} to {end}; they must not decrease and "
                f"must lie within the {rows} rows of x"
            )


def _first(found: Tensor) -> int:
    at = found.nonzero()
    return int(at[0]) if len(at) else -1


def check_indices(op: str, indices: Tensor, positions: int, where: str) -> None:
    bad = _first((indices < 0) | (indices >= positions))
    if bad >= 0:
        raise IndexError(f"{op}: indices[{bad}] is {int(indices[bad])}; {where}")


def check_embedding(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    position_offset: int,
) -> None:
    batch, seqlen = input_ids.shape
    check_indices("embedding", indices, batch * seqlen, f"input_ids has {batch} x {seqlen} positions")
    at = indices.long()
    looked_up: list[tuple[str, Tensor, str, Tensor]] = [("input_ids", input_ids.reshape(-1)[at], "word", word)]
    if token_type is not None:
        types = torch.zeros_like(at) if token_type_ids is None else token_type_ids.reshape(-1)[at]
        looked_up.append(("token_type_ids", types, "token_type", token_type))
    counted = at % max(seqlen, 1) + position_offset
    positions = counted if position_ids is None else position_ids.reshape(-1)[at]
    looked_up.append(("the position", positions, "position", position))
    for source, values, name, table in looked_up:
        bad = _first((values < 0) | (values >= table.shape[0]))
        if bad >= 0:
            row, column = divmod(int(at[bad]), seqlen)
            raise IndexError(
                f"embedding: {source} at row {row}, column {column} is {int(values[bad])}; {name} has "
                f"{table.shape[0]} rows"
            )
