"""The Triton kernels that are bound by memory, against eager PyTorch, Inductor and a copy of as many bytes: LayerNorm,
bias + GELU, embedding, pooling. Parity with float64 is asserted before anything is timed."""

import pytest
import torch
from gpu_timing import NO_GPU, assert_within_budget, copy_bytes_per_second, needs_triton, race, record
from torch.nn import functional

from clinfast.ops import embedding as embedding_op
from clinfast.ops import pooling as pooling_op
from clinfast.ops import registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
ROWS, VOCABULARY, NOTES, SEQLEN = 16384, 30522, 128, 512
# So many inputs that the second-level cache holds none of them.
SETS = 6


def op(name, backend="triton"):
    return registry.implementation(name, backend, "cuda", prechecked=True)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def over_all(sets, function, *rest):
    return lambda: [function(*each, *rest) for each in sets]


def measure(benchmark, sets, contenders, moved, least=None):
    """`contenders`: functions of one set's tensors, "clinfast" first; `moved`: bytes that one call cannot but move."""
    if registry.unavailable("cuda") is not None:
        contenders.pop("clinfast, CUDA C++", None)
    times = race({name: over_all(sets, call) for name, call in contenders.items()})
    times = {name: value / len(sets) for name, value in times.items()}
    ours = contenders["clinfast"]
    benchmark.pedantic(lambda: ours(*sets[0]), rounds=5, iterations=5)
    share = moved / times["clinfast"] * 1e3 / copy_bytes_per_second()
    record(benchmark, times, "clinfast", share_of_copy=share, bytes=moved, least=least)


def inductor(function):
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


@pytest.mark.parametrize("hidden", [384, 768, 1024])
def bench_add_layer_norm(benchmark, hidden):
    needs_triton()
    sets = [(random(ROWS, hidden), random(ROWS, hidden)) for _ in range(SETS)]
    weight, shift = (random(hidden, dtype=torch.float32) for _ in "ab")
    low = weight.bfloat16(), shift.bfloat16()
    ours, in_cuda = op("layer_norm"), op("layer_norm", "cuda") if registry.unavailable("cuda") is None else None

    def stock(x, residual):
        return functional.layer_norm(x + residual, (hidden,), *low, 1e-12)

    x, residual = sets[0]
    total = x.double() + residual.double()
    exact = functional.layer_norm(total, (hidden,), weight.double(), shift.double(), 1e-12)
    assert_within_budget(ours(x, residual, weight, shift, 1e-12), stock(x, residual), exact)
    contenders = {
        "clinfast": lambda x, residual: ours(x, residual, weight, shift, 1e-12),
        "clinfast, CUDA C++": lambda x, residual: in_cuda(x, residual, weight, shift, 1e-12),
        "eager": stock,
        "Inductor": inductor(stock),
    }
    measure(benchmark, sets, contenders, 3 * x.nbytes, {"share_of_copy": 0.88} if hidden >= 768 else None)


@pytest.mark.parametrize("hidden", [3072, 4096])
def bench_bias_gelu(benchmark, hidden):
    needs_triton()
    sets = [(random(ROWS, hidden),) for _ in range(SETS)]
    bias = random(hidden, dtype=torch.float32)
    low = bias.bfloat16()
    ours, in_cuda = op("gelu"), op("gelu", "cuda") if registry.unavailable("cuda") is None else None

    def stock(x):
        return functional.gelu(x + low)

    (x,) = sets[0]
    assert_within_budget(ours(x, bias, "none"), stock(x), functional.gelu(x.double() + bias.double()))
    contenders = {
        "clinfast": lambda x: ours(x, bias, "none"),
        "clinfast, CUDA C++": lambda x: in_cuda(x, bias, "none"),
        "eager": stock,
        "Inductor": inductor(stock),
    }
    measure(benchmark, sets, contenders, 2 * x.nbytes)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "sum"])
def bench_embedding(benchmark, norm):
    needs_triton()
    hidden = 768
    ids = [torch.randint(0, VOCABULARY, (ROWS // SEQLEN, SEQLEN), device="cuda") for _ in range(SETS)]
    indices = torch.arange(ids[0].numel(), dtype=torch.int32, device="cuda")
    word, position, types = (random(rows, hidden) for rows in (VOCABULARY, SEQLEN, 2))
    weight, shift = (random(hidden, dtype=torch.float32) if norm else None for _ in "ab")
    low = None if weight is None or shift is None else (weight.bfloat16(), shift.bfloat16())
    rest = (weight, shift, 1e-12, 0, torch.bfloat16)
    ours, in_cuda = op("embedding"), op("embedding", "cuda") if registry.unavailable("cuda") is None else None

    def stock(ids):
        total = word[ids] + types[0] + position
        return total if low is None else functional.layer_norm(total, (hidden,), *low, 1e-12)

    tables = [table.double() for table in (word, position, types)]
    exact = embedding_op.reference(ids[0], None, indices, None, *tables, *rest[:-1], torch.float64)
    ours_first = ours(ids[0], None, indices, None, word, position, types, *rest)
    assert_within_budget(ours_first, stock(ids[0]).flatten(0, 1), exact)
    contenders = {
        "clinfast": lambda ids: ours(ids, None, indices, None, word, position, types, *rest),
        "clinfast, CUDA C++": lambda ids: in_cuda(ids, None, indices, None, word, position, types, *rest),
        "eager": stock,
        "Inductor": inductor(stock),
    }
    # Word rows come from memory, positions and types from the cache.
    measure(benchmark, [(each,) for each in ids], contenders, 2 * ours_first.nbytes)


@pytest.mark.parametrize("kind", ["first_token", "mean"])
def bench_pooling(benchmark, kind):
    needs_triton()
    hidden = 768
    lengths = torch.tensor([16 + (97 * i) % 220 for i in range(NOTES)])
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to("cuda", torch.int32)
    note_of = torch.repeat_interleave(torch.arange(NOTES), lengths).cuda()
    sets = [(random(int(lengths.sum()), hidden),) for _ in range(SETS)]
    count = lengths.cuda()[:, None]
    ours, in_cuda = op("pooling"), op("pooling", "cuda") if registry.unavailable("cuda") is None else None
    first = cu_seqlens[:-1].long()

    def stock(x):
        if kind == "first_token":
            return x[first]
        total = torch.zeros(NOTES, hidden, device="cuda", dtype=torch.float32).index_add_(0, note_of, x.float())
        return (total / count).to(x.dtype)

    (x,) = sets[0]
    exact = pooling_op.reference(x.double().cpu(), cu_seqlens.cpu(), kind).to("cuda")
    assert_within_budget(ours(x, cu_seqlens, kind), exact.to(x.dtype), exact)
    contenders = {
        "clinfast": lambda x: ours(x, cu_seqlens, kind),
        "clinfast, CUDA C++": lambda x: in_cuda(x, cu_seqlens, kind),
        "eager": stock,
    }
    measure(benchmark, sets, contenders, x.nbytes if kind == "mean" else 2 * NOTES * hidden * 2)
