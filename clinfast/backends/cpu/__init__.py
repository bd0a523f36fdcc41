"""The compiled CPU kernels. Absent (no compiled module, or an OpenMP runtime that cannot be found), nothing is offered
and `unavailable()` says why."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

MODULES = (
    "attention", "attention_biased", "attention_disentangled", "attention_windowed", "embedding", "encoder", "gate",
    "gelu", "layer_norm", "linear", "packing", "pooling", "rotate",
)  # fmt: skip


@functools.cache
def unavailable() -> str | None:
    """None where the compiled kernels run, else the reason in a sentence."""
    from clinfast.backends.cpu import native

    return native.load_error()


@functools.cache
def implementations() -> dict[str, Callable[..., Any]]:
    if unavailable() is not None:
        return {}
    found: dict[str, Callable[..., Any]] = {}
    for name in MODULES:
        found.update(importlib.import_module(f"{__name__}.{name}").IMPLEMENTATIONS)
    return found
