"""Attention of CUDA C++ against torch's padded and packed ones and against every other backend that is here."""

import pytest
import torch
from cuda_cases import race, skip_without_kernels

from clinfast.backends.cuda import attention as backend
from clinfast.backends.cuda import native
from clinfast.ops import attention as op
from clinfast.ops import registry

pytestmark = pytest.mark.gpu

LENGTHS = {
    "128 notes of 32 to 512": [32 + (97 * i) % 481 for i in range(128)],
    "256 notes of at most 128": [16 + (53 * i) % 113 for i in range(256)],
    "4 notes of 4096": [4096] * 4,
}


@pytest.mark.parametrize("kernel", ["mma", "wgmma"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def bench_cuda_attention(benchmark, lengths, kernel, monkeypatch):
    skip_without_kernels()
    if kernel == "wgmma" and native.capability(0) != (9, 0):
        pytest.skip("the Hopper kernel runs on compute capability 9.0 only")
    monkeypatch.setattr(backend, "KERNEL", backend.KERNELS[kernel])
    heads, head_dim, longest = 12, 64, max(lengths)
    q, k, v = torch.randn(sum(lengths), 3, heads, head_dim, device="cuda", dtype=torch.bfloat16).unbind(1)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    args = (q, k, v, cu_seqlens, cu_seqlens, None, head_dim**-0.5)

    def ours():
        return backend.prechecked(*args)

    padded = [
        torch.nn.utils.rnn.pad_sequence(t.split(lengths), batch_first=True).transpose(1, 2).contiguous()
        for t in (q, k, v)
    ]
    mask = torch.arange(longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    mask = None if len(set(lengths)) == 1 else mask[:, None, None]

    def sdpa():
        return torch.nn.functional.scaled_dot_product_attention(*padded, attn_mask=mask)

    def packed():
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False, scale=head_dim**-0.5
        )[0]

    some = slice(0, lengths[0] + lengths[1])
    exact = op.reference(*(t[some].double() for t in (q, k, v)), *[cu_seqlens[:3]] * 2, None, head_dim**-0.5)
    stock_error = (packed()[some] - exact).square().mean().sqrt()
    assert (ours()[some] - exact).square().mean().sqrt() <= 2 * stock_error
    contenders = {"clinfast": ours, "torch varlen flash": packed, "torch padded sdpa": sdpa}
    for name in registry.order("auto", "cuda"):
        if name not in ("cuda", "torch"):
            other = registry.implementation("attention", name, "cuda", prechecked=True)
            contenders[f"clinfast {name}"] = lambda other=other: other(*args)
    flops = 4 * heads * head_dim * sum(n * n for n in lengths)
    race(benchmark, contenders, kernel=kernel, flops=flops)


def bench_cuda_host_cost(benchmark):
    """Of one call from Python, launch and allocation of the result included."""
    skip_without_kernels()
    q, k, v = torch.randn(16, 3, 12, 64, device="cuda", dtype=torch.bfloat16).unbind(1)
    cu_seqlens = torch.tensor([0, 16], device="cuda", dtype=torch.int32)
    benchmark(backend.prechecked, q, k, v, cu_seqlens, cu_seqlens, None, 0.125)
    torch.cuda.synchronize()
