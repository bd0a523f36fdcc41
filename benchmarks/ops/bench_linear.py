import pytest
import torch
from common import DTYPES, MODELS, assert_parity, compare

from clinfast.ops import linear as op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["qkv", "attention_output", "ffn_in", "ffn_out"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [16, 128, 1024])
def bench_prepacked_linear(benchmark, tokens, model, layer, dtype):
    """Stock is the unfused layer: `F.linear`, then the activation or the residual."""
    hidden, intermediate, _ = model
    inputs, outputs, activation, with_residual = {
        "qkv": (hidden, 3 * hidden, "none", False),
        "attention_output": (hidden, hidden, "none", True),
        "ffn_in": (hidden, intermediate, "gelu", False),
        "ffn_out": (intermediate, hidden, "none", True),
    }[layer]
    x = torch.randn(tokens, inputs).to(dtype)
    weight, bias = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)
    residual = torch.randn(tokens, outputs).to(dtype) if with_residual else None
    packed = op.prepack(weight, bias, dtype, "cpu")

    def run_ours():
        return packed(x, activation, residual)

    def run_stock():
        return op.reference(x, weight, bias, activation, residual)

    exact = op.reference(
        x.double(),
        weight.double(),
        bias.double(),
        activation,
        None if residual is None else residual.double(),
    )
    assert_parity(run_ours(), run_stock(), exact)
    compare(benchmark, run_ours, run_stock)
