"""A pytest plugin for machines without a GPU: what asks for CUDA gets the CPU, Triton's kernels are interpreted, clocks
stand still. The GPU benchmarks then run from end to end on small inputs: times mean nothing, but a wrong name or
argument shows here, and so does a result beyond its error budget.

Only where TRITON_INTERPRET=1. Streams, events and graphs are stand-ins; torch.compile returns what it is given.
"""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / path) for path in ("tests/triton_backend/interpreter", "tests/cuda", "benchmarks/gpu")]


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def on_cpu(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Stream:
    def __init__(self, *args: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    def replay(self) -> None: ...


PROPERTIES = types.SimpleNamespace(name="No card", multi_processor_count=4, total_memory=1 << 33)


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def install() -> None:
    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count, cuda.current_device = (lambda: True), (lambda: 1), (lambda: 0)
    cuda.get_device_name = lambda *_: PROPERTIES.name
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: PROPERTIES
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Stream, Graph
    cuda.current_stream = lambda *_: Stream()
    cuda.stream = cuda.graph = lambda *_, **__: contextlib.nullcontext()
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = lambda model, **_: model  # type: ignore[assignment]
    OnCpu().__enter__()

    from interpreter import install as interpret

    from clinfast import guard
    from clinfast.backends.triton import cubins, device, launch
    from clinfast.ops import registry

    guard._function_modes = lambda: 0  # type: ignore[assignment]  # but for `OnCpu`, which changes no result

    interpret()
    device.TYPE = "cpu"
    device.no_compiler = lambda: None  # type: ignore[assignment]
    cubins.available = lambda index: False  # type: ignore[assignment]
    cubins.find = lambda *args: None  # type: ignore[assignment]
    launch._try = lambda name, call: call()  # type: ignore[assignment]
    everywhere = ("cpu", "cuda")
    registry.BACKENDS = {
        "triton": registry.Backend("clinfast.backends.triton", everywhere),
        "cuda": registry.Backend("clinfast.backends.cuda", everywhere),
        "torch": registry.BACKENDS["torch"],
    }
    registry.KERNEL_DTYPES["cpu"] = registry.KERNEL_DTYPES["cuda"]
    emulate()


def emulate() -> None:
    """The CUDA C++ kernels from their host emulation, where a compiler can build it."""
    from emulation import build

    from clinfast.backends.cuda import native

    reason = build.missing()
    kernels = None if reason else build.load()
    native._load = lambda: (kernels, reason)  # type: ignore[assignment]
    native._raw_stream = lambda device: 0  # type: ignore[assignment]
    native.ON_CUDA = False


def pytest_configure(config: Any) -> None:
    from pytest_benchmark.fixture import BenchmarkFixture

    pedantic = BenchmarkFixture.pedantic
    BenchmarkFixture.pedantic = lambda self, target, **_: pedantic(self, target)
    install()


def pytest_collection_finish(session: Any) -> None:
    """Small inputs, once the benchmarks' modules are loaded."""
    for name, values in SMALL.items():
        module = sys.modules.get(name)
        for attribute, value in values.items() if module else ():
            assert hasattr(module, attribute), f"{name}.{attribute} is gone"
            setattr(module, attribute, value)


SMALL: dict[str, dict[str, Any]] = {
    "gpu_timing": {"ROUNDS": 1, "REPEATS": 1, "COPIED": 1 << 10, "MULTIPLIED": 32},
    "bench_triton_attention": {
        "HEADS": 2, "CHECKED_NOTES": 2,
        "CASES": {"mixed_32_512": [32, 70, 5], "128_tokens": [128], "512_tokens": [90], "16_tokens": [16] * 4},
    },
    "bench_triton_rows": {"ROWS": 8, "VOCABULARY": 50, "NOTES": 3, "SEQLEN": 4, "SETS": 2},
    "bench_triton_linear": {
        "ROWS": {"128": 16, "1024": 16, "8192": 16, "32768": 16},
        "SIZES": {"768x3072": (64, 128), "1024x4096": (33, 70)},
    },
    "bench_triton_packing": {
        "HIDDEN": 192, "LAYERS": 1, "CALLS": 1, "ITERATIONS": 1, "FORWARDS": 1,
        "BATCHES": {"32x512": (4, 20), "128x512": (9, 300)},
    },
}
