"""Packing and unpacking by Triton against PyTorch's operations and a forward of BERT-base; what a launch costs the
host."""

import time

import pytest
import torch
from gpu_timing import NO_GPU, milliseconds, needs_triton, race, record

from clinfast.backends import torch as in_torch
from clinfast.ops import registry
from clinfast.ops.packing import PackedBuffers, PackInto, pack_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
HIDDEN, LAYERS = 768, 12
VOCABULARY, TYPES = 30522, 2
BATCHES = {"32x512": (32, 512), "128x512": (128, 512)}
CALLS, ITERATIONS, FORWARDS = 500, 50, 5


def notes(batch, seqlen):
    g = torch.Generator().manual_seed(0)
    lengths = (torch.randn(batch, 1, generator=g) * 0.8 + 4.8).exp().clamp(8, seqlen).long()
    ids = torch.randint(1000, 20000, (batch, seqlen), generator=g)
    return ids.cuda(), (torch.arange(seqlen) < lengths).long().cuda()


def base_model():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=HIDDEN, num_hidden_layers=LAYERS)).eval().to("cuda", torch.bfloat16)


def op(name, backend="triton"):
    return registry.implementation(name, backend, "cuda", prechecked=True)


@pytest.mark.parametrize("size", BATCHES)
def bench_pack_and_unpack(benchmark, size):
    needs_triton()
    import clinfast

    ids, mask = notes(*BATCHES[size])
    packed = op("pack")(ids, mask, None, VOCABULARY, TYPES)
    expected = pack_reference(ids.cpu(), mask.cpu(), None, VOCABULARY, TYPES)
    tokens = int(packed[3][0])
    assert packed[3].tolist() == expected[3].tolist() and packed[0].tolist() == expected[0].tolist()
    assert packed[1][:tokens].tolist() == expected[1][:tokens].tolist()
    rows = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def both(pack, unpack):
        def call():
            return pack(ids, mask, None, VOCABULARY, TYPES), unpack(rows, packed[1], ids.numel(), torch.bfloat16)

        return call

    contenders = {"clinfast": both(op("pack"), op("unpack")), "PyTorch": both(in_torch.pack, in_torch.unpack)}
    if registry.unavailable("cuda") is None:
        contenders["clinfast, CUDA C++"] = both(op("pack", "cuda"), op("unpack", "cuda"))
    assert torch.equal(contenders["clinfast"]()[1], contenders["PyTorch"]()[1])
    model = clinfast.optimize(base_model())
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        forward = min(milliseconds(lambda: model(input_ids=ids, attention_mask=mask)) for _ in range(FORWARDS))
    times = race(contenders)
    benchmark.pedantic(contenders["clinfast"], rounds=5, iterations=5)
    share = times["clinfast"] / forward
    record(
        benchmark, times, "clinfast", forward_ms=forward, share_of_forward=share, most={"share_of_forward": 0.02}
    )


def host_microseconds(call):
    """A call's time on the host: the queue of launches is long enough for all of them."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / CALLS * 1e6


def bench_launch(benchmark):
    """Host microseconds of one op, with its checks, and whether our launcher or Triton's made it."""
    needs_triton()
    from clinfast.backends.triton import launch

    x = torch.randn(8, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight, shift = torch.ones(HIDDEN, device="cuda"), torch.zeros(HIDDEN, device="cuda")
    norm, into = op("layer_norm"), op("pack.into")
    buffers = PackedBuffers.of(4096, 64, x.device)
    constants, sizes = PackInto(VOCABULARY, TYPES, 0, None, False), {"1x128": (1, 128), "16x256": (16, 256)}
    calls = {"layer_norm": lambda: norm(x, None, weight, shift, 1e-5)}
    for size, (batch, seqlen) in sizes.items():
        ids, mask = notes(batch, seqlen)
        calls[f"pack.into {size}"] = lambda ids=ids, mask=mask, batch=batch: into(
            ids, mask, None, constants, 4096, batch + 1, buffers
        )
    found = {name: host_microseconds(call) for name, call in calls.items()}
    benchmark.pedantic(calls["layer_norm"], rounds=5, iterations=ITERATIONS)
    benchmark.extra_info.update(
        card=torch.cuda.get_device_name(), host_microseconds=found, launches=dict(launch.launches)
    )
    print(f"\nhost: {found}; {launch.launches}")
