"""A small optimized model beside its stock copy, and which of the two paths a call took."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from bert_models import assert_equal, ids, make, right_padded, run

import clinfast
from clinfast import patch

INPUTS = {"input_ids": ids(3, 9), "attention_mask": right_padded([9, 5, 2])}


def unit_of(model: Any) -> patch.PatchedForward:
    ((_, _, forward),) = patch.find_patched(model)
    return forward


class Pair:
    """`model` is optimized, `stock` is a copy of it that was taken before."""

    def __init__(self, head: str = "base", model: Any = None, **options: Any) -> None:
        self.model = make(head) if model is None else model
        self.stock = copy.deepcopy(self.model)
        clinfast.optimize(self.model, **options)
        self.forward = unit_of(self.model)

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """The calls inside are one, and it takes the fast path."""
        before = self.forward.calls_fast, self.forward.calls_stock
        yield
        now = self.forward.calls_fast, self.forward.calls_stock
        assert now == (before[0] + 1, before[1]), dict(self.forward.fallbacks)

    @contextlib.contextmanager
    def falls_back(self, reason: str) -> Iterator[None]:
        """The calls inside are one, and it takes the stock forward because of `reason`."""
        before, fast = self.forward.fallbacks.copy(), self.forward.calls_fast
        yield
        assert dict(self.forward.fallbacks - before) == {reason: 1}
        assert self.forward.calls_fast == fast

    def check_fast(self, **inputs: Any) -> None:
        """A fast call that agrees with stock at real positions."""
        inputs = inputs or INPUTS
        with self.fast():
            ours = run(self.model, **inputs)
        close(ours, run(self.stock, **inputs), inputs.get("attention_mask"))

    def check_stock(self, reason: str, **inputs: Any) -> None:
        """A stock call that gives what the stock copy gives, to the bit."""
        inputs = inputs or INPUTS
        with self.falls_back(reason):
            ours = run(self.model, **inputs)
        assert_equal(ours, run(self.stock, **inputs))


def close(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], mask: torch.Tensor | None) -> None:
    assert ours.keys() == stock.keys()
    for name, theirs in stock.items():
        mine = ours[name]
        assert mine.dtype is theirs.dtype and mine.shape == theirs.shape
        if mask is not None and mine.shape[:2] == mask.shape:
            mine, theirs = mine[mask.bool()], theirs[mask.bool()]
        # Both are float32 sums of the same few hundred products in another order.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
