"""The contenders. To add one: a class in a file here, and its line in `_CLASSES`."""

from __future__ import annotations

from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.contenders.clinfast import Clinfast
from benchmarks.harness.contenders.ctranslate2 import CTranslate2, CTranslate2Int8
from benchmarks.harness.contenders.gemm_floor import GemmFloor
from benchmarks.harness.contenders.onnxruntime import OnnxRuntime, OnnxRuntimeInt8
from benchmarks.harness.contenders.openvino import OpenVino
from benchmarks.harness.contenders.stock import Stock
from benchmarks.harness.contenders.torch_compile import TorchCompile

_CLASSES: tuple[type[Contender], ...] = (
    Stock,
    TorchCompile,
    OnnxRuntime,
    OnnxRuntimeInt8,
    OpenVino,
    CTranslate2,
    CTranslate2Int8,
    Clinfast,
    GemmFloor,
)

CONTENDERS: dict[str, type[Contender]] = {cls.name: cls for cls in _CLASSES}

DEFAULT_CONTENDERS: tuple[str, ...] = tuple(name for name in CONTENDERS if not name.endswith("_int8"))


def contender_class(name: str) -> type[Contender]:
    if name not in CONTENDERS:
        raise ValueError(f"contender {name!r} is none of {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
