"""bias + exact GELU behind the product: ours on 8.0 to 9.0 against the library with a second kernel, and its tanh."""

import pytest
import torch
from cuda_cases import race, skip_without_kernels

from clinfast.backends.cuda import native
from clinfast.backends.cuda.linear import LibraryLinear, OwnLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("outputs", "inputs"), [(3072, 768), (4096, 1024), (1536, 384)])
@pytest.mark.parametrize("rows", [128, 8192])
def bench_cuda_linear_gelu(benchmark, rows, outputs, inputs):
    skip_without_kernels()
    if not (8, 0) <= native.capability(0) <= (9, 0) or not native.kernels().has_cutlass():
        pytest.skip("the product of our own needs compute capability 8.0 to 9.0 and a build with CUTLASS")
    x, weight = (torch.randn(n, inputs, device="cuda").bfloat16() / inputs**0.25 for n in (rows, outputs))
    bias = torch.randn(outputs, device="cuda").bfloat16()
    ours, library = OwnLinear(weight, bias, x.dtype), LibraryLinear(weight, bias, x.dtype)

    def fused():
        return ours.product(x, True, None)

    assert fused() is not None
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
    stock = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    assert (fused() - exact).abs().max() <= 2 * (stock - exact).abs().max()
    contenders = {
        "clinfast": fused,
        "library, then our GELU": lambda: library(x, "gelu"),
        "library, tanh epilogue": lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
    }
    race(benchmark, contenders, flops=2 * rows * outputs * inputs)
