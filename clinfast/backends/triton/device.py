"""The GPU that kernels run on: its class in the tuning tables, and what stands in the way of running them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from importlib import metadata

import torch

from clinfast.triton_kernels import configs

# The type of device whose tensors are taken.
TYPE = "cuda"
MIN_TRITON = (3, 6)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def device_class(index: int) -> int:
    """The entry of the tuning tables that serves this card."""
    return configs.device_class(capability(index))


def index_of(tensor: torch.Tensor) -> int:
    index = tensor.device.index
    return 0 if index is None else index


def current() -> int:
    return torch.cuda.current_device()


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The tensor's GPU as the current one."""
    if TYPE != "cuda" or index_of(tensor) == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def capturing() -> bool:
    """Whether the current stream's work goes into a graph of the caller's."""
    return TYPE == "cuda" and torch.cuda.is_current_stream_capturing()


def no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if any(pair >= (8, 0) for pair in found):
        return None
    major, minor = max(found)
    return (
        f"the GPU is of compute capability {major}.{minor}, for which Triton emits no matrix instructions (8.0 is the "
        "least)"
    )


def no_compiler() -> str | None:
    """Why Triton cannot compile a kernel in this process, or None as far as can be seen without trying."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    found = metadata.version("triton")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < MIN_TRITON:
        return f"Triton {found} is too old: {'.'.join(map(str, MIN_TRITON))} is the least (pip install -U triton)"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler to launch what it compiles, and there is none (gcc, clang or CC)"
    return None
