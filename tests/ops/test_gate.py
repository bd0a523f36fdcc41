"""activation(first half) * second half: the op, and the linears that end in it."""

import pytest
import torch
from helpers import assert_within_budget, offset_view, opcheck, threads
from test_attention import DTYPES

from clinfast.backends import torch_variants as torch_backend
from clinfast.backends.cpu import linear as linears
from clinfast.backends.cpu.gate import gate as compiled
from clinfast.backends.torch import FallbackLinear
from clinfast.ops import gate as op
from clinfast.ops.linear import ACTIVATIONS, GatedLinear, activate, prepack

CALLS = {"cpu": compiled, "torch": torch_backend.gate}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [1, 7, 33, 96])
@pytest.mark.parametrize("call", CALLS)
def test_matches_reference(isa, outputs, activation, dtype, call):
    x = offset_view(normal(5, 2 * outputs, dtype=dtype) * 3)
    ours = CALLS[call](x, activation)
    assert_within_budget(ours, op.reference(x, activation), op.reference(x.double(), activation))


def test_silu_of_every_magnitude(isa):
    x = torch.cat([t * s for s in (1, -1) for t in (torch.logspace(-40, 38, 400), torch.tensor([0.0]))])
    exact = activate(x.double(), "silu")
    ours = compiled(torch.stack([x, torch.ones_like(x)], 1), "silu")[:, 0].double()
    small = exact.abs() < torch.finfo(torch.float32).tiny
    assert ((ours - exact).abs()[~small] <= 5e-7 * exact.abs()[~small]).all()
    assert (ours[small].abs() <= 2 * torch.finfo(torch.float32).tiny).all()
    odd = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])
    assert compiled(odd, "silu")[0].isnan() and compiled(odd, "silu")[1].isinf()


def gated_case(rows, inputs, outputs, dtype, bias):
    x, weight = normal(rows, inputs, dtype=dtype), normal(2 * outputs, inputs, seed=1, dtype=dtype) * inputs**-0.5
    return x, weight, normal(2 * outputs, seed=2, dtype=dtype) if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "none"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (33, 7), (80, 100), (768, 65), (40, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_that_end_in_it(isa, inputs, outputs, activation, dtype, bias):
    """Ours, and a plain product with the op behind it; halves meet in the same panel, the last of which is cut."""
    x, weight, shift = gated_case(70, inputs, outputs, dtype, bias)
    stock = op.reference(torch.nn.functional.linear(x, weight, shift), activation)
    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    exact = op.reference(torch.nn.functional.linear(*wide), activation)
    for packed in (
        linears.NativeLinear(weight, shift, dtype, gated=True),
        GatedLinear(FallbackLinear(weight, shift, dtype), compiled),
    ):
        assert (packed.in_features, packed.out_features) == (inputs, outputs)
        ours = packed(x, activation)
        assert ours.dtype is dtype and ours.is_contiguous()
        # The largest error is one draw from a tail; the mean one is not.
        assert_within_budget(ours, stock, exact, factor=4.0)
        errors = [(y.double() - exact).square().mean().sqrt() for y in (ours, stock)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 4 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(isa, dtype):
    x, weight, shift = gated_case(70, 64, 100, dtype, True)
    packed = linears.NativeLinear(weight, shift, dtype, gated=True)
    with threads(1):
        whole = packed(x, "gelu")
    with threads(2):
        assert torch.equal(packed(x, "gelu"), whole)
    assert all(torch.equal(packed(x[i : i + 1], "gelu"), whole[i : i + 1]) for i in (0, 33, 69))


@pytest.mark.parametrize("asked", ["clinfast", "onednn", "torch"])
def test_every_library_serves_gated_linears(monkeypatch, asked):
    monkeypatch.setenv("CLINFAST_CPU_LINEAR", asked)
    x, weight, shift = gated_case(9, 64, 96, torch.float32, True)
    packed = prepack(weight, shift, torch.float32, "cpu", gated=True)
    assert type(packed) is (linears.NativeLinear if asked == "clinfast" else GatedLinear)
    expected = op.reference(torch.nn.functional.linear(x, weight, shift), "gelu")
    torch.testing.assert_close(packed(x, "gelu"), expected, rtol=1e-5, atol=1e-5)
    out = torch.zeros(20, 96)
    rows = torch.tensor([3, 1, 19, 4, 5, 6, 7, 8, 9], dtype=torch.int32)
    if asked != "clinfast":
        packed.scatter(x, rows, out)
        assert torch.equal(out[rows.long()], packed(x))


def test_opcheck():
    opcheck("gate", (normal(3, 8), "silu"))


@pytest.mark.parametrize(
    ("x", "activation", "message"),
    [
        (torch.zeros(3, 7), "gelu", r"x is \[3, 7\]"),
        (torch.zeros(6), "gelu", r"x is \[6\]"),
        (torch.zeros(8, 3).T, "gelu", "contiguous rows"),
        (torch.zeros(3, 8, dtype=torch.float64), "gelu", "x has dtype torch.float64"),
        (torch.zeros(3, 8), "swish", "activation='swish' is unknown"),
    ],
)
def test_bad_arguments_are_named(x, activation, message):
    with pytest.raises(ValueError, match=message):
        op.gate(x, activation)


def test_gated_weights_have_two_rows_an_output():
    with pytest.raises(ValueError, match="a gated one has two rows an output"):
        linears.NativeLinear(torch.zeros(5, 4), None, torch.float32, gated=True)
    packed = linears.NativeLinear(torch.zeros(6, 4), None, torch.float32, gated=True)
    with pytest.raises(ValueError, match="a gated product takes no residual"):
        packed(torch.zeros(2, 4), "gelu", torch.zeros(2, 3))
