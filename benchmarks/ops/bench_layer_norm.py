import pytest
import torch
from common import DTYPES, MODELS, assert_parity, compare
from torch.nn import functional

from clinfast.ops import layer_norm as op
from clinfast.ops import registry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [16, 128, 4096])
def bench_residual_layer_norm(benchmark, tokens, model, dtype):
    hidden = model[0]
    x, residual = (torch.randn(tokens, hidden).to(dtype) for _ in range(2))
    weight, shift = torch.randn(hidden), torch.randn(hidden)
    stock_weight, stock_shift = weight.to(dtype), shift.to(dtype)
    ours = registry.implementation("layer_norm", "cpu")

    def run_ours():
        return ours(x, residual, weight, shift, 1e-12)

    def run_stock():
        return functional.layer_norm(x + residual, (hidden,), stock_weight, stock_shift, 1e-12)

    exact = op.reference(x.double(), residual.double(), weight.double(), shift.double(), 1e-12)
    assert_parity(run_ours(), run_stock(), exact)
    compare(benchmark, run_ours, run_stock)
