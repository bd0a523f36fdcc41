"""Runs the encoder op by op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.engine.packing import PackedBatch, one_row_a_note
from clinfast.engine.spec import EncoderSpec, Request
from clinfast.engine.weights import PackedLayer, PackedWeights
from clinfast.ops import registry
from clinfast.ops.linear import PackedLinear
from clinfast.ops.rotate import ranks

# Rows of the FFN that are taken at a time: the intermediate of a slice stays in the last-level cache.
FFN_ROWS = 1024


class EagerExecutor:
    """Binds the ops of one backend, on one type of device, to one spec."""

    def __init__(self, spec: EncoderSpec, backend: str, device: str = "cpu") -> None:
        self.spec, self.backend, self.device = spec, backend, device
        # On the CPU the product adds the residual while its result is in the cache, and the FFN is taken in slices that
        # stay there; a GPU's norm reads the residual as cheaply as an epilogue would, and leaves the library its best.
        self.adds_in_norm = self.whole_ffn = device != "cpu"
        ops = (
            "pack", "position_ids", "embedding", "attention", "attention.first_token", "layer_norm", "unpack", "pooling"
        )  # fmt: skip
        found = [registry.implementation(name, backend, device, prechecked=True) for name in ops]
        (
            self.pack, self.position_ids, self.embedding, self.attention, self.first_token_attention, self.layer_norm,
            self.unpack, self.pooling,
        ) = found  # fmt: skip
        if spec.disentangled is not None:
            self.attention_disentangled = registry.implementation(
                "attention_disentangled", backend, device, prechecked=True
            )
        if spec.relative_buckets:
            self.attention_biased = registry.implementation("attention_biased", backend, device, prechecked=True)
        self.rotate = self.attention_windowed = None
        if spec.rotations:
            self.rotate = registry.implementation("rotate", backend, device, prechecked=True)
        if spec.has_windows:
            self.attention_windowed = registry.implementation("attention_windowed", backend, device, prechecked=True)

    def all_hidden_states(self, weights: PackedWeights, request: Request, batch: PackedBatch) -> Tensor:
        """[T, H] for all packed tokens."""
        x = self._whole_layers(weights, self._embed(weights, request, batch), batch)
        if weights.last is not None:
            x = self._layer(weights, len(weights.layers), weights.last, x, batch)
        return self._final_norm(weights, x)

    def first_hidden_states(self, weights: PackedWeights, request: Request, batch: PackedBatch) -> Tensor:
        """[B, H]: one row a note; the last layer works on those rows alone."""
        x = self._whole_layers(weights, self._embed(weights, request, batch), batch)
        x = self.first_token(x, batch) if weights.last is None else self._first_rows(weights, x, batch)
        return self._final_norm(weights, x)

    def first_token(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """[B, H]: each note's first row; zeros for a note without tokens."""
        return self.pooling(x, batch.cu_seqlens, "first_token")

    def mean(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """[B, H]: the mean of each note's real rows; zeros for a note without any."""
        cu_seqlens = batch.cu_seqlens
        if batch.seqused_k is not None:  # real rows come first in their note
            ranks_of_rows = ranks(x.shape[0], cu_seqlens)
            lengths = cu_seqlens.diff()
            x = x[ranks_of_rows < batch.seqused_k.repeat_interleave(lengths)]
            cu_seqlens = functional.pad(batch.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        return self.pooling(x, cu_seqlens, "mean")

    def _embed(self, weights: PackedWeights, request: Request, batch: PackedBatch) -> Tensor:
        x: Tensor = self.embedding(
            request.input_ids, request.token_type_ids, batch.indices, self._positions(request, batch), weights.word,
            weights.position, weights.token_type, *weights.embedding_norm, self.spec.eps, self.spec.position_offset,
            weights.dtype,
        )  # fmt: skip
        return x if weights.embedding_projection is None else weights.embedding_projection(x)

    def _positions(self, request: Request, batch: PackedBatch) -> Tensor | None:
        padding_idx = self.spec.position_padding_idx
        if batch.position_ids is not None or padding_idx is None:
            return batch.position_ids
        ids: Tensor = self.position_ids(request.input_ids, padding_idx)
        return ids

    def _whole_layers(self, weights: PackedWeights, x: Tensor, batch: PackedBatch) -> Tensor:
        for i, layer in enumerate(weights.layers):
            x = self._layer(weights, i, layer, x, batch)
        return x

    def _layer(self, weights: PackedWeights, i: int, layer: PackedLayer, x: Tensor, batch: PackedBatch) -> Tensor:
        shape = (x.shape[0], -1, self.spec.head_dim)
        heads, h = self.spec.num_heads, self._before(layer.attention_norm, x)
        if layer.qkv is not None:
            qkv = layer.qkv(h).view(shape)
            self._turn(weights, i, qkv[:, : 2 * heads], batch)
            q, k, v = qkv.unflatten(1, (3, heads)).unbind(1)
        else:
            assert layer.query is not None and layer.key_value is not None
            q, key_value = layer.query(h).view(shape), layer.key_value(h).view(shape)
            self._turn(weights, i, q, batch)
            self._turn(weights, i, key_value[:, :heads], batch)
            k, v = key_value.unflatten(1, (2, heads)).unbind(1)
        context = self._attend(weights, i, layer, q, k, v, batch)
        return self._after_attention(layer, context, x)

    def _turn(self, weights: PackedWeights, i: int, heads: Tensor, batch: PackedBatch) -> None:
        """The layer's rotary embedding on [T, heads, head_dim], in place."""
        tables = weights.rotations[i]
        if tables is not None:
            assert self.rotate is not None
            self.rotate(heads, *tables, batch.cu_seqlens, batch.offsets)

    def _first_rows(self, weights: PackedWeights, x: Tensor, batch: PackedBatch) -> Tensor:
        """The last layer for one row a note. That row's place is 0, where a rotation leaves its query as it is."""
        layer, i, spec = weights.last, len(weights.layers), self.spec
        assert layer is not None
        heads, shape = spec.num_heads, (-1, spec.num_heads, spec.head_dim)
        h, first = self._before(layer.attention_norm, x), self.first_token(x, batch)
        if layer.qkv is not None:  # shared with whole layers, which want all queries
            qkv = layer.qkv(h)
            self._turn(weights, i, qkv.view(-1, 3 * heads, spec.head_dim)[:, heads : 2 * heads], batch)
            q = self.first_token(qkv, batch).view(-1, 3, *shape[1:])[:, 0]
            _, k, v = qkv.view(-1, 3, *shape[1:]).unbind(1)
        else:
            assert layer.query is not None and layer.key_value is not None
            key_value = layer.key_value(h)
            self._turn(weights, i, key_value.view(-1, 2 * heads, spec.head_dim)[:, :heads], batch)
            k, v = key_value.view(-1, 2, *shape[1:]).unbind(1)
            q = layer.query(self._before(layer.attention_norm, first)).view(shape)
        context = self._attend(weights, i, layer, q, k, v, batch, first=True)
        return self._after_attention(layer, context, first)

    def _attend(
        self,
        weights: PackedWeights,
        i: int,
        layer: PackedLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: PackedBatch,
        *,
        first: bool = False,
    ) -> Tensor:
        """Layer `i`'s own kind of attention; `first`: `q` has one row a note, its first."""
        queries = one_row_a_note(batch.batch, q.device) if first else batch.cu_seqlens
        args = (q, k, v, queries, batch.cu_seqlens, batch.seqused_k, self.spec.scale)
        window = self.spec.window_of(i)
        context: Tensor
        if window >= 0:
            assert self.attention_windowed is not None
            context = self.attention_windowed(*args, window, None if first else batch.offsets, batch.offsets)
        elif layer.bias is not None:
            context = self.attention_biased(*args, layer.bias, *_places(batch, first))
        elif weights.buckets is not None:
            tables = layer.position_keys, layer.position_queries, weights.buckets
            context = self.attention_disentangled(*args, *tables, *_places(batch, first))
        else:
            context = (self.first_token_attention if first else self.attention)(*args)
        return context

    def _after_attention(self, layer: PackedLayer, context: Tensor, x: Tensor) -> Tensor:
        context = context.view(x.shape)
        return self._ffn(layer, self._add_norm(layer.attention_output, context, x, layer.attention_norm))

    def _ffn(self, layer: PackedLayer, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self.whole_ffn or rows <= FFN_ROWS + FFN_ROWS // 2:
            return self._ffn_rows(layer, x)
        out = x.new_empty(x.shape)
        for start in range(0, rows, FFN_ROWS):
            out[start : start + FFN_ROWS] = self._ffn_rows(layer, x[start : start + FFN_ROWS])
        return out

    def _ffn_rows(self, layer: PackedLayer, x: Tensor) -> Tensor:
        inner = layer.ffn_in(self._before(layer.output_norm, x), self.spec.activation)
        return self._add_norm(layer.ffn_out, inner, x, layer.output_norm)

    def _add_norm(
        self, linear: PackedLinear, x: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """linear(x) + residual, and the LayerNorm where it stands behind them."""
        if self.spec.pre_norm or norm is None:
            return linear(x, residual=residual)
        if self.adds_in_norm:
            normed: Tensor = self.layer_norm(linear(x), residual, *norm, self.spec.eps)
        else:
            normed = self.layer_norm(linear(x, residual=residual), None, *norm, self.spec.eps)
        return normed

    def _before(self, norm: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
        """LayerNorm where it stands before what it belongs to."""
        return x if norm is None or not self.spec.pre_norm else self.layer_norm(x, None, *norm, self.spec.eps)

    def _final_norm(self, weights: PackedWeights, x: Tensor) -> Tensor:
        return x if weights.final_norm is None else self.layer_norm(x, None, *weights.final_norm, self.spec.eps)


def _places(batch: PackedBatch, first: bool) -> tuple[Tensor, Tensor]:
    """Where queries and keys stood; with `first`, queries are each note's first token: any place for a note without."""
    if not first:
        return batch.places, batch.places
    return batch.places[batch.cu_seqlens[:-1].clamp(max=max(batch.tokens - 1, 0))], batch.places
