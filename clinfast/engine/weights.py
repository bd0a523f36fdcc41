"""Packed weights: a cache of the live ones, and the check that it is not stale."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from clinfast.backends.cpu import sampling as samplers
from clinfast.engine import relative_bias
from clinfast.engine.spec import EncoderSpec, HeadSpec, ParameterRef, Unsupported
from clinfast.ops import registry
from clinfast.ops.attention_disentangled import log_buckets
from clinfast.ops.linear import PackedLinear, prepack
from clinfast.ops.rotate import tables as rotation_tables

SAMPLES_PER_TENSOR = 4


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """`qkv` makes [T, 3H] at once; where only first tokens are asked for, `query` and `key_value` come apart, unless
    other layers share the weights. `bias` [heads, 2 R + 1] is added to its scores by distance, where there is one;
    `position_keys` and `position_queries` [heads, R, head_dim] are the tables of `ops.attention_disentangled`."""

    qkv: PackedLinear | None
    query: PackedLinear | None
    key_value: PackedLinear | None
    attention_output: PackedLinear
    attention_norm: tuple[Tensor, Tensor] | None
    ffn_in: PackedLinear
    ffn_out: PackedLinear
    output_norm: tuple[Tensor, Tensor]
    position_keys: Tensor | None = None
    position_queries: Tensor | None = None
    bias: Tensor | None = None


class PackedDense(NamedTuple):
    linear: PackedLinear
    norm: tuple[Tensor, Tensor] | None


@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """Everything that a forward needs, laid out for the ops.

    `rotations` are each layer's tables of cos and sin [max_positions, head_dim / 2], fp32. `layers` are the whole ones,
    the same object where layers share; `last` is the last one where only first tokens are asked of it. `fused` runs
    `layers` in one call, None where the backend cannot. `nbytes` counts what was copied.
    """

    word: Tensor
    position: Tensor
    rotations: tuple[tuple[Tensor, Tensor] | None, ...]
    token_type: Tensor | None
    embedding_norm: tuple[Tensor, Tensor] | tuple[None, None]
    embedding_projection: PackedLinear | None
    layers: tuple[PackedLayer, ...]
    last: PackedLayer | None
    final_norm: tuple[Tensor, Tensor] | None
    fused: Any
    buckets: Tensor | None
    branches: tuple[tuple[PackedDense, ...], ...]
    dtype: torch.dtype
    nbytes: int

    def linears(self) -> list[PackedLinear]:
        found = [self.embedding_projection, *(dense.linear for branch in self.branches for dense in branch)]
        layers = self.layers if self.last is None else (*self.layers, self.last)
        for layer in {id(layer): layer for layer in layers}.values():
            found += [layer.qkv, layer.query, layer.key_value, layer.attention_output, layer.ffn_in, layer.ffn_out]
        return [linear for linear in found if linear is not None]


def pack_weights(
    spec: EncoderSpec,
    head: HeadSpec,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    kind: str = "",
) -> PackedWeights:
    """Copy the linears into the layout of the backend, in `dtype`; embedding tables are used where they lie.

    `kind` is that of `ops.linear.prepack`; fp8 is for the linears of the layers only.
    """
    _check(spec, head, tensors)
    copied: list[int] = []

    def linear(*stems: str, rows: slice = slice(None), gated: bool = False) -> PackedLinear:
        own = kind if kind != "fp8" or stems[0].startswith("layers.") else ""
        weights = [tensors[f"{stem}.weight"] for stem in stems]
        biases = [tensors[f"{stem}.bias"] for stem in stems if f"{stem}.bias" in tensors]
        weight = weights[0] if len(stems) == 1 else torch.cat([w.detach() for w in weights])
        bias = None if not biases else biases[0] if len(stems) == 1 else torch.cat([b.detach() for b in biases])
        packed = prepack(weight[rows], None if bias is None else bias[rows], dtype, backend, own, gated=gated)
        copied.append(packed.nbytes)
        return packed

    def norm(stem: str) -> tuple[Tensor, Tensor]:
        weight = tensors[f"{stem}.weight"].detach().to(torch.float32, copy=True).contiguous()
        bias = tensors.get(f"{stem}.bias")
        shift = torch.zeros_like(weight) if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        copied.append(weight.nbytes + shift.nbytes)
        return weight, shift

    def table(stem: str) -> Tensor:
        source = tensors[f"{stem}.weight"].detach()
        if source.dtype in registry.KERNEL_DTYPES[source.device.type] and source.stride(-1) == 1:
            return source
        copy = source.to(torch.float32).contiguous()
        copied.append(copy.nbytes)
        return copy

    def token_types() -> Tensor | None:
        if not spec.type_vocab_size:
            return None
        types = table("embedding.token_type")
        if not spec.task_type_vocab_size:
            return types
        # Every token is of task type 0: its row joins the few rows of the token types.
        types = types + tensors["embedding.task_type.weight"].detach()[0].to(types.dtype)
        copied.append(types.nbytes)
        return types

    def positions(word: Tensor) -> Tensor:
        if spec.position_table:
            return table("embedding.position")
        # One row of zeros for every position: nothing is added, and nothing is kept.
        return word.new_zeros(1, spec.embedding_size).expand(spec.max_seqlen, -1)

    def queries_keys_values(at: str, split: bool) -> dict[str, PackedLinear | None]:
        if not spec.packed_qkv:
            q, k, v = (at + name for name in ("query", "key", "value"))
            if split:
                return {"qkv": None, "query": linear(q), "key_value": linear(k, v)}
            return {"qkv": linear(q, k, v), "query": None, "key_value": None}
        if split:
            of_query, of_others = slice(spec.hidden_size), slice(spec.hidden_size, None)
            query, key_value = linear(at + "qkv", rows=of_query), linear(at + "qkv", rows=of_others)
            return {"qkv": None, "query": query, "key_value": key_value}
        return {"qkv": linear(at + "qkv"), "query": None, "key_value": None}

    def distance_biases() -> Tensor | None:
        if not spec.relative_buckets:
            return None
        found = relative_bias.expanded(
            tensors["relative_bias.weight"], spec.relative_buckets, spec.relative_max_distance
        )
        copied.append(found.nbytes)
        return found

    bias = distance_biases()

    def layer(i: int, *, split: bool) -> PackedLayer:
        at = f"layers.{i}."
        gate = (at + "ffn_gate",) if spec.gated == "apart" else ()
        return PackedLayer(
            **queries_keys_values(at, split),
            attention_output=linear(at + "attention_output"),
            attention_norm=norm(at + "attention_norm") if i or spec.first_norm else None,
            ffn_in=linear(at + "ffn_in", *gate, gated=bool(spec.gated)),
            ffn_out=linear(at + "ffn_out"),
            output_norm=norm(at + "output_norm"),
            position_keys=position_table(at, "key", "c2p"),
            position_queries=position_table(at, "query", "p2c"),
            bias=bias,
        )

    def position_table(at: str, name: str, term: str) -> Tensor | None:
        if relative is None or term not in relative.terms:
            return None
        stem = at + (name if relative.shared else f"position_{name}")
        rows, weight = relative_rows(), tensors[f"{stem}.weight"].detach()
        bias = tensors.get(f"{stem}.bias")
        made = functional.linear(rows, weight.to(rows.dtype), None if bias is None else bias.detach().to(rows.dtype))
        made = made.view(-1, spec.num_heads, spec.head_dim).transpose(0, 1).to(dtype).contiguous()
        copied.append(made.nbytes)
        return made

    @functools.cache
    def relative_rows() -> Tensor:
        assert relative is not None
        rows = tensors["relative.table.weight"].detach()
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not relative.norm:
            return rows
        weight, bias = (tensors[f"relative.norm.{kind}"].detach().to(rows.dtype) for kind in ("weight", "bias"))
        return functional.layer_norm(rows, rows.shape[-1:], weight, bias, spec.eps)

    device, relative = tensors["embedding.word.weight"].device, spec.disentangled
    buckets = None
    if relative is not None:
        sizes = relative.span, relative.position_buckets, relative.max_relative_positions
        buckets = log_buckets(*sizes).to(device)
    prunes = head.only_first_tokens
    sets = [
        layer(i, split=prunes and i == spec.layer_weights[-1] and spec.layer_weights.count(i) == 1)
        for i in range(spec.num_weights)
    ]
    layers = [sets[i] for i in spec.layer_weights]
    whole = layers[:-1] if prunes else layers
    rotations = _rotations(spec, tensors)
    copied.append(sum(t.nbytes for pair in {id(r): r for r in rotations if r is not None}.values() for t in pair))
    word = table("embedding.word")
    return PackedWeights(
        word=word,
        position=positions(word),
        rotations=rotations,
        token_type=token_types(),
        embedding_norm=norm("embedding.norm") if spec.embedding_norm else (None, None),
        embedding_projection=linear("embedding.projection") if spec.projects_embedding else None,
        layers=tuple(whole),
        last=layers[-1] if prunes else None,
        final_norm=norm("final_norm") if spec.pre_norm else None,
        fused=_fuse(spec, whole, rotations, backend, device, buckets),
        buckets=buckets,
        branches=tuple(
            tuple(
                PackedDense(linear(dense.name), None if dense.eps is None else norm(f"{dense.name}.norm"))
                for dense in branch.layers
            )
            for branch in head.branches
        ),
        dtype=dtype,
        nbytes=sum(copied),
    )


def _check(spec: EncoderSpec, head: HeadSpec, tensors: dict[str, Tensor]) -> None:
    """An edit in place can give a weight another shape, dtype or device than the model was matched with."""
    first = tensors["embedding.word.weight"]
    expected = spec.parameter_shapes() | head.parameter_shapes()
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise Unsupported(f"the weight {name} no longer has the shape that the model was optimized with")
        if name.startswith("rotation."):  # stays fp32 where a model is loaded in another dtype
            continue
        if tensor.dtype is not first.dtype or tensor.device != first.device:
            raise Unsupported(f"the weight {name} is not of the model's one dtype and device any more")


def _rotations(spec: EncoderSpec, tensors: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor] | None, ...]:
    """Each layer's tables; the same ones where frequencies are equal."""
    made: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    device = tensors["embedding.word.weight"].device

    def tables(number: int) -> tuple[Tensor, Tensor]:
        frequencies = tensors[f"rotation.{number}.inverse_frequencies"].detach().to(device)
        for known, pair in made:
            if torch.equal(known, frequencies):
                return pair
        made.append((frequencies, rotation_tables(frequencies, spec.max_positions)))
        return made[-1][1]

    return tuple(map(tables, spec.rotations)) or (None,) * spec.num_layers


