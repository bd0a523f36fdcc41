import math

import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gelu import case, exact_gelu

from clinfast.backends.cuda import native
from clinfast.backends.cuda.gelu import gelu
from clinfast.ops import gelu as op

DTYPES = list(native.DTYPES)


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (2, 7), (5, 33), (9, 1536), (3, 1023)])
def test_matches_reference(machine, rows, hidden, dtype, bias, approximate):
    x, b = case(rows, hidden, dtype, bias)
    ours = machine(gelu, x, b, approximate)
    assert_within_budget(ours, op.reference(x, b, approximate), op.reference(x.double(), b, approximate))


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_16_bit_value(machine, dtype, approximate):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)][None]
    exact = exact_gelu(x, approximate)
    error = (machine(gelu, x, None, approximate).double() - exact).abs()
    # One rounding is half of eps relative to the value, and half of the least subnormal near zero; the arithmetic may
    # add a tenth of that.
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps, 2.0**-149)
    assert (error <= 1.1 * (info.eps / 2 * exact.abs() + least / 2) + 1e-42).all()


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
def test_dense_fp32_sweep(machine, approximate):
    x = torch.cat([torch.linspace(-15, 15, 60_001), -torch.logspace(-38, 1, 8_000), torch.logspace(-38, 38, 8_000)])
    x = x[None]
    exact = exact_gelu(x, approximate)
    ours = machine(gelu, x, None, approximate).double()
    stock = torch.nn.functional.gelu(x, approximate=approximate).double()

    def relative(y, where):
        return ((y - exact).abs() / exact.abs())[where].max().item()

    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    positive, negative = normal & (x > 0) & (x < 1e30), normal & (x < 0)
    assert relative(ours, positive) <= 2 * relative(stock, positive)
    for low, high in ((-2, 0), (-4, -2), (-15, -4)):
        where = negative & (x >= low) & (x <= high)
        assert relative(ours, where) <= relative(stock, where)
    assert relative(ours, negative) <= (1e-6 if approximate == "none" else 2e-5)
    assert ((ours - exact).abs()[~normal] <= 1e-42).all()


def test_values_that_are_not_finite(machine):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, 6e4, -6e4] * 4])
    for dtype in DTYPES:
        for approximate in op.APPROXIMATIONS:
            y = machine(gelu, x.to(dtype), None, approximate)[0]
            assert torch.isnan(y[0::6]).all()
            assert torch.equal(y[1::6], x.to(dtype)[0, 1::6])
            assert (y[2::6] == 0).all() and (y[3::6] == 0).all() and (y[5::6] == 0).all()
            assert torch.equal(y[4::6], x.to(dtype)[0, 4::6])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 20), hidden=st.integers(0, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape_from_offset_views(machine, rows, hidden, dtype, seed):
    x, bias = case(rows, hidden, dtype, seed=seed)
    ours = machine(gelu, offset_view(x), bias)
    assert torch.equal(ours, machine(gelu, x, bias))
    assert_within_budget(ours, op.reference(x, bias), op.reference(x.double(), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 15, 16, 37])
def test_writes_nothing_outside_the_result(machine, hidden, dtype):
    x, bias = (machine.there(t) for t in case(5, hidden, dtype))
    big = machine.there(torch.full((7, hidden + 6), SENTINEL, dtype=dtype))
    out = big[1:-1, 3:-3]
    machine.kernels.gelu(
        x.data_ptr(), bias.data_ptr(), out.data_ptr(), hidden, hidden + 6, 5, hidden, 0, native.DTYPES[dtype],
        *machine.device_and_stream(),
    )  # fmt: skip
    assert torch.equal(out, gelu(x, bias))
    out.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


def test_a_launch_that_fails_names_the_kernel(machine):
    with pytest.raises(RuntimeError, match=r"gelu: the CUDA kernel was not launched: .* \(error 1\)"):
        machine.kernels.gelu(0, 0, 0, 8, 8, 2**40, 8, 0, 0, *machine.device_and_stream())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 20, dtype=torch.float64)}, "x has dtype torch.float64"),
        ({"x": torch.zeros(20)}, "x has shape"),
        ({"x": torch.zeros(20, 3).t()}, "x has strides"),
        ({"bias": torch.zeros(19)}, "bias"),
        ({"bias": torch.zeros(20, dtype=torch.bfloat16)}, "bias"),
        ({"bias": torch.zeros(40)[::2]}, "bias"),
        ({"approximate": "sigmoid"}, "approximate is 'sigmoid'"),
    ],
)
def test_bad_arguments_are_named(machine, change, message):
    x, bias = case(3, 20, torch.float32)
    machine(gelu, x, bias, "none")
    with pytest.raises(ValueError, match=message):
        machine(gelu, **{"x": x, "bias": bias, "approximate": "none", **change})
