"""What the GPU benchmarks share: device times in alternating rounds, ceilings of the same run, notes, parity."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

ROUNDS, REPEATS = 9, 10
COPIED, MULTIPLIED = 1 << 28, 8192  # fp32 values of the copy, and the side of the square product, that are the ceilings
NO_GPU = None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


def needs_triton() -> None:
    from clinfast.ops import registry

    reason = registry.unavailable("triton")
    if reason is not None:
        pytest.skip(reason)


def milliseconds(call: Callable[[], Any], repeats: int | None = None) -> float:
    repeats = repeats or REPEATS
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def race(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median device milliseconds of each, in alternating rounds after a warm-up. Each runs in a CUDA graph, so that the
    host is out of it, or as it is where it cannot be captured."""
    ready = {name: captured(call) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, call in ready.items():
            times[name].append(milliseconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return call
    return graph.replay


@functools.cache
def copy_bytes_per_second() -> float:
    """Read and written bytes of a device copy of 1 GiB."""
    source = torch.empty(COPIED, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best * 1e3


@functools.cache
def matmul_flops_per_second(dtype: torch.dtype = torch.bfloat16) -> float:
    a, b = (torch.randn(MULTIPLIED, MULTIPLIED, device="cuda", dtype=dtype) for _ in "ab")
    best = min(milliseconds(lambda: a @ b, 5) for _ in range(5))
    return 2 * MULTIPLIED**3 / best * 1e3


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def assert_within_budget(ours: Tensor, stock: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Our root mean square error against fp64 at most twice stock's, and half a rounding step."""
    floor = torch.finfo(ours.dtype).eps * exact.abs().max() / 4
    error, stock_error = (x.double() - exact for x in (ours, stock))
    assert torch.isfinite(ours).all()
    assert error.square().mean().sqrt() <= factor * stock_error.square().mean().sqrt() + floor
    assert error.abs().max() <= 2 * factor * stock_error.abs().max() + 4 * floor


def record(
    benchmark: Any,
    times: dict[str, float],
    ours: str,
    *,
    least: dict[str, float] | None = None,
    most: dict[str, float] | None = None,
    **facts: Any,
) -> None:
    """Into pytest-benchmark's JSON: all times, the ratio of the best peer to ours, the ceilings of this run, and which
    goals were met. `least` and `most` are goals, by the name of a fact or `"ratio"`. Others of ours are no peers."""
    peers = {name: value for name, value in times.items() if not name.startswith(ours)}
    best = min(peers, key=peers.__getitem__)
    found = {**facts, "ratio": peers[best] / times[ours]}
    goals = [
        {"name": name, bound: goal, "found": found[name], "met": (found[name] >= goal) is (bound == "least")}
        for bound, wanted in (("least", least), ("most", most))
        for name, goal in (wanted or {}).items()
    ]
    benchmark.extra_info.update(
        found, card=torch.cuda.get_device_name(), milliseconds=times, best_peer=best, goals=goals,
        copy_bytes_per_second=copy_bytes_per_second(), matmul_flops_per_second=matmul_flops_per_second(),
    )  # fmt: skip
    print(f"\n{benchmark.name}: {found['ratio']:.2f} x {best}; {facts}; {times}; goals: {goals}")
