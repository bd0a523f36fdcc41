"""The package's cubins: one archive a device class, read and loaded kernel by kernel, launched from C."""

from __future__ import annotations

import functools
import json
import logging
import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clinfast.backends.triton import device
from clinfast.triton_kernels.variants import Variant, sources

log = logging.getLogger("clinfast")
FOLDER = Path(__file__).parents[2] / "triton_kernels" / "cubins"
# A cubin of a class below 9.0 runs on the later cards of its major version; from there on it is for one card type.
SERVES = {(8, 0): 80, (8, 6): 80, (8, 7): 80, (8, 9): 89, (9, 0): 90, (10, 0): 100, (12, 0): 120}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv", torch.bool: "i1", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    int: "i32", float: "fp32", type(None): "-",
}  # fmt: skip


@functools.cache
def launcher() -> ModuleType | None:
    """`clinfast._C` with the driver library open, or None; `launcher_error` has the reason."""
    return _open()[0]


def launcher_error() -> str | None:
    return _open()[1]


@functools.cache
def _open() -> tuple[ModuleType | None, str | None]:
    try:
        from clinfast import _C  # type: ignore[attr-defined]
    except ImportError as missing:
        return None, f"clinfast._C does not load: {missing}"
    reason = _C.open_driver(os.environ.get("CLINFAST_LIBCUDA", "libcuda.so.1"))
    return (None, reason) if reason else (_C, None)


@functools.cache
def archive(of_class: int) -> tuple[zipfile.ZipFile, dict[str, Any]] | None:
    """The cubins of a device class; None where the package has none, or CLINFAST_CUBINS=0 leaves all to Triton."""
    path = FOLDER / f"sm_{of_class}.zip"
    if not path.exists() or os.environ.get("CLINFAST_CUBINS") == "0":
        return None
    opened = zipfile.ZipFile(path)
    manifest = json.loads(opened.read("manifest.json"))
    if manifest.get("sources") != sources():
        log.warning("clinfast: %s was built from other kernels than these and is not used (make cubins)", path)
        return None
    return opened, manifest["kernels"]


def available(index: int) -> bool:
    """Whether the package holds cubins for the card, and they can be launched."""
    of_class = SERVES.get(device.capability(index))
    return of_class is not None and archive(of_class) is not None and launcher() is not None


def find(index: int, name: str, args: tuple[Any, ...], how: tuple[Any, ...]) -> Cubin | None:
    """The loaded cubin for such a call, or None; `how` is what follows the types in a `Variant`."""
    of_class = SERVES.get(device.capability(index))
    found = None if of_class is None else archive(of_class)
    if found is None or launcher() is None:
        return None
    kinds = [a if a is None or isinstance(a, (int, float)) else a.dtype for a in args]
    types = tuple(TYPES[type(k) if not isinstance(k, torch.dtype) else k] for k in kinds)
    key = Variant(name, types, *how).key
    return Cubin(index, key, found) if key in found[1] else None


class Cubin:
    """One kernel, loaded on one device."""

    def __init__(self, index: int, key: str, found: tuple[zipfile.ZipFile, dict[str, Any]]) -> None:
        facts = found[1][key]
        native = launcher()
        assert native is not None
        self.index, self._descriptors = index, facts["descriptors"]
        self._launch, self._encode = native.launch_kernel, native.encode_tensor_map
        self._maps: dict[tuple[int, ...], Tensor] = {}
        self._handle = native.load_kernel(
            found[0].read(facts["file"]), facts["entry"], facts["kinds"], facts["shared"], facts["num_warps"], index
        )

    def fire(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> bool:
        """False where the arguments are not aligned as the cubin takes them."""
        if not self._descriptors:
            plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args if a is not None]
            return bool(self._launch(self._handle, stream(self.index), *grid, *plain))
        flat: list[Any] = []
        at = 0
        for value in args:
            if isinstance(value, Tensor):
                flat.append(value.data_ptr())
            elif isinstance(value, (int, float)):
                flat.append(value)
            elif value is not None:
                tensor = value.tensor
                rows, columns = tensor.shape
                stride = tensor.stride(0)
                flat += (self._map(at, tensor), rows, columns, stride, 1)
                at += 1
        return bool(self._launch(self._handle, stream(self.index), *grid, *flat))

    def _map(self, at: int, tensor: Tensor) -> int:
        """Address of the descriptor, which the launch copies. Activations lie in the same few places in every call."""
        rows, columns = tensor.shape
        key = (at, tensor.data_ptr(), rows, columns, tensor.stride(0))
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) > 256:
                self._maps.clear()
            facts = self._descriptors[at]
            buffer = torch.empty(192, dtype=torch.uint8)
            address = (buffer.data_ptr() + 63) // 64 * 64
            self._encode(
                address, facts["type"], tensor.data_ptr(), rows, columns, tensor.stride(0) * tensor.itemsize,
                *facts["box"], facts["swizzle"],
            )  # fmt: skip
            found = self._maps[key] = buffer
        return (found.data_ptr() + 63) // 64 * 64


def stream(index: int) -> int:
    if device.TYPE != "cuda":
        return 0
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle
