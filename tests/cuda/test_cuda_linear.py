import pytest
import torch
from helpers import assert_within_budget

from clinfast.backends.cuda import native
from clinfast.backends.cuda.linear import LibraryLinear, OwnLinear
from clinfast.ops import linear as op


def prepacked(machine, x, weight, bias, activation, residual):
    linear = LibraryLinear(machine.there(weight), machine.there(bias), x.dtype)
    return machine(linear, x, activation, residual)


@pytest.mark.parametrize("dtype", list(native.DTYPES))
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 8), (7, 33, 65), (20, 64, 256)])
def test_matches_reference(machine, rows, inputs, outputs, activation, dtype):
    g = torch.Generator().manual_seed(rows)
    x, weight, bias, residual = (
        torch.randn(shape, generator=g).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    for b, r in ((bias, None), (None, residual), (bias, residual)):
        stock = op.reference(x, weight, b, activation, r)
        exact = op.reference(*(t if t is None else t.double() for t in (x, weight, b)), activation,
                             None if r is None else r.double())  # fmt: skip
        assert_within_budget(prepacked(machine, x, weight, b, activation, r), stock, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_our_product_or_the_library_where_there_is_none(machine, residual, dtype, monkeypatch):
    """The emulation has no product by CUTLASS; a GPU of 8.0 to 9.0 has one, where the build had its headers."""
    if not machine.on_gpu:
        monkeypatch.setattr(native, "multiprocessors", lambda device: 4)
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) / 4 for s in ((70, 64), (256, 64), (256,)))
    other = torch.randn(70, 256, generator=g).to(dtype) if residual else None
    linear = OwnLinear(machine.there(weight), machine.there(bias), dtype)
    for activation in ("none", "gelu"):
        stock = op.reference(x, weight, bias, activation, other)
        exact = op.reference(*(t if t is None else t.double() for t in (x, weight, bias)), activation,
                             None if other is None else other.double())  # fmt: skip
        assert_within_budget(machine(linear, x, activation, other), stock, exact)


def test_bad_arguments_are_named(machine):
    linear = LibraryLinear(machine.there(torch.ones(4, 3)), None, torch.float32)
    for args, message in (
        ((torch.ones(2, 4),), r"x is \[2, 4\]"),
        ((torch.ones(2, 3, dtype=torch.float16),), "x is .*float16"),
        ((torch.ones(2, 3), "swish"), "activation='swish'"),
    ):
        with pytest.raises(ValueError, match=message):
            machine(linear, *args)
