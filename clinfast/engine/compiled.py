"""The whole packed encoder as one opaque op, for `torch.compile`: padded in, padded out, the weights as its inputs.

Lengths depend on the data, so nothing of the packing may be traced. The live weights are passed (an integer handle
would go stale and could not be exported); the packed ones are found, or made, inside the op.
"""

from __future__ import annotations

import collections
import json
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clinfast.engine.concurrency import gate, single_thread_if_forked
from clinfast.engine.encoder import PRECISIONS, Encoder, run, unpack
from clinfast.engine.executors import EagerExecutor, NativeExecutor
from clinfast.engine.packing import pack
from clinfast.engine.spec import EncoderOutput, EncoderSpec, HeadSpec, NotServed, ParameterRef, Request
from clinfast.engine.weights import Fingerprint, PackedWeights, pack_weights
from clinfast.ops.registry import library

KEPT = 4

_encoders: weakref.WeakValueDictionary[tuple[str, int], Encoder] = weakref.WeakValueDictionary()
_made: collections.OrderedDict[tuple[str, int], tuple[PackedWeights, Fingerprint]] = collections.OrderedDict()
_lock = threading.Lock()


def describe_call(encoder: Encoder) -> str:
    """Everything that the op must know besides tensors, as one constant string."""
    precision = next(name for name, dtype in PRECISIONS.items() if dtype is encoder.dtype)
    return json.dumps(
        {
            "spec": encoder.spec.to_json(),
            "head": [encoder.head.kind, encoder.head.pooler, encoder.head.classifier],
            "precision": precision,
            "backend": encoder.backend,
            "padding": encoder.padding,
        }
    )


def announce(encoder: Encoder) -> None:
    """Let the op share this encoder's packed weights instead of packing a second copy."""
    _encoders[(encoder.call, encoder.refs[0].tensor().data_ptr())] = encoder


def forward(encoder: Encoder, request: Request) -> EncoderOutput:
    """What the patched forward calls while it is being traced."""
    weights = [ref.module._parameters[ref.name] for ref in encoder.refs]
    found = torch.ops.clinfast.encode(
        request.input_ids, request.attention_mask, request.token_type_ids, weights, encoder.call
    )
    return _named(encoder.head, found)


def _named(head: HeadSpec, found: list[Tensor]) -> EncoderOutput:
    if head.classifier:
        return EncoderOutput(None, None, found[0])
    return EncoderOutput(found[0], found[1] if head.pooler else None, None)


def _encode(
    input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None, weights: list[Tensor], call: str
) -> list[Tensor]:
    single_thread_if_forked()
    facts = json.loads(call)
    spec, head = EncoderSpec.from_json(facts["spec"]), HeadSpec(*facts["head"])
    executor = NativeExecutor(spec, facts["backend"])
    request, padding, dtype = Request(input_ids, mask, token_type_ids), facts["padding"], weights[0].dtype
    with gate.room(), torch.no_grad():
        packed = _find(call, facts, spec, head, weights)
        try:
            out = run(executor, packed, head, request, padding, dtype)
        except NotServed:
            out = _run_on_column_zero(executor, packed, head, request, dtype)
    return [x for x in (out.logits,) if head.classifier and x is not None] or [
        x for x in (out.hidden_states, out.pooled) if x is not None
    ]


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


def _find(call: str, facts: dict[str, Any], spec: EncoderSpec, head: HeadSpec, weights: list[Tensor]) -> PackedWeights:
    key = (call, weights[0].data_ptr())
    encoder = _encoders.get(key)
    if encoder is not None and all(
        ref.tensor().data_ptr() == w.data_ptr() for ref, w in zip(encoder.refs, weights, strict=True)
    ):
        return encoder.weights()
    with _lock:
        entry = _made.get(key)
        names = spec.parameter_names() + head.parameter_names()
        if (
            entry is None
            or entry[1].changed() is not None
            or any(held.data_ptr() != w.data_ptr() for held, w in zip(entry[1].held, weights, strict=True))
        ):
            holder = SimpleNamespace(_parameters=dict(zip(names, weights, strict=True)))
            fingerprint = Fingerprint([ParameterRef(holder, name) for name in names])  # type: ignore[arg-type]
            dtype = PRECISIONS[facts["precision"]]
            entry = pack_weights(spec, head, holder._parameters, dtype, facts["backend"]), fingerprint
            _made[key] = entry
            while len(_made) > KEPT:
                _made.popitem(last=False)
        _made.move_to_end(key)
        return entry[0]


def _fake(
    input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None, weights: list[Tensor], call: str
) -> list[Tensor]:
    facts = json.loads(call)
    head = HeadSpec(*facts["head"])
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
torch.library.register_fake("clinfast::encode", _fake, lib=library)
