"""CUDA C++ kernels that are bound by memory: residual + LayerNorm and bias + GELU, against torch and copies."""

import pytest
import torch
from cuda_cases import race, skip_without_kernels

from clinfast.ops import registry

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [128, 16384])
@pytest.mark.parametrize("hidden", [384, 768, 1024])
def bench_cuda_layer_norm(benchmark, rows, hidden):
    skip_without_kernels()
    x, residual = torch.randn(2, rows, hidden, device="cuda", dtype=torch.bfloat16)
    weight, shift = torch.randn(2, hidden, device="cuda")
    ours = registry.implementation("layer_norm", "cuda", "cuda")
    half = weight.bfloat16(), shift.bfloat16()

    def stock():
        return torch.nn.functional.layer_norm(x + residual, (hidden,), *half, 1e-12)

    exact = torch.nn.functional.layer_norm(
        x.double() + residual.double(), (hidden,), weight.double(), shift.double(), 1e-12
    )
    assert (ours(x, residual, weight, shift, 1e-12) - exact).abs().max() <= 2 * (stock() - exact).abs().max()
    # The same bytes, read and written once: 2 reads and 1 write are 1.5 copies.
    source, target = torch.empty(2, rows * hidden * 3 // 2, device="cuda", dtype=torch.bfloat16)
    contenders = {
        "clinfast": lambda: ours(x, residual, weight, shift, 1e-12),
        "stock": stock,
        "copy of as many bytes": lambda: target.copy_(source),
    }
    race(benchmark, contenders, bytes=3 * x.nbytes)


@pytest.mark.parametrize("rows", [128, 16384])
@pytest.mark.parametrize("hidden", [1536, 3072])
def bench_cuda_gelu(benchmark, rows, hidden):
    skip_without_kernels()
    x, bias = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16), torch.randn(hidden, device="cuda")
    ours, half = registry.implementation("gelu", "cuda", "cuda"), bias.bfloat16()

    def stock():
        return torch.nn.functional.gelu(x + half)

    exact = torch.nn.functional.gelu(x.double() + bias.double())
    assert (ours(x, bias) - exact).abs().max() <= 2 * (stock() - exact).abs().max()
    target = torch.empty_like(x)
    contenders = {
        "clinfast": lambda: ours(x, bias), "stock": stock, "copy of as many bytes": lambda: target.copy_(x),
    }  # fmt: skip
    race(benchmark, contenders, bytes=2 * x.nbytes)
