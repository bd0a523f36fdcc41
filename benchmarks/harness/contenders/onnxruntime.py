from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.cells import Batch
from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.contenders.export import INPUTS, OUTPUTS, example_inputs, positional
from benchmarks.harness.reference import Outputs
from benchmarks.harness.sources import ModelSource, load_stock

FUSED_INTO_ATTENTION = "Attention"


class OnnxRuntime(Contender):
    """Exported with `torch.onnx`, fused by ONNX Runtime's own BERT optimizer, any batch and length."""

    name = "onnxruntime"
    distributions = ("onnxruntime", "onnx")

    @classmethod
    def build(cls, source: ModelSource, precision: str, folder: Path) -> None:
        import torch
        from onnxruntime.transformers.optimizer import optimize_model

        exported = folder / "exported.onnx"
        # The fusions match the graph that the tracing exporter writes of eager attention; of the graphs
        # that torch.export or SDPA give, ONNX Runtime 1.32 fuses no attention.
        model = positional(load_stock(source, precision, attention="eager"))
        torch.onnx.export(
            model,
            example_inputs(),
            exported,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "batch", 1: "length"} for name in INPUTS},
            dynamo=False,
            opset_version=17,
        )
        optimized = optimize_model(
            str(exported),
            model_type="bert",
            num_heads=source.heads,
            hidden_size=source.hidden_size,
            opt_level=0,
        )
        fused = optimized.get_fused_operator_statistics()
        if fused[FUSED_INTO_ATTENTION] != source.layers:
            raise RuntimeError(
                f"ONNX Runtime fused {fused[FUSED_INTO_ATTENTION]} of {source.layers} attentions"
            )
        optimized.save_model_to_file(str(folder / "model.onnx"))
        exported.unlink()

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            self.artefact() / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        session, feeds = self.session, batch.as_dict()
        return lambda: session.run(list(OUTPUTS), feeds)

    def outputs(self, raw: Any) -> Outputs:
        return dict(zip(OUTPUTS, map(np.asarray, raw), strict=True))


class OnnxRuntimeInt8(OnnxRuntime):
    """The same graph with dynamically quantised int8 linears."""

    name = "onnxruntime_int8"

    @classmethod
    def build(cls, source: ModelSource, precision: str, folder: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        super().build(source, precision, folder)
        model = folder / "model.onnx"
        fused = model.rename(folder / "fp32.onnx")
        quantize_dynamic(fused, model, weight_type=QuantType.QInt8, per_channel=True)
        fused.unlink()
