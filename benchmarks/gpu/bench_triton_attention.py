"""Attention of packed notes by Triton against torch's padded SDPA, its varlen attention on Flash and on cuDNN, and
flash-attn where it is installed. Parity with float64 is asserted before anything is timed; goals are recorded, not
asserted."""

import pytest
import torch
from gpu_timing import NO_GPU, assert_within_budget, boundaries, needs_triton, race, record
from torch.nn import functional

from clinfast.ops import registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
HEADS, HEAD_DIM = 12, 64
CASES = {
    "mixed_32_512": [32 + (37 * i) % 481 for i in range(128)],
    "128_tokens": [128] * 256,
    "512_tokens": [512] * 64,
    "16_tokens": [16] * 1024,
}


GOALS = {"mixed_32_512": {"ratio": 1.2}, "128_tokens": {"tflops": 200}, "512_tokens": {"tflops": 330}}
CHECKED_NOTES = 8


def attention_flops(lengths):
    return sum(4 * n * n * HEAD_DIM * HEADS for n in lengths)


def padded_sdpa(q, k, v, lengths):
    batch, longest = len(lengths), max(lengths)
    mask = (torch.arange(longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None])[:, None, None]
    at = mask.view(batch, longest)
    padded = []
    for tensor in (q, k, v):
        full = tensor.new_zeros(batch, longest, HEADS, HEAD_DIM)
        full[at] = tensor
        padded.append(full.transpose(1, 2))
    mask = None if min(lengths) == longest else mask
    return lambda: functional.scaled_dot_product_attention(*padded, attn_mask=mask)


def varlen_peers(q, k, v, cu_seqlens, longest):
    """torch's packed attention on each of its backends that takes the call."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        print("\nthis torch has no torch.nn.attention.varlen")
        return {}
    peers = {}

    def call():
        return varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    for name, use in (("torch varlen, Flash", False), ("torch varlen, cuDNN", True)):
        original = getattr(varlen, "_should_use_cudnn", None)
        if original is None and use:
            continue

        def on(use=use, original=original):
            if original is not None:
                varlen._should_use_cudnn = lambda *_, **__: use
            try:
                return call()
            finally:
                if original is not None:
                    varlen._should_use_cudnn = original

        try:
            on()
        except Exception as error:
            print(f"\n{name} does not run: {error}")
            continue
        peers[name] = on
    try:
        from flash_attn import flash_attn_varlen_func

        peers["flash-attn"] = lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    except ImportError:
        pass
    return peers


@pytest.mark.parametrize("name", CASES)
def bench_varlen_attention(benchmark, name):
    needs_triton()
    from clinfast.backends.triton import attention

    lengths = CASES[name]
    g = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=g)
    q, k, v = qkv.unbind(1)
    cu_seqlens = boundaries(lengths)

    def ours():
        return attention.prechecked(q, k, v, cu_seqlens, cu_seqlens, None, HEAD_DIM**-0.5)

    from clinfast.backends import torch as stock

    few = cu_seqlens[: CHECKED_NOTES + 1]
    rows = int(few[-1])
    part = [t[:rows] for t in (q, k, v)]
    exact = stock.attention(*(t.double() for t in part), few, few, None, HEAD_DIM**-0.5)
    assert_within_budget(ours()[:rows], stock.attention(*part, few, few, None, HEAD_DIM**-0.5), exact)

    contenders = {"clinfast": ours, "padded SDPA": padded_sdpa(q, k, v, lengths)}
    contenders |= varlen_peers(q, k, v, cu_seqlens, max(lengths))
    if registry.unavailable("cuda") is None:
        in_cuda = registry.implementation("attention", "cuda", "cuda", prechecked=True)
        contenders["clinfast, CUDA C++"] = lambda: in_cuda(q, k, v, cu_seqlens, cu_seqlens, None, HEAD_DIM**-0.5)
    times = race(contenders)
    benchmark.pedantic(ours, rounds=5, iterations=5)
    flops = attention_flops(lengths)
    record(
        benchmark, times, "clinfast", tflops=flops / times["clinfast"] / 1e9,
        least=GOALS.get(name),
    )  # fmt: skip
