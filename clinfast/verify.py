"""`verify`: ours and stock on the user's own inputs, both held against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinfast import patch
from clinfast.canary import compare, describe, evaluating, tensors_of
from clinfast.guard import POSITIONS
from clinfast.report import Verification
from clinfast.rounded import rounded_stock


def batches_of(inputs: Any) -> list[dict[str, Any]]:
    """Model inputs as a list of keyword dicts; one mapping, or several."""
    if isinstance(inputs, Mapping):
        batches = [dict(inputs)]
    elif isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes, Tensor)):
        batches = list(inputs)
    else:
        batches = [inputs]
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"inputs holds a {type(batch).__name__}; pass what the tokenizer returns (a mapping with input_ids "
                "and attention_mask), or a list of such batches"
            )
        for name, value in batch.items():
            if isinstance(value, list):
                raise TypeError(f"inputs[{name!r}] is a list; pass return_tensors='pt', padding=True to the tokenizer")
    if not batches:
        raise ValueError("inputs is empty; pass at least one batch")
    return [dict(batch) for batch in batches]


Outputs = Mapping[str, Tensor]
SPAN_LOGITS = ("start_logits", "end_logits")


class Tally:
    """Extremes over all outputs of all batches. A NaN counts as an infinite difference.

    `per_token` names the outputs that are [B, S, ...], of which pads have no part; None goes by their shapes.
    """

    def __init__(self, per_token: Collection[str] | None = None) -> None:
        self.per_token = per_token
        self.worst = self.ours_error = self.stock_error = self.scale = 0.0
        self.cosine = 1.0
        self.agreed = self.labels = 0

    def is_per_token(self, name: str, x: Tensor, shape: tuple[int, ...]) -> bool:
        if self.per_token is not None:
            return name in self.per_token
        return x.shape[:2] == shape and (x.dim() > 2 or name in SPAN_LOGITS)

    def add_batch(self, ours: Outputs, stock: Outputs, measure: Outputs, exact: Outputs, mask: Tensor | None) -> None:
        """
        Args:
            measure: the outputs whose error ours is held against: stock's in the precision that ours computes in.

        Raises:
            RuntimeError: an output is missing, or has another shape than stock's.
        """
        for name in stock:
            if name not in ours or ours[name].shape != stock[name].shape:
                raise RuntimeError(
                    f"stock returns {name} {describe(stock[name])}, the fast path {describe(ours.get(name))}"
                )
            self.add(name, ours[name], stock[name], measure[name], exact[name], mask)

    def passed(self, tolerance: float | None, eps: float, stock_error: float | None = None) -> bool:
        """Within `tolerance`; without one, at most twice stock's error (or `stock_error`, if that is given)."""
        if math.isinf(self.worst):
            return False
        if tolerance is not None:
            return self.worst <= tolerance
        allowed = self.stock_error if stock_error is None else stock_error
        return self.ours_error <= 2 * allowed + eps * self.scale

    def add(self, name: str, ours: Tensor, stock: Tensor, measure: Tensor, exact: Tensor, mask: Tensor | None) -> None:
        if mask is not None and not self.is_per_token(name, exact, mask.shape):
            mask = None
        self.worst = max(self.worst, _difference(ours, stock, mask))
        self.ours_error = max(self.ours_error, _difference(ours, exact, mask))
        self.stock_error = max(self.stock_error, _difference(measure, exact, mask))
        self.scale = max(self.scale, compare(exact, exact, mask)[1])
        a, b = real_rows(ours, mask), real_rows(stock, mask)
        if not len(a):
            return
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()
        self.cosine = min(self.cosine, -1.0 if math.isnan(cosine) else cosine)
        labels = labels_of(name, ours, mask), labels_of(name, stock, mask)
        if labels[0] is not None and labels[1] is not None:
            self.agreed += int((labels[0] == labels[1]).sum())
            self.labels += labels[0].numel()


def verify_module(module: nn.Module, inputs: Any, tolerance: float | None) -> Verification:
    """Run every batch on the fast path, in stock, and in a float64 copy of stock, which is freed afterwards.

    Where the user chose a lower precision than the model's own, stock's error is that of a copy in that precision; in
    fp8, of one whose products in the layers round their factors to e4m3 too.
    """
    forward = patch.patched(module)
    assert forward is not None
    batches = batches_of(inputs)
    encoder = forward.encoder
    before = dict(forward.fallbacks)
    tally = Tally(forward.match.per_token)
    with torch.no_grad(), evaluating(module):
        exact_model = copy.deepcopy(module).double()
        measure_model = rounded_stock(module, encoder)
        for batch in batches:
            batch.pop(POSITIONS, None)
            ours = tensors_of(module(**batch))
            stock = tensors_of(patch.stock_forward(module, **batch))
            exact = tensors_of(exact_model(**batch))
            measure = stock if measure_model is None else tensors_of(measure_model(**batch))
            tally.add_batch(ours, stock, measure, exact, batch.get("attention_mask"))
    new = {k: n - before.get(k, 0) for k, n in forward.fallbacks.items() if n > before.get(k, 0)}
    forward.verified = verification = Verification(
        passed=tally.passed(tolerance, max(torch.finfo(encoder.dtype).eps, torch.finfo(encoder.model_dtype).eps)),
        tolerance=tolerance,
        max_difference=tally.worst,
        ours_error=tally.ours_error,
        stock_error=tally.stock_error,
        cosine=tally.cosine,
        label_agreement=tally.agreed / tally.labels if tally.labels else None,
        batches=len(batches),
        fallbacks=new,
    )
    return verification


def _difference(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    difference = compare(a, b, mask)[0]
    return math.inf if math.isnan(difference) else difference


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, N] in float64: a per-token output (one with a mask) at its real positions."""
    x = x.double()
    if mask is None:
        return x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return torch.where(mask.bool(), x, 0) if x.dim() == 2 else x[mask.bool()]


def labels_of(name: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """What a user would read off an output: the best class, or position of a span, or None."""
    if name in SPAN_LOGITS:
        return (x if mask is None else x.masked_fill(~mask.bool(), -math.inf)).argmax(-1)
    if not name.endswith("logits"):
        return None
    if mask is not None and x.dim() == 2:
        return x[mask.bool()] > 0
    return real_rows(x, mask).argmax(-1) if x.shape[-1] > 1 else None
