import pytest
import torch
from helpers import assert_within_budget, offset_view
from test_linear import case, exact_of

from clinfast.backends.triton import launch
from clinfast.backends.triton.linear import FIXED_ROWS, FixedLinear, GpuLinear
from clinfast.ops import linear as op
from clinfast.triton_kernels import configs
from clinfast.triton_kernels.configs import Linear

SMALL = Linear(32, 32, 32, 2, 4, 2, False)


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_product_matches_reference(card, dtype, activation, with_residual):
    for rows, inputs, outputs in ((1, 64, 48), (77, 96, 136), (40, 33, 7)):
        x, weight, bias, residual = case(rows, inputs, outputs, dtype)
        residual = residual if with_residual else None
        linear = GpuLinear(weight, bias, dtype)
        tiles = SMALL._replace(tma=card >= (9, 0))
        stock = op.reference(x, weight, bias, activation, residual)
        ours = linear.product(x, activation, residual, tiles)
        assert_within_budget(ours, stock, exact_of(x, weight, bias, activation, residual))


def test_product_of_offset_views(dtype):
    x, weight, bias, residual = case(50, 64, 40, dtype)
    linear = GpuLinear(weight, bias, dtype)
    ours = linear.product(offset_view(x), "gelu", offset_view(residual), SMALL)
    assert torch.equal(ours, linear.product(x, "gelu", residual, SMALL))


def test_tables_tiles_and_the_library(card, monkeypatch):
    """Fused activations run on our kernel, the rest on the library; the variable overrides it."""
    x, weight, bias, residual = case(70, 96, 160, torch.float16)
    linear = GpuLinear(weight, bias, torch.float16)
    assert linear.library == "Triton, cuBLAS"
    counts = launch.launches["jit"]
    linear(x)
    linear(x, "none", residual)
    assert launch.launches["jit"] == counts
    exact = exact_of(x, weight, bias, "gelu", None)
    assert_within_budget(linear(x, "gelu"), op.reference(x, weight, bias, "gelu"), exact)
    assert launch.launches["jit"] == counts + 1
    monkeypatch.setenv("CLINFAST_GPU_LINEAR", "torch")
    assert torch.equal(linear(x, "gelu"), op.reference(x, weight, bias, "gelu"))
    monkeypatch.setenv("CLINFAST_GPU_LINEAR", "cuda")
    with pytest.raises(ValueError, match="CLINFAST_GPU_LINEAR is 'cuda'"):
        linear(x, "gelu")


def test_a_row_has_the_same_bits_whatever_stands_beside_it():
    x, weight, bias, _ = case(90, 64, 40, torch.float16)
    linear = GpuLinear(weight, bias, torch.float16)
    whole = linear.product(x, "gelu", None, SMALL)
    for rows in (1, 2, 33, 64):
        assert torch.equal(linear.product(x[:rows], "gelu", None, SMALL), whole[:rows])


def test_scatter():
    x, weight, bias, _ = case(600, 32, 9, torch.float32)
    rows = torch.randperm(700)[:600].int()
    out = torch.full((700, 9), 7.0)
    GpuLinear(weight, bias, torch.float32).scatter(x, rows, out)
    expected = torch.full((700, 9), 7.0)
    expected[rows.long()] = op.reference(x, weight, bias)
    torch.testing.assert_close(out, expected)


def test_prepack_copies_and_names_bad_arguments():
    x, weight, bias, residual = case(5, 32, 9, torch.float32)
    linear = op.prepack(weight, bias, torch.float32)
    assert isinstance(linear, GpuLinear)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)
    for args, message in (
        ((x[:, :7],), "x is"), ((x.half(),), "x is"), ((x, "swish"), "activation='swish'"),
        ((x, "none", residual[:2]), "residual is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            linear(*args)


def test_nothing_in_nothing_out():
    _, weight, bias, _ = case(1, 32, 9, torch.float16)
    assert GpuLinear(weight, bias, torch.float16)(torch.empty(0, 32, dtype=torch.float16), "gelu").shape == (0, 9)


def test_fixed_tiles_at_every_number_of_rows(card, dtype, monkeypatch):
    monkeypatch.setattr(configs, "linear", lambda *shape: SMALL if shape[-1] == FIXED_ROWS else None)
    x, weight, bias, residual = case(90, 64, 40, dtype)
    linear = FixedLinear(weight, bias, dtype)
    for activation in ("none", "gelu", "tanh"):
        whole = linear(x, activation, residual)
        stock = op.reference(x, weight, bias, activation, residual)
        assert_within_budget(whole, stock, exact_of(x, weight, bias, activation, residual))
        for rows in (1, 2, 33, 64):
            assert torch.equal(linear(x[:rows], activation, residual[:rows]), whole[:rows])
