"""Runs the encoder op by op."""

from __future__ import annotations

from torch import Tensor

from clinfast.engine.packing import PackedBatch, one_row_a_note
from clinfast.engine.spec import EncoderSpec, Request
from clinfast.engine.weights import PackedLayer, PackedWeights
from clinfast.ops import registry
from clinfast.ops.linear import PackedLinear

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

    def all_hidden_states(self, weights: PackedWeights, request: Request, batch: PackedBatch) -> Tensor:
        """[T, H] for all packed tokens."""
        x = self._whole_layers(weights, self._embed(weights, request, batch), batch)
        if weights.last is not None:
            x = self._layer(weights, weights.last, x, batch)
        return self._final_norm(weights, x)

    def first_hidden_states(self, weights: PackedWeights, request: Request, batch: PackedBatch) -> Tensor:
        """[B, H]: one row a note; the last layer works on those rows alone."""
        x = self._whole_layers(weights, self._embed(weights, request, batch), batch)
        x = self.first_token(x, batch) if weights.last is None else self._first_rows(weights, weights.last, x, batch)
        return self._final_norm(weights, x)

    def first_token(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """[B, H]: each note's first row; zeros for a note without tokens."""
        return self.pooling(x, batch.cu_seqlens, "first_token")

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
        for layer in weights.layers:
            x = self._layer(weights, layer, x, batch)
        return x

    def _layer(self, weights: PackedWeights, layer: PackedLayer, x: Tensor, batch: PackedBatch) -> Tensor:
        shape = (x.shape[0], -1, self.spec.num_heads, self.spec.head_dim)
        h = self._before(layer.attention_norm, x)
        if layer.qkv is not None:
            q, k, v = layer.qkv(h).view(shape).unbind(1)
        else:
            assert layer.query is not None and layer.key_value is not None
            q, (k, v) = layer.query(h).view(shape)[:, 0], layer.key_value(h).view(shape).unbind(1)
        context = self._attend(weights, layer, q, k, v, batch)
        return self._after_attention(layer, context, x)

    def _first_rows(self, weights: PackedWeights, layer: PackedLayer, x: Tensor, batch: PackedBatch) -> Tensor:
        spec = self.spec
        shape = (-1, spec.num_heads, spec.head_dim)
        h, first = self._before(layer.attention_norm, x), self.first_token(x, batch)
        if layer.qkv is not None:  # shared with whole layers, which want all queries
            qkv = layer.qkv(h)
            q = self.first_token(qkv, batch).view(-1, 3, *shape[1:])[:, 0]
            _, k, v = qkv.view(-1, 3, *shape[1:]).unbind(1)
        else:
            assert layer.query is not None and layer.key_value is not None
            k, v = layer.key_value(h).view(-1, 2, *shape[1:]).unbind(1)
            q = layer.query(self._before(layer.attention_norm, first)).view(shape)
        rows = one_row_a_note(batch.batch, x.device)
        context = self._attend(weights, layer, q, k, v, batch, rows)
        return self._after_attention(layer, context, first)

    def _attend(
        self,
        weights: PackedWeights,
        layer: PackedLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: PackedBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`rows`: boundaries of the queries where they are not those of the keys but one a note."""
        bounds = (batch.cu_seqlens if rows is None else rows, batch.cu_seqlens, batch.seqused_k)
        context: Tensor
        if layer.bias is None and weights.buckets is None:
            attention = self.attention if rows is None else self.first_token_attention
            context = attention(q, k, v, *bounds, self.spec.scale)
            return context
        places = (batch.places if rows is None else _first_places(batch), batch.places)
        if layer.bias is not None:
            context = self.attention_biased(q, k, v, *bounds, self.spec.scale, layer.bias, *places)
        else:
            tables = layer.position_keys, layer.position_queries, weights.buckets
            context = self.attention_disentangled(q, k, v, *bounds, self.spec.scale, *tables, *places)
        return context

    def _after_attention(self, layer: PackedLayer, context: Tensor, x: Tensor) -> Tensor:
        return self._ffn(layer, self._add_norm(layer.attention_output, context.view(x.shape), x, layer.attention_norm))

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

    def _add_norm(self, linear: PackedLinear, x: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        """linear(x) + residual, and the LayerNorm where it stands behind them."""
        if self.spec.pre_norm:
            return linear(x, residual=residual)
        if self.adds_in_norm:
            normed: Tensor = self.layer_norm(linear(x), residual, *norm, self.spec.eps)
        else:
            normed = self.layer_norm(linear(x, residual=residual), None, *norm, self.spec.eps)
        return normed

    def _before(self, norm: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """LayerNorm where it stands before what it belongs to."""
        return self.layer_norm(x, None, *norm, self.spec.eps) if self.spec.pre_norm else x

    def _final_norm(self, weights: PackedWeights, x: Tensor) -> Tensor:
        return x if weights.final_norm is None else self.layer_norm(x, None, *weights.final_norm, self.spec.eps)


def _first_places(batch: PackedBatch) -> Tensor:
    """[B]: where each note's first token stood; any place for a note without tokens."""
    firsts = batch.cu_seqlens[:-1].clamp(max=max(batch.tokens - 1, 0))
    return batch.places[firsts]
