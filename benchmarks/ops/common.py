"""What the op benchmarks share: parity before any timing, then stock and ours in alternating rounds.

Run them with

    pytest benchmarks/ops -o python_files=bench_*.py -o python_functions=bench_* --benchmark-json=ops.json

A benchmark's `extra_info` holds `ours_us` and `stock_us`, medians a call in microseconds, and `ratio`, the
median over the rounds of stock / ours.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clinfast.backends.cpu import native

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# hidden_size, intermediate_size, num_heads
BERT_BASE, MINILM = (768, 3072, 12), (384, 1536, 12)
MODELS = [pytest.param(BERT_BASE, id="bert-base"), pytest.param(MINILM, id="minilm")]
# 32 notes of log-normal lengths: median 120, cut at 512, 36% of the padded area.
RAGGED = (
    67, 121, 512, 85, 264, 37, 147, 98, 193, 58, 111, 334, 76, 512, 129, 45,
    175, 102, 240, 23, 138, 89, 420, 115, 62, 208, 158, 94, 302, 71, 512, 133,
)  # fmt: skip
SECONDS_A_ROUND, ROUNDS = 0.01, 21


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_parity(ours: Tensor, stock: Tensor, exact: Tensor) -> None:
    """Our error against fp64 is at most twice stock's, plus one rounding step of the dtype."""
    assert ours.shape == stock.shape == exact.shape
    floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    error, stock_error = ((t.double() - exact).abs().max().item() for t in (ours, stock))
    assert error <= 2 * stock_error + floor, f"our error is {error:.2e}, stock's {stock_error:.2e}"


def compare(benchmark: Any, ours: Callable[[], Any], stock: Callable[[], Any]) -> None:
    """Time both in alternating rounds of at least `SECONDS_A_ROUND`; pytest-benchmark records ours."""

    def seconds(function: Callable[[], Any], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - begin

    def calls_a_round(function: Callable[[], Any]) -> int:
        return max(1, math.ceil(SECONDS_A_ROUND / min(seconds(function, 1) for _ in range(3))))

    calls = {"ours": calls_a_round(ours), "stock": calls_a_round(stock)}
    times: dict[str, list[float]] = {"ours": [], "stock": []}

    def stock_round() -> None:
        times["stock"].append(seconds(stock, calls["stock"]) / calls["stock"])

    def our_round() -> None:
        times["ours"].append(seconds(ours, calls["ours"]) / calls["ours"])

    benchmark.pedantic(our_round, setup=stock_round, rounds=ROUNDS, warmup_rounds=1)
    pairs = list(zip(times["stock"], times["ours"], strict=True))[1:] or [(times["stock"][0], times["ours"][0])]
    benchmark.extra_info.update(
        ours_us=statistics.median(ours for _, ours in pairs) * 1e6,
        stock_us=statistics.median(stock for stock, _ in pairs) * 1e6,
        ratio=statistics.median(stock / ours for stock, ours in pairs),
        calls_a_round=calls["ours"],
        threads=torch.get_num_threads(),
        isa=native.isa(),
        torch=torch.__version__,
    )
