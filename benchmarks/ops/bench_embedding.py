import pytest
import torch
from common import DTYPES, MODELS, assert_parity, compare
from torch.nn import functional

from clinfast.ops import embedding as op
from clinfast.ops import registry

VOCAB, POSITIONS, TYPES, EPS = 30522, 512, 2, 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 16), (1, 128), (32, 128)])
def bench_embedding(benchmark, batch, seqlen, model, dtype):
    """Every position is real, so that stock does the same work."""
    hidden = model[0]
    word, position, token_type = (torch.randn(rows, hidden).to(dtype) for rows in (VOCAB, POSITIONS, TYPES))
    weight, shift = torch.randn(hidden), torch.randn(hidden)
    stock_weight, stock_shift = weight.to(dtype), shift.to(dtype)
    input_ids, types = torch.randint(0, VOCAB, (batch, seqlen)), torch.randint(0, TYPES, (batch, seqlen))
    positions, indices = torch.arange(seqlen), torch.arange(batch * seqlen, dtype=torch.int32)
    ours = registry.implementation("embedding", "cpu")

    def run_ours():
        return ours(input_ids, types, indices, word, position, token_type, weight, shift, EPS, 0, dtype)

    def run_stock():
        total = functional.embedding(input_ids, word) + functional.embedding(types, token_type)
        total += functional.embedding(positions, position)
        return functional.layer_norm(total, (hidden,), stock_weight, stock_shift, EPS).view(-1, hidden)

    tables = (word.double(), position.double(), token_type.double(), weight.double(), shift.double())
    assert_parity(run_ours(), run_stock(), op.reference(input_ids, types, indices, *tables, EPS, 0, torch.float64))
    compare(benchmark, run_ours, run_stock)
