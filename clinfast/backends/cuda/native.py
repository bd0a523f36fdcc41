"""Loads the CUDA half of `clinfast._C`, prepares devices, and checks the tensors that its kernels take."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from clinfast.ops import choices

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPE_NAMES = "float32, bfloat16 or float16"
# False only under the tests' emulation, whose kernels take CPU memory.
ON_CUDA = True
# The oldest driver branch that runs what a CUDA release of this major version built.
DRIVERS = {12: "525", 13: "580"}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from clinfast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"clinfast._C does not load: {error}"
    kernels = getattr(_C, "cuda", None)
    if kernels is None:
        return None, (
            "clinfast was built without its CUDA kernels; `CLINFAST_CUDA=1 pip install .` builds them where nvcc is"
        )
    reason = refusal(kernels.versions())
    return (kernels, None) if reason is None else (None, reason)


def refusal(versions: dict) -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    needed = versions["runtime"] // 1000
    if versions["driver"] == 0:
        return "there is no NVIDIA driver on this machine"
    if versions["driver"] // 1000 < needed:
        least = f" (branch {DRIVERS[needed]} or later)" if needed in DRIVERS else ""
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_dotted(versions['driver'])}, and the kernels were built "
            f"with CUDA {_dotted(versions['runtime'])}; update the driver{least} or build with an older nvcc"
        )
    if versions["error"] or versions["devices"] == 0:
        return f"the NVIDIA driver shows no usable GPU: {versions['text'] if versions['error'] else 'there is none'}"
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def load_error() -> str | None:
    return _load()[1]


def kernels() -> ModuleType:
    module, error = _load()
    if module is None:
        raise RuntimeError(f"the compiled CUDA kernels are not available: {error}")
    return module


def wants_programmatic_launch() -> bool:
    """CLINFAST_CUDA_PDL (0, 1), else what `clinfast tune` measured on this card, else not.

    Raises:
        ValueError: the variable is neither.
    """
    asked = os.environ.get("CLINFAST_CUDA_PDL", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"CLINFAST_CUDA_PDL is {asked!r}; choose 1 (programmatic dependent launch) or 0")
    return asked == "1" if asked else bool(choices.measured().get("programmatic_launch", {}).get("chosen", False))


@functools.cache
def on(device: int) -> ModuleType:
    """The kernels, all of them loaded on this device: nothing is left to load inside a graph capture."""
    module = kernels()
    module.set_programmatic_launch(wants_programmatic_launch())
    module.prepare(device)
    return module


def prepare_current() -> None:
    """Load everything on the current device now; other devices are prepared by their first call."""
    if ON_CUDA:
        on(torch.cuda.current_device())


def _raw_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def stream(device: int) -> int:
    """The caller's current stream on a device."""
    return _raw_stream(device)


def is_ours(tensor: Tensor) -> bool:
    return tensor.is_cuda is ON_CUDA


@functools.cache
def capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The kernels' number of the tensor's dtype; `dtype` demands that one."""
    code = DTYPES.get(tensor.dtype)
    if code is None or (dtype is not None and tensor.dtype is not dtype):
        wanted = DTYPE_NAMES if dtype is None else str(dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; it must be {wanted}")
    return code


def check_device(op: str, name: str, tensor: Tensor, device: int | None = None) -> int:
    """The index of the tensor's device; `device` demands that one."""
    index = tensor.get_device()
    if not is_ours(tensor):
        raise ValueError(f"{op}: {name} is on {tensor.device}; the compiled CUDA kernels need it on an NVIDIA GPU")
    if device is not None and index != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on cuda:{device} like the first argument")
    return index


def check_rows(
    op: str,
    name: str,
    tensor: Tensor,
    device: int | None = None,
    shape: tuple[int, ...] | torch.Size | None = None,
    ndim: int = 2,
) -> int:
    """`ndim` dimensions (or exactly `shape`), the last one contiguous; the index of the device."""
    if tensor.dim() != ndim or (shape is not None and tensor.shape != shape):
        wanted = f"{ndim} dimensions" if shape is None else f"shape {list(shape)}"
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; it must have {wanted}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}; the last dimension must be contiguous")
    return check_device(op, name, tensor, device)


def check_vector(
    op: str, name: str, tensor: Tensor, size: int, device: int, dtype: torch.dtype = torch.float32
) -> None:
    """A contiguous vector of `size` elements of `dtype` on the device of the other arguments."""
    if (
        tensor.shape == (size,)
        and tensor.dtype is dtype
        and tensor.is_contiguous()
        and is_ours(tensor)
        and tensor.get_device() == device
    ):
        return
    raise ValueError(
        f"{op}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it must be a contiguous "
        f"[{size}] {str(dtype).removeprefix('torch.')} tensor on the device of the other arguments"
    )


def check_boundaries(op: str, name: str, cu_seqlens: Tensor, device: int) -> int:
    """The number of notes of a [B + 1] int32 vector of boundaries. Its values stay on the device, unread."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape {list(cu_seqlens.shape)}; it must be [B + 1]")
    entries = cu_seqlens.shape[0]
    check_vector(op, name, cu_seqlens, entries, device, torch.int32)
    return entries - 1
