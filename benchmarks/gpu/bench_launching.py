"""What lies between kernels and before them: host work until a graph is launched, and programmatic dependent launch."""

import pytest
import torch
from cuda_cases import skip_without_kernels
from gpu_timing import NO_GPU, milliseconds
from host_work import until_launch
from model_cases import inputs, model

from clinfast import patch
from clinfast.backends import racing
from clinfast.backends.cuda import native

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
GOAL = 15.0


def optimized(name, **options):
    import clinfast

    ours = clinfast.optimize(model(name), inference_only=True, strict=True, **options)
    ((_, _, forward),) = patch.find_patched(ours)
    return ours, forward.encoder


@pytest.mark.parametrize("length", [16, 128])
@pytest.mark.parametrize("name", ["minilm", "bert-base"])
@pytest.mark.parametrize("padding", ["remove", "keep"])
def bench_host_work_until_the_launch(benchmark, name, length, padding):
    """Goal: 15 us. `staging` is the packing into the graph's buffers, a part of it."""
    ours, encoder = optimized(name, padding=padding)
    batch = inputs([length])
    with torch.inference_mode():
        for _ in range(5):
            ours(**batch)
        found = until_launch(encoder.graphs, lambda: ours(**batch), torch.cuda.synchronize)
        lane = encoder.graphs.pool.lanes[0]
        key = next(iter(lane.graphs))
        staging = encoder.graphs._pack_into
        args = batch["input_ids"], batch["attention_mask"], None, encoder.graphs.constants, *key, lane.buffers
        benchmark.pedantic(staging, args=args, rounds=20, iterations=20)
        torch.cuda.synchronize()
    benchmark.extra_info.update(
        card=torch.cuda.get_device_name(), host_microseconds=found, staging_by=staging.__module__, goal=GOAL,
        met=found["median"] <= GOAL,
    )  # fmt: skip
    print(f"\n{name}, {length} tokens, padding={padding!r}: {found['median']:.1f} us until the launch, goal {GOAL:g}")


def chain(kernels):
    """So many LayerNorms of one row one after the other: what is between them is all that there is."""
    x = torch.randn(1, 768, device="cuda", dtype=torch.bfloat16)
    weight, shift = torch.ones(768, device="cuda"), torch.zeros(768, device="cuda")
    from clinfast.backends.cuda.layer_norm import layer_norm

    def run():
        y = x
        for _ in range(kernels):
            y = layer_norm(y, x, weight, shift, 1e-12)
        return y

    return run


@pytest.mark.parametrize("kernels", [100])
def bench_programmatic_launch_of_a_chain(benchmark, kernels):
    """Microseconds a graph node, with and without; the results have to be the same bits."""
    skip_without_kernels()
    module, run, graphs, results = native.on(torch.cuda.current_device()), chain(kernels), {}, {}
    for on in (False, True):
        with racing.programmatic(module, on):
            run()
            torch.cuda.synchronize()
            graphs[on] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[on]):
                results[on] = run()
        graphs[on].replay()
    torch.cuda.synchronize()
    assert torch.equal(results[False], results[True])
    times = {on: min(milliseconds(graph.replay) for _ in range(9)) * 1e3 / kernels for on, graph in graphs.items()}
    benchmark.pedantic(graphs[True].replay, rounds=5, iterations=10)
    benchmark.extra_info.update(
        card=torch.cuda.get_device_name(), microseconds_a_node={"off": times[False], "on": times[True]}
    )
    print(f"\na node: {times[False]:.2f} us, with programmatic dependent launch {times[True]:.2f} us")


@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize("cell", [[16], [128], [128] * 8])
@pytest.mark.parametrize("name", ["minilm", "bert-base"])
def bench_programmatic_launch_of_a_model(benchmark, name, cell, backend):
    """Two copies, each captured in its own way, in alternating rounds."""
    skip_without_kernels()
    module, batch, calls = native.on(torch.cuda.current_device()), inputs(cell), {}
    with torch.inference_mode():
        results = {}
        for on in (False, True):
            with racing.programmatic(module, on):
                ours, _ = optimized(name, backend=backend)
                for _ in range(3):
                    results[on] = ours(**batch).last_hidden_state
            calls[on] = lambda ours=ours: ours(**batch)
        assert torch.equal(results[False], results[True])
        times = {False: [], True: []}
        for _ in range(15):
            for on, call in calls.items():
                times[on].append(milliseconds(call))
        benchmark.pedantic(calls[True], rounds=5, iterations=10)
    off, on = (sorted(times[key])[7] for key in (False, True))
    benchmark.extra_info.update(
        card=torch.cuda.get_device_name(), milliseconds={"off": off, "on": on}, ratio=off / on, lengths=cell
    )
    print(f"\n{name} {cell}, backend {backend}: {off:.4f} ms, with programmatic dependent launch {on:.4f} ms")
