"""`verify`: ours and stock on the user's own inputs, both held against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinfast import patch
from clinfast.canary import compare, evaluating, tensors_of
from clinfast.report import Verification


def batches_of(inputs: Any) -> list[dict[str, Any]]:
    """Model inputs as a list of keyword dicts; one mapping, or several."""
    if isinstance(inputs, Mapping):
        return [dict(inputs)]
    if isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes, Tensor)):
        batches = list(inputs)
        if batches and all(isinstance(batch, Mapping) for batch in batches):
            return [dict(batch) for batch in batches]
    raise TypeError(
        f"inputs is {type(inputs).__name__}; pass what the tokenizer returns (a mapping with input_ids and "
        "attention_mask), or a list of such batches"
    )


def verify_module(module: nn.Module, inputs: Any, tolerance: float | None) -> Verification:
    """Run every batch three times: fast path, stock, and stock in float64 (a copy, freed afterwards)."""
    forward = patch.patched(module)
    assert forward is not None
    batches = batches_of(inputs)
    if not batches:
        raise ValueError("inputs is empty; pass at least one batch")
    before = dict(forward.fallbacks)
    worst, ours_error, stock_error, cosine = 0.0, 0.0, 0.0, 1.0
    agreed = labels = 0
    with torch.no_grad(), evaluating(module):
        exact_model = copy.deepcopy(module).double()
        for batch in batches:
            mask = batch.get("attention_mask")
            ours = tensors_of(module(**batch))
            stock = tensors_of(patch.stock_forward(module, **batch))
            exact = tensors_of(exact_model(**batch))
            for name in stock.keys() & ours.keys():
                worst = max(worst, compare(ours[name], stock[name], mask)[0])
                ours_error = max(ours_error, compare(ours[name], exact[name], mask)[0])
                stock_error = max(stock_error, compare(stock[name], exact[name], mask)[0])
                a, b = real_rows(ours[name], mask), real_rows(stock[name], mask)
                if len(a):
                    cosine = min(cosine, torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item())
                if name == "logits" and len(a):
                    agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
                    labels += len(a)
    new = {k: n - before.get(k, 0) for k, n in forward.fallbacks.items() if n > before.get(k, 0)}
    floor = torch.finfo(forward.encoder.dtype).eps
    passed = worst <= tolerance if tolerance is not None else ours_error <= 2 * stock_error + floor
    return Verification(
        passed=bool(passed),
        tolerance=tolerance,
        max_difference=worst,
        ours_error=ours_error,
        stock_error=stock_error,
        cosine=cosine,
        label_agreement=agreed / labels if labels else None,
        batches=len(batches),
        fallbacks=new,
    )


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.double()
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])
