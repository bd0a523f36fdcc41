"""Runs the layers in one call into the compiled kernels, op by op what surrounds them."""

from __future__ import annotations

from torch import Tensor

from clinfast.engine.executors.eager import EagerExecutor
from clinfast.engine.packing import PackedBatch
from clinfast.engine.weights import PackedWeights


class NativeExecutor(EagerExecutor):
    """The same kernels in the same order as `EagerExecutor`, hence the same bits; weights that did not fuse (linears
    of another library) run op by op."""

    def _whole_layers(self, weights: PackedWeights, x: Tensor, batch: PackedBatch) -> Tensor:
        if weights.fused is None:
            return super()._whole_layers(weights, x, batch)
        spec, bias = self.spec, weights.layers[0].bias
        return weights.fused.run(
            x, batch.cu_seqlens, batch.seqused_k, spec.num_heads, spec.scale, spec.eps, spec.activation, spec.pre_norm,
            bias, batch.offsets if bias is None and weights.buckets is None else batch.places,
        )  # fmt: skip
