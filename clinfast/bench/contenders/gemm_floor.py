from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clinfast.bench.cells import Batch
from clinfast.bench.contenders.base import Contender
from clinfast.bench.reference import Outputs


class GemmFloor(Contender):
    """The encoder's linears and nothing else, over real tokens, through oneDNN with prepacked weights.

    What is left between a contender and this row is attention, LayerNorm, GELU, packing and overhead.
    """

    name = "gemm_floor"
    distributions = ("torch",)
    precisions = ("fp32", "bf16")
    has_outputs = False

    def load(self) -> None:
        import torch

        torch.set_num_threads(self.threads)
        torch.set_num_interop_threads(1)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        hidden, inner = self.source.hidden_size, self.source.intermediate_size
        shapes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
        self.weights = [
            torch.randn(shape).to(self.dtype) for _ in range(self.source.layers) for shape in shapes
        ]

    def prepare(self, batch: Batch) -> Callable[[], Any]:
        import torch

        tokens = int(batch.lengths.sum())
        linear = torch.ops.mkldnn._linear_pointwise
        inputs = {
            size: torch.randn(tokens, size).to(self.dtype) for size in {w.shape[1] for w in self.weights}
        }
        packed = [
            (inputs[weight.shape[1]], torch.ops.mkldnn._reorder_linear_weight(weight, tokens))
            for weight in self.weights
        ]

        def call() -> None:
            with torch.inference_mode():
                for x, weight in packed:
                    linear(x, weight, None, "none", [], "")

        return call

    def outputs(self, raw: Any) -> Outputs:
        return {}
