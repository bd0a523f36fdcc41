"""Which dtype a call computes in."""

from __future__ import annotations

import torch

from clinfast.engine.spec import Unsupported
from clinfast.ops.registry import KERNEL_DTYPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATER = {
    "int8": "it is not served yet: pass precision='bf16' for the fastest path",
    "fp8": "it needs an NVIDIA GPU of the Hopper generation or later: pass precision='bf16'",
}


def served(device: str) -> list[str]:
    """The names that a type of device computes in."""
    return [name for name, dtype in DTYPES.items() if dtype in KERNEL_DTYPES[device]]


def resolve(precision: str, model_dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in.

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
    if precision in LATER:
        raise Unsupported(f"precision={precision!r} cannot be served on this device: {LATER[precision]}")
    if precision not in DTYPES:
        choices = ", ".join(map(repr, ("auto", *DTYPES, *LATER)))
        raise ValueError(f"precision={precision!r} is unknown; choose one of {choices}")
    if precision not in served(device):
        raise Unsupported(f"precision={precision!r} cannot be served on {device}: pass {instead}")
    return DTYPES[precision]