def _fuse(
    spec: EncoderSpec,
    layers: list[PackedLayer],
    rotations: tuple[tuple[Tensor, Tensor] | None, ...],
    backend: str,
    device: torch.device,
    buckets: Tensor | None,
) -> Any:
    make = registry.optional("encoder_layers", backend, device.type)
    parts = [
        (layer.qkv, layer.attention_output, layer.attention_norm, layer.ffn_in, layer.ffn_out, layer.output_norm)
        for layer in layers
    ]
    windows = [spec.window_of(i) for i in range(len(layers))]
    positions = [(layer.position_keys, layer.position_queries) for layer in layers]
    return None if make is None else make(parts, rotations[: len(layers)], windows, positions, buckets)


class Fingerprint:
    """What the live weights were when they were packed.

    Identity, pointer and version see most edits. Writes through `.data`, numpy, fused optimisers and
    `merge_adapter` move none of them: a few sampled values of every tensor see the dense ones among those. The
    tensors are held, since a freed pointer that is handed out again would hide a change.
    """

    __slots__ = ("dicts", "held", "names", "pointers", "samples", "versioned", "versions")

    def __init__(self, refs: Sequence[ParameterRef]) -> None:
        self.dicts = [ref.holder for ref in refs]
        self.names = [ref.name for ref in refs]
        self.held = [ref.tensor() for ref in refs]
        self.pointers = [tensor.data_ptr() for tensor in self.held]
        # Tensors that were built under inference_mode keep no version.
        self.versioned = [tensor for tensor in self.held if not tensor.is_inference()]
        self.versions = [tensor._version for tensor in self.versioned]
        self.samples = Samples([tensor for tensor in self.held if tensor.is_cpu and tensor.numel()])

    def changed(self) -> str | None:
        """Why the packed weights are stale, or None. Each line is one pass in C over all the weights."""
        if not all(map(operator.is_, map(dict.get, self.dicts, self.names), self.held)):
            return "a parameter was replaced"
        if list(map(Tensor.data_ptr, self.held)) != self.pointers:
            return "a parameter's memory was replaced, as by .to() or .data = ..."
        if list(map(_version_of, self.versioned)) != self.versions:
            return "a parameter was written to"
        if not self.samples.unchanged():
            return "weights changed without a version, as by a write through .data"
        return None


class Samples:
    """A few values of each tensor, as bytes, and whether they still stand there."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._views = [_sampled(tensor) for tensor in tensors]
        addresses = [
            (view.data_ptr() + i * view.stride(0) * view.itemsize, view.itemsize)
            for view in self._views
            for i in range(len(view))
        ]
        # Read as bytes of one width, the smallest that a dtype here has.
        self._width = min((width for _, width in addresses), default=0)
        self._addresses = torch.tensor([address for address, _ in addresses], dtype=torch.int64)
        self._expected = self._read()

    def _read(self) -> Tensor:
        if not self._views:
            return torch.empty(0, dtype=torch.uint8)
        parts = [view.contiguous().view(torch.uint8).view(len(view), -1)[:, : self._width] for view in self._views]
        return torch.cat(parts).contiguous()

    def unchanged(self) -> bool:
        compare = samplers.values_unchanged
        if compare is None:
            return torch.equal(self._read(), self._expected)
        return compare(
            self._addresses.data_ptr(), self._expected.data_ptr(), len(self._addresses), self._width
        )


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()[(0,) * (tensor.dim() - 1)]
    step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
    return flat[step // 2 :: step][:SAMPLES_PER_TENSOR]


_version_of = operator.attrgetter("_version")
