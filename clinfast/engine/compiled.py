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

from clinfast.engine import precision as precisions
from clinfast.engine.concurrency import ForkSafeLock, gate, single_thread_if_forked
from clinfast.engine.encoder import Encoder
from clinfast.engine.executors import NativeExecutor
from clinfast.engine.run import run
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
        spec, head = EncoderSpec.from_json(facts["spec"]), HeadSpec.from_dict(facts["head"])
        return cls(**{**facts, "spec": spec, "head": head})


def announce(encoder: Encoder) -> None:
    """Let the op share this encoder's packed weights instead of packing a second copy."""
    _encoders.add(encoder)


def forward(encoder: Encoder, request: Request) -> EncoderOutput | None:
    """What the patched forward calls while it is being traced; None where the model's dtype is not served."""
    weights: list[Tensor] = [ref.holder[ref.name] for ref in encoder.refs]
    if not _serves(encoder.precision, weights[0].dtype, weights[0].device.type):
        return None
    with torch.no_grad():
        found = torch.ops.clinfast.encode(
            request.input_ids, request.attention_mask, request.token_type_ids, weights, encoder.call
        )
    if encoder.head.hidden_states:
        return EncoderOutput(found[0], tuple(found[1:]))
    return EncoderOutput(None, tuple(found))


def _serves(precision: str, model_dtype: torch.dtype, device: str) -> bool:
    try:
        precisions.resolve(precision, model_dtype, device)
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
    executor = NativeExecutor(facts.spec, facts.backend, input_ids.device.type)
    request, dtype = Request(input_ids, mask, token_type_ids), weights[0].dtype
    with gate.room(executor.device), torch.no_grad():
        packed = _find(call, facts, weights)
        try:
            out = run(executor, packed, facts.head, request, facts.padding, dtype)
        except NotServed as reason:
            if facts.spec.disentangled is not None:
                raise ValueError(f"{reason}: {facts.spec.family} does not serve that under torch.compile") from None
            # A masked column 0, which stock reads all the same; a traced call cannot go back to stock.
            out = run(executor, packed, facts.head, request, facts.padding, dtype, column_zero=True)
    return [x for x in (out.hidden_states, *out.branches) if x is not None]


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
    dtype = precisions.resolve(facts.precision, weights[0].dtype, weights[0].device.type)
    kind = "fp8" if facts.precision == "fp8" else ""
    return pack_weights(facts.spec, facts.head, tensors, dtype, facts.backend, kind), fingerprint


def _fake(
    input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None, weights: list[Tensor], call: str
) -> list[Tensor]:
    facts = _Call.from_json(call)
    like = weights[0]
    batch, seqlen = input_ids.shape
    outputs = [like.new_empty(batch, seqlen, facts.spec.hidden_size)] if facts.head.hidden_states else []
    for branch in facts.head.branches:
        shape = (batch, seqlen) if branch.rows == "per_token" else (batch,)
        outputs.append(like.new_empty(*shape, branch.out_features))
    return outputs


library.define(
    "encode(Tensor input_ids, Tensor? mask, Tensor? token_type_ids, Tensor[] weights, str call) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    library.impl("encode", _encode, _key)
library.impl("encode", _fake, "Meta")
