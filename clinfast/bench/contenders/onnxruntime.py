from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clinfast.bench.cells import Batch
from clinfast.bench.contenders.base import CannotRun, Contender
from clinfast.bench.contenders.export import example_inputs, output_names, positional
from clinfast.bench.reference import Outputs
from clinfast.bench.sources import ModelSource, load_stock

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
        model = positional(load_stock(source, precision, attention="eager"), source, folder)
        torch.onnx.export(
            model,
            example_inputs(source),
            exported,
            input_names=list(source.inputs),
            output_names=output_names(folder),
            dynamic_axes={name: {0: "batch", 1: "length"} for name in source.inputs},
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
            raise CannotRun(
                f"ONNX Runtime fused {fused[FUSED_INTO_ATTENTION]} of {source.layers} attentions"
            )
        optimized.save_model_to_file(str(folder / "model.onnx"))
        exported.unlink()

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        folder = self.artefact()
        self.names = output_names(folder)
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        session, names, feeds = self.session, self.names, batch.of(self.source.inputs)
        return lambda: session.run(names, feeds)

    def outputs(self, raw: Any) -> Outputs:
        return dict(zip(self.names, map(np.asarray, raw), strict=True))


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
