"""What the benchmarks of the CUDA C++ kernels share: parity first, then the contenders in alternating rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clinfast.backends.cuda import native

ROUNDS, CALLS, WARM = 30, 20, 10


def skip_without_kernels() -> None:
    reason = native.load_error()
    if reason is not None:
        pytest.skip(f"no CUDA kernels: {reason}")


def milliseconds(call: Callable[[], object], flush: Tensor) -> float:
    """Of one call on the device, between events, after the second-level cache was overwritten."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def race(benchmark, contenders: dict[str, Callable[[], object]], **facts: object) -> None:
    """Medians of alternating rounds, in the benchmark's extra_info; pytest-benchmark's own figure is of ours."""
    flush = torch.empty(64 << 20, dtype=torch.int8, device="cuda")
    for call in contenders.values():
        for _ in range(WARM):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            times[name].append(milliseconds(call, flush))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["clinfast"]
    benchmark.extra_info.update(
        facts, card=torch.cuda.get_device_name(), milliseconds=medians,
        ratios={name: value / ours for name, value in medians.items() if name != "clinfast"},
    )  # fmt: skip
    benchmark.pedantic(contenders["clinfast"], rounds=5, iterations=CALLS)
