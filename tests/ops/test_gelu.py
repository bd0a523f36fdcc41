import math

import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view, opcheck, threads
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu import native
from clinfast.backends.cpu.gelu import gelu as compiled
from clinfast.ops import gelu as op

DTYPES = [torch.float32, torch.bfloat16]


def case(rows, hidden, dtype, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, hidden, generator=g) * 3).to(dtype)
    return x, torch.randn(hidden, generator=g) if bias else None


def exact_gelu(x, approximate):
    """In fp64, with nothing that cancels on the negative tail."""
    x = x.double()
    if approximate == "none":
        return 0.5 * x * torch.special.erfc(-x * math.sqrt(0.5))
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (2, 7), (5, 33), (17, 1536), (3, 1023)])
def test_matches_reference(isa, rows, hidden, dtype, bias, approximate):
    x, b = case(rows, hidden, dtype, bias)
    stock = op.reference(x, b, approximate)
    exact = op.reference(x.double(), b, approximate)
    for backend in (compiled, torch_backend.gelu):
        assert_within_budget(backend(x, b, approximate), stock, exact)


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
def test_every_finite_bf16(isa, approximate):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[torch.isfinite(x)][None]
    exact = exact_gelu(x, approximate)
    error = (compiled(x, None, approximate).double() - exact).abs()
    # One rounding of bf16 is 2^-8 of the value; below the least normal number, nothing is promised.
    least = torch.finfo(torch.bfloat16).tiny
    assert (error <= 2**-8 * exact.abs() + least).all()
    stock_error = (torch.nn.functional.gelu(x, approximate=approximate).double() - exact).abs()
    near = (x > -5) & (x < 100)
    assert error[near].max() <= 1.1 * stock_error[near].max()


@pytest.mark.parametrize("approximate", op.APPROXIMATIONS)
def test_dense_fp32_sweep(isa, approximate):
    x = torch.cat([torch.linspace(-15, 15, 400_001), -torch.logspace(-38, 1, 50_000), torch.logspace(-38, 38, 50_000)])
    x = x[None]
    exact = exact_gelu(x, approximate)
    ours = compiled(x, None, approximate).double()
    stock = torch.nn.functional.gelu(x, approximate=approximate).double()

    def relative(y, where):
        return ((y - exact).abs() / exact.abs())[where].max().item()

    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    positive, negative = normal & (x > 0) & (x < 1e30), normal & (x < 0)
    assert relative(ours, positive) <= 2 * relative(stock, positive)
    # Stock cancels here: its relative error grows from 3e-6 at -2 to 1 at -6.
    for low, high in ((-2, 0), (-4, -2), (-15, -4)):
        where = negative & (x >= low) & (x <= high)
        assert relative(ours, where) <= relative(stock, where)
    assert relative(ours, negative) <= (7e-7 if approximate == "none" else 2e-5)
    assert ((ours - exact).abs()[~normal] <= 1e-42).all()


def test_values_that_are_not_finite(isa):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38] * 4])
    for dtype in DTYPES:
        for approximate in op.APPROXIMATIONS:
            y = compiled(x.to(dtype), None, approximate)[0]
            assert torch.isnan(y[0::6]).all()
            assert torch.equal(y[1::6], x.to(dtype)[0, 1::6])
            assert (y[2::6] == 0).all() and (y[3::6] == 0).all() and (y[5::6] == 0).all()
            assert torch.equal(y[4::6], x.to(dtype)[0, 4::6])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 20), hidden=st.integers(0, 300), bf16=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_from_offset_views(rows, hidden, bf16, seed):
    x, bias = case(rows, hidden, DTYPES[bf16], seed=seed)
    ours = compiled(offset_view(x), bias)
    assert torch.equal(ours, compiled(x, bias))
    assert_within_budget(ours, op.reference(x, bias), op.reference(x.double(), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 15, 16, 37])
def test_writes_nothing_outside_the_result(isa, hidden, dtype):
    x, bias = case(5, hidden, dtype)
    big = torch.full((7, hidden + 6), SENTINEL, dtype=dtype)
    out = big[1:-1, 3:-3]
    native.kernels().gelu(
        x.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        hidden,
        hidden + 6,
        5,
        hidden,
        0,
        native.DTYPES[dtype],
        2,
    )
    assert torch.equal(out, compiled(x, bias))
    out.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(isa, dtype):
    x, bias = case(100, 768, dtype)
    with threads(1):
        one = compiled(x, bias)
    with threads(2):
        assert torch.equal(one, compiled(x, bias))
    for i in (0, 37, 99):
        assert torch.equal(one[i : i + 1], compiled(x[i : i + 1], bias))


def test_opcheck():
    x, bias = case(3, 20, torch.float32)
    opcheck("gelu", (x, bias))
    opcheck("gelu", (x.bfloat16(), None, "tanh"))


def test_refuses_gradients():
    x, bias = case(3, 20, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        op.gelu(x.requires_grad_(), bias)


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
def test_bad_arguments_are_named(change, message):
    x, bias = case(3, 20, torch.float32)
    op.gelu(x, bias, "none")
    with pytest.raises(ValueError, match=message):
        op.gelu(**{"x": x, "bias": bias, "approximate": "none", **change})
