"""Product + bias + exact GELU by Triton against cuBLASLt with a GELU behind it, and Inductor; beside them what is not
the same function: the product alone, and cuBLASLt with the tanh form in its epilogue."""

import pytest
import torch
from gpu_timing import NO_GPU, assert_within_budget, matmul_flops_per_second, needs_triton, race, record
from torch.nn import functional

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
ROWS = {"128": 128, "1024": 1024, "8192": 8192, "32768": 32768}
SIZES = {"768x3072": (768, 3072), "1024x4096": (1024, 4096)}  # inputs and outputs


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def bench_linear_gelu(benchmark, size, rows):
    needs_triton()
    from clinfast.backends.triton.linear import GpuLinear

    count, (inputs, outputs) = ROWS[rows], SIZES[size]
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16, generator=g)
    weight = (torch.randn(outputs, inputs, device="cuda", generator=g) / inputs**0.5).bfloat16()
    bias = torch.randn(outputs, device="cuda", generator=g).bfloat16()
    linear = GpuLinear(weight, bias, torch.bfloat16)

    def ours():
        return linear.product(x, "gelu", None)

    def separate():
        return functional.gelu(functional.linear(x, weight, bias))

    def only_product():
        return functional.linear(x, weight, bias)

    def tanh_epilogue():
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)

    exact = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()))
    assert_within_budget(ours(), separate(), exact)
    del exact
    inductor = torch.compile(separate, mode="max-autotune-no-cudagraphs")
    times = race({"clinfast": ours, "product then GELU": separate, "Inductor": inductor})
    others = race({"product alone": only_product, "cuBLASLt with tanh GELU": tanh_epilogue})
    benchmark.pedantic(ours, rounds=5, iterations=5)
    flops = 2 * count * inputs * outputs
    record(
        benchmark, times, "clinfast", tflops=flops / times["clinfast"] / 1e9, not_the_same_function=others,
        share_of_matmul=flops / times["clinfast"] * 1e3 / matmul_flops_per_second(),
        over_product_then_gelu=times["product then GELU"] / times["clinfast"],
        least={"over_product_then_gelu": 1.15} if int(rows) >= 8192 else None,
    )  # fmt: skip
