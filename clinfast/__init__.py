"""Fused kernels for BERT-family encoders: `clinfast.optimize(model)` speeds up a live Hugging Face model in place,
with the same outputs, until `clinfast.restore(model)`."""

from clinfast.api import (
    ClinfastWarning,
    StrictError,
    disabled,
    info,
    optimize,
    refresh,
    report,
    restore,
    verify,
    warmup,
)
from clinfast.engine.spec import Unsupported
from clinfast.integrations import attention_interface

__version__ = "0.1.0"
__all__ = [
    "ClinfastWarning",
    "StrictError",
    "Unsupported",
    "disabled",
    "info",
    "optimize",
    "refresh",
    "report",
    "restore",
    "verify",
    "warmup",
]

attention_interface.install()
