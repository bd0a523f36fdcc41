import pytest
import torch
from helpers import assert_within_budget, offset_view

from clinfast.backends import fp8
from clinfast.backends.triton import fp8 as ours
from clinfast.ops import layer_norm


def assert_alike(found, expected):
    """A value that lies between two of e4m3 may go either way where fp32 arithmetic differs in its last bit."""
    (values, scale), (wanted, its_scale) = found, expected
    torch.testing.assert_close(scale, its_scale, rtol=1e-2, atol=1e-30)
    difference = (values.float() * scale - wanted.float() * its_scale).abs()
    step = (wanted.float().abs() * its_scale / 8).clamp_min(its_scale * 2.0**-9)
    assert (difference <= 1.2 * step).all()
    assert (difference > 0.05 * step).float().mean() < 0.05


@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (5, 768), (3, 1030)])
def test_quantise(dtype, rows, hidden):
    g = torch.Generator().manual_seed(rows)
    x = offset_view((torch.randn(rows, hidden, generator=g) * 3).to(dtype))
    for activation in ("none", "gelu", "gelu_tanh", "relu"):
        assert_alike(ours.quantise_rows(x, activation), fp8.quantise_rows(x, activation))


@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (5, 768), (3, 1030)])
def test_quantised_norm(dtype, rows, hidden):
    g = torch.Generator().manual_seed(rows)
    x, residual = (offset_view((torch.randn(rows, hidden, generator=g) * 3 + 5).to(dtype)) for _ in "ab")
    weight, shift = (torch.randn(hidden, generator=g) for _ in "ab")
    for second in (residual, None):
        y, *quantised = ours.quantised_norm(x, second, weight, shift, 1e-12)
        expected, *wanted = fp8.quantised_norm(x, second, weight, shift, 1e-12)
        exact = layer_norm.reference(x.double(), None if second is None else second.double(), weight, shift, 1e-12)
        assert_within_budget(y, expected, exact)
        assert_alike(quantised, wanted)


def test_rows_of_zeros():
    values, scale = ours.quantise_rows(torch.zeros(2, 64))
    assert (values.float() == 0).all() and scale.isfinite().all() and (scale > 0).all()
