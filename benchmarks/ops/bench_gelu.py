import pytest
import torch
from common import DTYPES, MODELS, assert_parity, compare
from torch.nn import functional

from clinfast.ops import gelu as op
from clinfast.ops import registry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [16, 128, 4096])
def bench_bias_gelu(benchmark, tokens, model, approximate, dtype):
    hidden = model[1]
    x, bias = torch.randn(tokens, hidden).to(dtype), torch.randn(hidden)
    stock_bias = bias.to(dtype)
    ours = registry.implementation("gelu", "cpu")

    def run_ours():
        return ours(x, bias, approximate)

    def run_stock():
        return functional.gelu(x + stock_bias, approximate=approximate)

    assert_parity(run_ours(), run_stock(), op.reference(x.double(), bias, approximate))
    compare(benchmark, run_ours, run_stock)
