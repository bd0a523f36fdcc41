import pytest
import torch
from common import DTYPES, MODELS, RAGGED, assert_parity, boundaries, compare
from torch.nn import functional

from clinfast.ops import attention as op
from clinfast.ops import registry

BATCHES = [
    pytest.param((16,), id="1x16"),
    pytest.param((128,), id="1x128"),
    pytest.param((384,), id="1x384"),
    pytest.param((128,) * 8, id="8x128"),
    pytest.param(RAGGED, id="ragged32"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lengths", BATCHES)
def bench_self_attention(benchmark, lengths, model, dtype):
    """Stock is the masked attention over the padded batch, as transformers runs it, less its layout changes."""
    hidden, _, heads = model
    head_dim, tokens, batch, seqlen = hidden // heads, sum(lengths), len(lengths), max(lengths)
    packed = torch.randn(tokens, 3, heads, head_dim).to(dtype)
    q, k, v = packed.unbind(1)
    cu_seqlens = boundaries(lengths)
    kept = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    padded = torch.zeros(batch, seqlen, 3, heads, head_dim, dtype=dtype)
    padded[kept] = packed
    padded_q, padded_k, padded_v = (t.transpose(1, 2).contiguous() for t in padded.unbind(2))
    mask = None if kept.all() else kept[:, None, None, :].expand(batch, 1, seqlen, seqlen)
    ours = registry.implementation("attention", "cpu")

    def run_ours():
        return ours(q, k, v, cu_seqlens, cu_seqlens, None, head_dim**-0.5)

    def run_stock():
        return functional.scaled_dot_product_attention(padded_q, padded_k, padded_v, mask)

    exact = op.reference(q.double(), k.double(), v.double(), cu_seqlens, cu_seqlens, None, head_dim**-0.5)
    assert_parity(run_ours(), run_stock().transpose(1, 2)[kept], exact)
    compare(benchmark, run_ours, run_stock)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def bench_first_token_queries(benchmark, model, dtype):
    """One query a note, as in the last layer under a first-token head."""
    hidden, _, heads = model
    head_dim, batch = hidden // heads, 32
    q = torch.randn(batch, heads, head_dim).to(dtype)
    k, v = torch.randn(batch * 128, 2, heads, head_dim).to(dtype).unbind(1)
    cu_seqlens_q, cu_seqlens_k = boundaries((1,) * batch), boundaries((128,) * batch)
    ours = registry.implementation("attention", "cpu")
    stock_q = q[:, :, None]
    stock_k, stock_v = (t.unflatten(0, (batch, 128)).transpose(1, 2).contiguous() for t in (k, v))

    def run_ours():
        return ours(q, k, v, cu_seqlens_q, cu_seqlens_k, None, head_dim**-0.5)

    def run_stock():
        return functional.scaled_dot_product_attention(stock_q, stock_k, stock_v)

    exact = op.reference(q.double(), k.double(), v.double(), cu_seqlens_q, cu_seqlens_k, None, head_dim**-0.5)
    assert_parity(run_ours(), run_stock()[:, :, 0], exact)
    compare(benchmark, run_ours, run_stock)
