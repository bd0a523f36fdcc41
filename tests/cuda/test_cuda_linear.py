import pytest
import torch
from helpers import assert_within_budget

from clinfast.backends.cuda import native
from clinfast.backends.cuda.linear import LibraryLinear
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


def test_bad_arguments_are_named(machine):
    linear = LibraryLinear(machine.there(torch.ones(4, 3)), None, torch.float32)
    for args, message in (
        ((torch.ones(2, 4),), r"x is \[2, 4\]"),
        ((torch.ones(2, 3, dtype=torch.float16),), "x is .*float16"),
        ((torch.ones(2, 3), "swish"), "activation='swish'"),
    ):
        with pytest.raises(ValueError, match=message):
            machine(linear, *args)
