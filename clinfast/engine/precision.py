"""Which dtype a call computes in."""

from __future__ import annotations

import torch

from clinfast.engine.spec import Unsupported
from clinfast.ops.registry import KERNEL_DTYPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATER = {
    "int8": "it is not served yet: pass precision='bf16' for the fastest path",
}
# Compute capability from which on `torch._scaled_mm` takes a scale a row.
FP8_LEAST = (9, 0)
E4M3 = torch.float8_e4m3fn


def fp8_refusal(device: str) -> str | None:
    """Why this machine does not multiply in fp8, or None."""
    if device != "cuda":
        return f"fp8 needs an NVIDIA GPU of the Hopper generation (9.0) or later, and the model is on the {device}"
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if found < FP8_LEAST:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        return (
            f"fp8 with a scale a row needs compute capability {'.'.join(map(str, FP8_LEAST))}, and {name} has "
            f"{'.'.join(map(str, found))}"
        )
    return None


def served(device: str) -> list[str]:
    """The names that a type of device computes in."""
    return [name for name, dtype in DTYPES.items() if dtype in KERNEL_DTYPES[device]]


def resolve(precision: str, model_dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in; that of all but the layers' products where those are in fp8.

    Raises:
        ValueError: an unknown name.
        Unsupported: a known one that this type of device does not serve; the message says what will.
    """
    instead = " or ".join(f"precision={name!r}" for name in served(device))
    if precision == "auto":
        if model_dtype in KERNEL_DTYPES[device]:
            return model_dtype
        raise Unsupported(
            f"the model is in {model_dtype}, which the {device} kernels do not compute in; pass {instead}, and the "
            "outputs keep the model's dtype"
        )
    if precision == "fp8":
        refusal = fp8_refusal(device)
        if refusal is not None:
            raise Unsupported(f"precision='fp8' cannot be served: {refusal}; pass {instead}")
        return torch.bfloat16
    if precision in LATER:
        raise Unsupported(f"precision={precision!r} cannot be served on this device: {LATER[precision]}")
    if precision not in DTYPES:
        choices = ", ".join(map(repr, ("auto", *DTYPES, *LATER, "fp8")))
        raise ValueError(f"precision={precision!r} is unknown; choose one of {choices}")
    if precision not in served(device):
        raise Unsupported(f"precision={precision!r} cannot be served on {device}: pass {instead}")
    return DTYPES[precision]
