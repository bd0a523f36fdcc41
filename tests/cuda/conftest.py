"""The CUDA backend on three machines: the host emulation with threads first to last and last to first, and a GPU."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clinfast.backends.cuda import native

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parent))

from emulation import build


@functools.cache
def emulated_kernels() -> ModuleType:
    return build.load()


class Machine:
    """Calls a function of the CUDA backend with arguments from the CPU, and brings the result back."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = device == "cuda"

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.back(function(*map(self.there, args), **{name: self.there(v) for name, v in kwargs.items()}))

    def there(self, value: Any) -> Any:
        """`value` on the device, with its strides, offset and neighbours in memory."""
        if not isinstance(value, torch.Tensor) or not self.on_gpu:
            return value
        whole = torch.empty(0, dtype=value.dtype, device=self.device)
        whole.set_(value.untyped_storage().cuda(), value.storage_offset(), value.shape, value.stride())
        return whole

    def back(self, result: Any) -> Any:
        return tuple(map(self.back, result)) if isinstance(result, tuple) else result.cpu()

    @property
    def kernels(self) -> ModuleType:
        return native.on(0 if self.on_gpu else -1)

    def device_and_stream(self) -> tuple[int, int]:
        return (0, native.stream(0)) if self.on_gpu else (-1, 0)


@pytest.fixture(params=["emulated", "reversed", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    if request.param == "gpu":
        if native.load_error() is not None:
            pytest.skip(f"no CUDA kernels: {native.load_error()}")
        yield Machine("cuda")
        return
    reason = build.missing()
    if reason is not None:
        pytest.skip(f"no host emulation: {reason}")
    kernels = emulated_kernels()
    kernels.set_reverse(request.param == "reversed")
    monkeypatch.setattr(native, "_load", lambda: (kernels, None))
    monkeypatch.setattr(native, "_raw_stream", lambda device: 0)
    monkeypatch.setattr(native, "ON_CUDA", False)
    native.on.cache_clear()
    yield Machine("cpu")
    native.on.cache_clear()


def pytest_collection_modifyitems(items):
    """Leaves out what no machine has: wgmma without a GPU, and 16-bit kernels for fp32."""
    here = Path(__file__).parent

    def possible(item):
        values = getattr(item, "callspec", None)
        if values is None or here not in item.path.parents:
            return True
        kernel, dtype = values.params.get("attention"), values.params.get("dtype")
        if kernel == "wgmma" and values.params.get("machine") != "gpu":
            return False
        return kernel in (None, "simt") or dtype is not torch.float32

    items[:] = filter(possible, items)
