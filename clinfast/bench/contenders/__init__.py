"""The contenders. To add one: a class in a file here, and its line in `_CLASSES`."""

from __future__ import annotations

from clinfast.bench.contenders.base import Contender
from clinfast.bench.contenders.clinfast import Clinfast
from clinfast.bench.contenders.ctranslate2 import CTranslate2, CTranslate2Int8
from clinfast.bench.contenders.gemm_floor import GemmFloor
from clinfast.bench.contenders.onnxruntime import OnnxRuntime, OnnxRuntimeInt8
from clinfast.bench.contenders.openvino import OpenVino
from clinfast.bench.contenders.stock import Stock
from clinfast.bench.contenders.torch_compile import TorchCompile

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

# In order of the tables. Quantised ones compute other numbers, and run when named.
PEERS = ("torch_compile", "onnxruntime", "openvino", "ctranslate2")
LABELS = {
    "stock": "transformers (stock)",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_int8": "ONNX Runtime int8",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
    "ctranslate2_int8": "CTranslate2 int8",
    "clinfast": "clinfast",
    "gemm_floor": "linears alone",
}
DEFAULT_CONTENDERS: tuple[str, ...] = tuple(name for name in CONTENDERS if not name.endswith("_int8"))


def contender_class(name: str) -> type[Contender]:
    if name not in CONTENDERS:
        raise ValueError(f"contender {name!r} is none of {', '.join(CONTENDERS)}")
    return CONTENDERS[name]
