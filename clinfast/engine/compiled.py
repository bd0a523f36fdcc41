"""The whole packed encoder as one opaque op, for `torch.compile`: padded in, padded out, the weights as its inputs.

Lengths depend on the data, so nothing of the packing may be traced. The live weights are passed (an integer handle
would go stale and could not be exported); the packed ones are found, or made, inside the op.
"""

from __future__ import annotations

import collections
import json
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinfast.engine.concurrency import ForkSafeLock, gate, single_thread_if_forked
from clinfast.engine.encoder import Encoder, resolve_precision, run, unpack
from clinfast.engine.executors import EagerExecutor, NativeExecutor
from clinfast.engine.packing import pack
from clinfast.engine.spec import (
    EncoderOutput,
    EncoderSpec,
    HeadSpec,
    NotServed,
    ParameterRef,
    Request,
    Unsupported,
)
from clinfast.engine.weights import Fingerprint, PackedWeights, pack_weights
from clinfast.ops.registry import library

KEPT = 4

_encoders: weakref.WeakSet[Encoder] = weakref.WeakSet()
_made: collections.OrderedDict[tuple[str, int], tuple[PackedWeights, Fingerprint]] = collections.OrderedDict()
_lock = ForkSafeLock()


class _Call(NamedTuple):
    """`Encoder.call`, read back."""

    spec: EncoderSpec
    head: HeadSpec
    precision: str
    backend: str
    padding: str

    @classmethod
    def from_json(cls, text: str) -> _Call:
        facts = json.loads(text)
        return cls(**{**facts, "spec": EncoderSpec.from_json(facts["spec"]), "head": HeadSpec(*facts["head"])})


def announce(encoder: Encoder) -> None:
    """Let the op share this encoder's packed weights instead of packing a second copy."""
    _encoders.add(encoder)


def forward(encoder: Encoder, request: Request) -> EncoderOutput | None:
    """What the patched forward calls while it is being traced; None where the model's dtype is not served."""
    weights: list[Tensor] = [ref.module._parameters[ref.name] for ref in encoder.refs]  # type: ignore[misc]
    if not _serves(encoder.precision, weights[0].dtype):
        return None
    with torch.no_grad():
        found = torch.ops.clinfast.encode(
            request.input_ids, request.attention_mask, request.token_type_ids, weights, encoder.call
        )
    if encoder.head.classifier:
        return EncoderOutput(None, None, found[0])
    return EncoderOutput(found[0], found[1] if encoder.head.pooler else None, None)


def _serves(precision: str, model_dtype: torch.dtype) -> bool:
    try:
        resolve_precision(precision, model_dtype)
    except Unsupported:
        return False
    return True


# What torch.compiler.assume_constant_result does, without importing torch._dynamo for it.
_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _encode(
    input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None, weights: list[Tensor], call: str
) -> list[Tensor]:
    single_thread_if_forked()
    facts = _Call.from_json(call)
    executor = NativeExecutor(facts.spec, facts.backend)
    request, dtype = Request(input_ids, mask, token_type_ids), weights[0].dtype
    with gate.room(), torch.no_grad():
        packed = _find(call, facts, weights)
        try:
            out = run(executor, packed, facts.head, request, facts.padding, dtype)
        except NotServed:
            out = _run_on_column_zero(executor, packed, facts.head, request, dtype)
    return [x for x in ((out.logits,) if facts.head.classifier else (out.hidden_states, out.pooled)) if x is not None]


def _run_on_column_zero(
    executor: EagerExecutor, weights: PackedWeights, head: HeadSpec, request: Request, dtype: torch.dtype
) -> EncoderOutput:
    """Stock reads column 0 whether it is padding or not; a traced call cannot go back to stock, so do the same."""
    batch = pack(request, executor.spec, keep_padding=True, first_token=False, backend=executor.backend)
    hidden = unpack(executor, executor.all_hidden_states(weights, request, batch), batch, weights.dtype)
    assert weights.pooler is not None
    pooled = weights.pooler(hidden[:, 0].contiguous(), "tanh")
    if not head.classifier:
        return EncoderOutput(hidden.to(dtype), pooled.to(dtype), None)
    assert weights.classifier is not None
    return EncoderOutput(None, None, weights.classifier(pooled).to(dtype))


def _find(call: str, facts: _Call, weights: list[Tensor]) -> PackedWeights:
    pointers = _pointers(weights)
    for encoder in _encoders:
        if encoder.call == call and _pointers([ref.tensor() for ref in encoder.refs]) == pointers:
            return encoder.weights()
    key = call, pointers[0]
    with _lock:
        entry = _made.get(key)
        if entry is None or entry[1].changed() is not None or _pointers(entry[1].held) != pointers:
            entry = _made[key] = _make(facts, weights)
            while len(_made) > KEPT:
                _made.popitem(last=False)
        _made.move_to_end(key)
        return entry[0]


def _pointers(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _make(facts: _Call, weights: list[Tensor]) -> tuple[PackedWeights, Fingerprint]:
    names = facts.spec.parameter_names() + facts.head.parameter_names()
    tensors = dict(zip(names, weights, strict=True))
    holder: Any = SimpleNamespace(_parameters=tensors)
    fingerprint = Fingerprint([ParameterRef(holder, name) for name in names])
    dtype = resolve_precision(facts.precision, weights[0].dtype)
    return pack_weights(facts.spec, facts.head, tensors, dtype, facts.backend), fingerprint


def _fake(
    input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None, weights: list[Tensor], call: str
) -> list[Tensor]:
    head = _Call.from_json(call).head
    like = weights[0]
    batch, seqlen = input_ids.shape
    if head.classifier:
        labels = weights[-1].shape[0]
        shape = (batch, labels) if head.kind == "first_token" else (batch, seqlen, labels)
        return [like.new_empty(shape)]
    hidden_size = like.shape[1]
    hidden = like.new_empty(batch, seqlen, hidden_size)
    return [hidden, like.new_empty(batch, hidden_size)] if head.pooler else [hidden]


library.define(
    "encode(Tensor input_ids, Tensor? mask, Tensor? token_type_ids, Tensor[] weights, str call) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("encode", _encode, "CPU")
library.impl("encode", _fake, "Meta")
