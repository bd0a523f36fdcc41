from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clinfast.bench.cells import Batch
from clinfast.bench.contenders.base import Contender
from clinfast.bench.contenders.export import example_inputs, output_names, positional
from clinfast.bench.reference import Outputs
from clinfast.bench.sources import ModelSource, load_stock


class OpenVino(Contender):
    """Converted from the PyTorch model, any batch and length; its plugin fuses attention itself."""

    name = "openvino"
    distributions = ("openvino",)
    precisions = ("fp32", "bf16")

    @classmethod
    def build(cls, source: ModelSource, precision: str, folder: Path) -> None:
        import openvino

        example = dict(zip(source.inputs, example_inputs(source), strict=True))
        shapes = [(name, [-1, -1], openvino.Type.i64) for name in source.inputs]
        model = positional(load_stock(source, precision).float(), source, folder)
        converted = openvino.convert_model(model, example_input=example, input=shapes)
        openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)

    def load(self) -> None:
        import openvino

        options = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
        }
        core = openvino.Core()
        folder = self.artefact()
        self.names = output_names(folder)
        compiled = core.compile_model(core.read_model(folder / "model.xml"), "CPU", options)
        self.notes["precision_in_force"] = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        self.request = compiled.create_infer_request()

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        request, feeds = self.request, batch.of(self.source.inputs)
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)

    def outputs(self, raw: Any) -> Outputs:
        return {name: np.array(raw[place], dtype=np.float32) for place, name in enumerate(self.names)}
