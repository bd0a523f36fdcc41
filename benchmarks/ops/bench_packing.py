import pytest
import torch
from common import DTYPES, MODELS, RAGGED, compare
from torch.nn import functional

from clinfast.ops import packing as op
from clinfast.ops import registry

VOCAB, TYPES = 30522, 2
BATCHES = [
    pytest.param((16,), 16, id="1x16"),
    pytest.param((384,), 384, id="1x384"),
    pytest.param(RAGGED, 512, id="ragged32"),
]


def padded_batch(lengths, seqlen):
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(0, VOCAB, mask.shape), mask, torch.zeros_like(mask)


@pytest.mark.parametrize(("lengths", "seqlen"), BATCHES)
def bench_pack(benchmark, lengths, seqlen):
    """Stock is the usual unpadding in torch calls, with the same range checks."""
    input_ids, mask, types = padded_batch(lengths, seqlen)
    ours = registry.implementation("pack", "cpu")

    def run_ours():
        cu_seqlens, indices, _, facts = ours(input_ids, mask, types, VOCAB, TYPES)
        tokens, longest, _, bad_id, bad_type, _ = facts.tolist()
        return cu_seqlens, indices[:tokens], longest, bad_id < 0 and bad_type < 0

    def run_stock():
        used = mask.sum(1, dtype=torch.int32)
        cu_seqlens = functional.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        low, high = input_ids.aminmax()
        type_low, type_high = types.aminmax()
        fits = int(low) >= 0 and int(high) < VOCAB and int(type_low) >= 0 and int(type_high) < TYPES
        return cu_seqlens, mask.flatten().nonzero().flatten().int(), int(used.max()), fits

    for a, b in zip(run_ours(), run_stock(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert [t.tolist() for t in ours(input_ids, mask, types, VOCAB, TYPES)[2:]] == [
        t.tolist() for t in op.pack_reference(input_ids, mask, types, VOCAB, TYPES)[2:]
    ]
    compare(benchmark, run_ours, run_stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("lengths", "seqlen"), BATCHES)
def bench_unpack(benchmark, lengths, seqlen, model, dtype):
    input_ids, mask, _ = padded_batch(lengths, seqlen)
    _, indices, _, facts = op.pack_reference(input_ids, mask, None, VOCAB, TYPES)
    packed = torch.randn(int(facts[0]), model[0]).to(dtype)
    long_indices, positions = indices[: len(packed)].long(), mask.numel()
    ours = registry.implementation("unpack", "cpu")

    def run_ours():
        return ours(packed, indices, positions, dtype)

    def run_stock():
        return packed.new_zeros(positions, packed.shape[1]).index_copy_(0, long_indices, packed)

    assert torch.equal(run_ours(), run_stock())
    compare(benchmark, run_ours, run_stock)
