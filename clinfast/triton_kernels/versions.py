"""What differs between the Triton releases that are served, 3.6 to 3.9, and what is set so that nothing does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import triton

VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
# The default of 3.9 is to become off in 3.10: a LayerNorm then loses all its fused multiply-adds.
JIT_OPTIONS = {"enable_fp_fusion": True}


def options(num_warps: int, num_stages: int, registers: int = 0) -> dict[str, Any]:
    """What a kernel is compiled with; `registers` is the most that a thread may take, 0 for no bound."""
    found = {"num_warps": num_warps, "num_stages": num_stages, **JIT_OPTIONS}
    return found | {"maxnreg": registers} if registers else found


def argument(value: Any) -> Any:
    """A launch argument as Triton's own launcher takes it."""
    block = getattr(value, "block", None)
    if block is None:
        return value
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor = value.tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def choose_assembler() -> None:
    """From 3.9 on, Triton assembles for Hopper and later with ptxas 13.4, whose cubins need a driver of 580; its own
    12.9 makes ones that load from 525 on. To be called before the first compilation."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if VERSION >= (3, 9) and (binaries / "ptxas").exists():
        os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", str(binaries / "ptxas"))


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm, as Triton ships them."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def descriptor_metadata(compiled: Any) -> list[dict[str, Any]]:
    """By descriptor argument: `swizzle`, `elem_size`, `elem_type`, `block_size`, for cuTensorMapEncodeTiled."""
    found = getattr(compiled.metadata, "tensordesc_meta", None) or []
    return [dict(entry) for entry in found if entry is not None]


def host_element(device_type: int) -> int:
    """CUtensorMapDataType of the number that a kernel's metadata has: three of them are in another order there."""
    return {8: 10, 9: 8, 10: 9}.get(device_type, device_type)
