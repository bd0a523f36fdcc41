"""`embedding`: the sum of word, token type and position rows, then LayerNorm or not, for packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from clinfast.ops import registry


def reference(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    position_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    at = indices.long()
    total = word[input_ids.reshape(-1)[at].long()]
    if token_type is not None:
        types = torch.zeros_like(at) if token_type_ids is None else token_type_ids.reshape(-1)[at].long()
        total = total + token_type[types]
    if position_ids is None:
        positions = at % max(input_ids.shape[1], 1) + position_offset
    else:
        positions = position_ids.reshape(-1)[at].long()
    total = total + position[positions]
    if weight is None or shift is None:
        return total.to(dtype)
    normalised = torch.nn.functional.layer_norm(
        total, total.shape[-1:], weight.to(total.dtype), shift.to(total.dtype), eps
    )
    return normalised.to(dtype)


def fake(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    position_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    return word.new_empty((indices.shape[0], word.shape[1]), dtype=dtype)


_run = registry.define(
    registry.Op(
        "embedding",
        "(Tensor input_ids, Tensor? token_type_ids, Tensor indices, Tensor? position_ids, Tensor word, "
        "Tensor position, Tensor? token_type, Tensor? weight, Tensor? shift, float eps, int position_offset, "
        "ScalarType dtype) -> Tensor",
        reference,
        fake,
    )
)


def embedding(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    indices: Tensor,
    position_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    position_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm((word[id] + token_type[type]) + position[p]) * weight + shift.

    The sum and the LayerNorm are fp32 whatever the tables' dtype.

    Args:
        input_ids: [B, S] int32 or int64, any strides.
        token_type_ids: like `input_ids`; None means type 0 for every token.
        indices: [T] int32, each token's row * S + column, as `pack` returns them.
        position_ids: [B, S] int32, contiguous, each token's p; None means its column + `position_offset`.
        word: [vocab_size, H], fp32 or bf16, last dimension contiguous, as the other tables.
        position: [max_positions, H].
        token_type: [type_vocab_size, H], or None where the family has no token types.
        weight, shift: [H], fp32; both None where no LayerNorm follows the sum.
        eps: added to the variance.
        position_offset: added to the column; not used with `position_ids`.
        dtype: of the result, fp32 or bf16.

    Returns:
        [T, H] in `dtype`.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take.
        IndexError: an index, id, type or position outside its table; nothing is read outside.
    """
    return torch.ops.clinfast.embedding(
        input_ids,
        token_type_ids,
        indices,
        position_ids,
        word,
        position,
        token_type,
        weight,
        shift,
        eps,
        position_offset,
        dtype,
    )
