"""The Triton kernels, for NVIDIA GPUs from compute capability 8.0 on. Absent (no GPU, too old a one, nothing to run
them with), nothing is offered and `unavailable()` says why."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

MODULES = (
    "attention", "attention_biased", "attention_disentangled", "attention_windowed", "embedding", "fp8", "gate", "gelu",
    "layer_norm", "linear", "packing", "packing_buffers", "pooling", "rotate",
)  # fmt: skip


@functools.cache
def unavailable() -> str | None:
    """None where the kernels run, else the reason in a sentence."""
    from clinfast.backends.triton import cubins, device

    reason = device.no_gpu()
    if reason is None and not cubins.available(device.current()):
        reason = device.no_compiler()
    return reason


@functools.cache
def implementations() -> dict[str, Callable[..., Any]]:
    if unavailable() is not None:
        return {}
    found: dict[str, Callable[..., Any]] = {}
    for name in MODULES:
        found.update(importlib.import_module(f"{__name__}.{name}").IMPLEMENTATIONS)
    return found
