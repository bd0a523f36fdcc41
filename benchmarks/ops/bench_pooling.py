import pytest
import torch
from common import DTYPES, MODELS, assert_parity, boundaries, compare

from clinfast.ops import pooling as op
from clinfast.ops import registry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 128), (32, 128)])
def bench_pooling(benchmark, batch, seqlen, model, kind, dtype):
    """Every position is real, so that stock, which pools the padded batch, does the same work."""
    hidden = model[0]
    x, cu_seqlens = torch.randn(batch * seqlen, hidden).to(dtype), boundaries((seqlen,) * batch)
    padded, mask = x.view(batch, seqlen, hidden), torch.ones(batch, seqlen, 1, dtype=dtype)
    ours = registry.implementation("pooling", "cpu")

    def run_ours():
        return ours(x, cu_seqlens, kind)

    def run_stock():
        if kind == "first_token":
            return padded[:, 0].contiguous()
        if kind == "mean":
            return (padded * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return padded.masked_fill(mask == 0, -torch.inf).amax(1)

    assert_parity(run_ours(), run_stock(), op.reference(x.double(), cu_seqlens, kind))
    compare(benchmark, run_ours, run_stock)
