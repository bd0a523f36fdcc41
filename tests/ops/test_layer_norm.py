import pytest
import torch
from helpers import assert_within_budget, offset_view, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu.layer_norm import layer_norm as compiled
from clinfast.ops import layer_norm as op


def case(rows, hidden, dtype, residual, scale=1.0, shift=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, hidden, generator=g) * scale + shift).to(dtype)
    r = (torch.randn(rows, hidden, generator=g) * scale).to(dtype) if residual else None
    weight = torch.randn(hidden, generator=g)
    bias = torch.randn(hidden, generator=g)
    return x, r, weight, bias


def stock_and_exact(x, r, weight, bias, eps):
    stock = op.reference(x, r, weight.to(x.dtype), bias.to(x.dtype), eps)
    exact = op.reference(x.double(), None if r is None else r.double(), weight.double(), bias.double(), eps)
    return stock, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (2, 7), (5, 33), (17, 384), (64, 768), (3, 1023), (2, 8192)])
def test_matches_reference(isa, rows, hidden, residual, dtype):
    args = case(rows, hidden, dtype, residual)
    for backend in (compiled, torch_backend.layer_norm):
        assert_within_budget(backend(*args, 1e-12), *stock_and_exact(*args, 1e-12))


def test_large_mean_does_not_cancel(isa):
    args = case(4, 768, torch.float32, False, scale=1e-2, shift=1e3)
    assert_within_budget(compiled(*args, 1e-12), *stock_and_exact(*args, 1e-12))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), hidden=st.integers(1, 300), bf16=st.booleans(), seed=st.integers(0, 99))
def test_any_shape_from_offset_views(rows, hidden, bf16, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, r, weight, bias = case(rows, hidden, dtype, True, seed=seed)
    ours = compiled(offset_view(x), offset_view(r), weight, bias, 1e-5)
    assert torch.equal(ours, compiled(x, r, weight, bias, 1e-5))
    assert_within_budget(ours, *stock_and_exact(x, r, weight, bias, 1e-5))


def test_a_row_has_the_same_bits_in_any_batch():
    x, r, weight, bias = case(100, 768, torch.float32, True)
    whole = compiled(x, r, weight, bias, 1e-12)
    for i in (0, 37, 99):
        assert torch.equal(whole[i : i + 1], compiled(x[i : i + 1], r[i : i + 1], weight, bias, 1e-12))


def test_opcheck():
    x, r, weight, bias = case(3, 20, torch.float32, True)
    opcheck("layer_norm", (x, r, weight, bias, 1e-5))
    opcheck("layer_norm", (x, None, weight, bias, 1e-5))


def test_refuses_gradients():
    x, _, weight, bias = case(3, 20, torch.float32, False)
    with pytest.raises(RuntimeError, match="no gradient"):
        op.layer_norm(x.requires_grad_(), None, weight, bias, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 20, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(20)}, "2 dimensions"),
        ({"x": torch.zeros(20, 3).t()}, "contiguous"),
        ({"residual": torch.zeros(4, 20)}, "residual"),
        ({"weight": torch.zeros(19)}, "weight"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, r, weight, bias = case(3, 20, torch.float32, True)
    args = {"x": x, "residual": r, "weight": weight, "shift": bias, "eps": 1e-5, **change}
    with pytest.raises(ValueError, match=message):
        op.layer_norm(**args)
    op.layer_norm(x, r, weight, bias, 1e-5)
