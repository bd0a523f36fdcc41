"""The emulation itself: faults show, and its instructions do what the PTX manual says."""

import ctypes

import pytest
import torch
from emulation import build

FAULTS = ["none", "no_wait", "no_barrier", "no_barrier_after", "some_threads", "two_operations", "no_grid_wait"]


@pytest.fixture(scope="module")
def library():
    reason = build.missing()
    if reason is not None:
        pytest.skip(f"no host emulation: {reason}")
    return ctypes.CDLL(str(build.library(build.HERE / "faults.cpp")))


def exchange(library, fault, reverse):
    """Whether the emulation stopped, and whether the result is right."""
    x, y = torch.arange(1.0, 129.0), torch.full((64,), -1.0)
    stopped = library.run_exchange(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), FAULTS.index(fault), reverse
    )
    expected = x.view(2, 2, 32).flip(1).sum(0).flatten()
    return bool(stopped), torch.equal(y, expected)


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_kernel_without_a_fault(library, reverse):
    assert exchange(library, "none", reverse) == (False, True)


@pytest.mark.parametrize("fault", ["no_wait", "no_barrier", "no_barrier_after"])
def test_a_missing_wait_or_barrier_shows_in_one_order_of_threads(library, fault):
    outcomes = [exchange(library, fault, reverse) for reverse in (0, 1)]
    assert not any(stopped for stopped, _ in outcomes) and not all(right for _, right in outcomes)


@pytest.mark.parametrize("fault", ["some_threads", "two_operations"])
@pytest.mark.parametrize("reverse", [0, 1])
def test_a_barrier_that_some_do_not_reach_stops(library, fault, reverse):
    assert exchange(library, fault, reverse)[0]
    assert exchange(library, "none", reverse) == (False, True)  # and the next launch is sound


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_thread_that_does_not_wait_for_earlier_grids_stops(library, reverse):
    """What programmatic dependent launch rests on."""
    assert exchange(library, "no_grid_wait", reverse)[0]


def test_the_product_of_a_warp(library):
    a, b = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 8))
    c = torch.empty(16, 8)
    library.run_multiply(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)))
    torch.testing.assert_close(c, a.float() @ b.float().t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_torchs(dtype):
    """Through a kernel that only converts: unpack from fp32."""
    from clinfast.backends.cuda import native
    from clinfast.backends.cuda.packing import unpack_prechecked

    if build.missing() is not None:
        pytest.skip(f"no host emulation: {build.missing()}")
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 6.1e-5, 5.96e-8, 2.9e-8, 3.0e-8, 3.39e38, 0.0, -0.0])
    x = torch.cat([bits.int().view(torch.float32), edges, torch.randn(20000) * 100])
    x = x[torch.isfinite(x)][None]
    with pytest.MonkeyPatch.context() as patch:
        kernels = build.load()
        patch.setattr(native, "_load", lambda: (kernels, None))
        patch.setattr(native, "_raw_stream", lambda device: 0)
        patch.setattr(native, "ON_CUDA", False)
        native.on.cache_clear()
        ours = unpack_prechecked(x, torch.zeros(1, dtype=torch.int32), 1, dtype)
        native.on.cache_clear()
    assert torch.equal(ours.view(torch.int16), x.to(dtype).view(torch.int16))
