"""What only a GPU shows: streams, graphs, devices. The emulation has none of them."""

import pytest
import torch
from test_attention import boundaries

from clinfast.backends.cuda import attention, native
from clinfast.backends.cuda.gelu import gelu
from clinfast.backends.cuda.layer_norm import layer_norm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels():
    if native.load_error() is not None:
        pytest.skip(f"no CUDA kernels: {native.load_error()}")


def arguments(device="cuda"):
    q, k, v = torch.randn(200, 3, 4, 64, device=device, dtype=torch.float16).unbind(1)
    cu_seqlens = boundaries([130, 70]).to(device)
    return q, k, v, cu_seqlens, cu_seqlens, None, 0.125


def test_launches_on_the_callers_stream():
    args = arguments()
    expected = attention.prechecked(*args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        args[0].mul_(1)
        ours = attention.prechecked(*args)
    side.synchronize()
    assert torch.equal(ours, expected)


def test_in_a_graph():
    args = arguments()
    weight, shift = torch.randn(2, 256, device="cuda")

    def run():
        x = attention.prechecked(*args).flatten(1)
        return gelu(layer_norm(x, x, weight, shift, 1e-5), shift)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("in_graph", [False, True])
def test_programmatic_launch_gives_the_same_bits(in_graph):
    """Chains whose kernels write to what the one before still reads, and others' kernels among them."""
    if native.capability(0) < (9, 0):
        pytest.skip("programmatic dependent launch is for compute capability 9.0 and later")
    args, kernels = arguments(), native.on(0)
    weight, shift = torch.randn(2, 256, device="cuda")
    matrix = torch.randn(256, 256, device="cuda", dtype=torch.float16) / 16
    x, rows = args[0].flatten(1).clone(), args[3]

    def chain():
        y = x
        for _ in range(12):
            y = layer_norm(y, x, weight, shift, 1e-5)
            y = gelu(y @ matrix, shift)  # cuBLAS between ours
            q = y.view(-1, 4, 64)
            y = attention.prechecked(q, q, q, rows, rows, None, 0.125).flatten(1)
            y.add_(1)
            z = layer_norm(y, None, weight, shift, 1e-5)
            del y  # its memory goes to the next result
            y = layer_norm(z, x, weight, shift, 1e-5)
        return y

    expected = chain()
    kernels.set_programmatic_launch(True)
    try:
        run = chain
        if in_graph:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = chain()
            run = lambda: graph.replay() or captured  # noqa: E731
        for _ in range(50):
            assert torch.equal(run(), expected)
    finally:
        kernels.set_programmatic_launch(native.wants_programmatic_launch())


def test_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    ours = attention.prechecked(*arguments("cuda:1"))
    assert ours.get_device() == 1 and torch.cuda.current_device() == 0 and torch.isfinite(ours).all()
    weight = torch.ones(64, device="cuda:0")
    with pytest.raises(ValueError, match="weight is"):
        layer_norm(torch.ones(3, 64, device="cuda:1"), None, weight, weight, 1e-5)


def test_a_device_that_is_not_there_names_the_kernel():
    with pytest.raises(RuntimeError, match="gelu: the CUDA kernel was not launched: invalid device ordinal"):
        native.kernels().gelu(0, 0, 0, 8, 8, 1, 8, 0, 0, 99, 0)


def test_long_notes_at_full_size():
    q, k, v = torch.randn(4096, 3, 12, 64, device="cuda", dtype=torch.bfloat16).unbind(1)
    cu_seqlens = boundaries([4096]).cuda()
    ours = attention.prechecked(q, k, v, cu_seqlens, cu_seqlens, None, 0.125)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in heads))[0].transpose(0, 1)
    stock = torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
    error, stock_error = ((y.float() - exact).square().mean().sqrt() for y in (ours, stock))
    assert error <= 2 * stock_error
