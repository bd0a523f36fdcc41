import pytest
import torch
from helpers import assert_within_budget, opcheck
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfast.backends.cpu import linear as compiled
from clinfast.ops import linear as op

DTYPES = [torch.float32, torch.bfloat16]
BERT_SHAPES = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (384, 1152), (384, 1536), (1536, 384), (768, 2)]


def case(rows, inputs, outputs, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, generator=g).to(dtype)
    residual = torch.randn(rows, outputs, generator=g).to(dtype)
    return x, weight, bias, residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_prepacked_matches_reference(dtype, backend, activation, with_residual):
    for rows, inputs, outputs in ((1, 3072, 768), (2, 33, 7), (130, 384, 1536)):
        x, weight, bias, residual = case(rows, inputs, outputs, dtype)
        residual = residual if with_residual else None
        packed = op.prepack(weight, bias, dtype, backend)
        stock = op.reference(x, weight, bias, activation, residual)
        exact = op.reference(
            x.double(), weight.double(), bias.double(), activation, None if residual is None else residual.double()
        )
        assert_within_budget(packed(x, activation, residual), stock, exact)
        assert packed.in_features == inputs and packed.out_features == outputs and packed.dtype is dtype


def test_the_library_serves_this_machine():
    assert compiled.serves(torch.float32)
    assert op.prepack(torch.eye(32), None, torch.float32).library == "oneDNN"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), BERT_SHAPES)
def test_a_row_has_the_same_bits_at_any_row_count(inputs, outputs, dtype):
    x, weight, bias, residual = case(300, inputs, outputs, dtype)
    packed = op.prepack(weight, bias, dtype)
    for activation, extra in (("none", None), ("gelu", None), ("tanh", None), ("none", residual)):
        whole = packed(x, activation, extra)
        for rows in (1, 2, 3, 5, 8, 17, 31, 64, 129):
            part = packed(x[:rows], activation, None if extra is None else extra[:rows])
            assert torch.equal(part, whole[:rows]), (activation, rows)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), inputs=st.integers(1, 90), outputs=st.integers(1, 90), bf16=st.booleans())
def test_any_shape(rows, inputs, outputs, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, weight, bias, residual = case(rows, inputs, outputs, dtype, seed=rows)
    packed = op.prepack(weight, bias, dtype)
    exact = op.reference(x.double(), weight.double(), bias.double(), "none", residual.double())
    assert_within_budget(packed(x, residual=residual), op.reference(x, weight, bias, "none", residual), exact)


def test_the_source_is_copied():
    x, weight, bias, _ = case(4, 64, 64, torch.float32)
    for backend in ("cpu", "torch"):
        packed = op.prepack(weight, bias, torch.float32, backend)
        before = packed(x)
        kept = weight.clone(), bias.clone()
        weight.zero_(), bias.zero_()
        assert torch.equal(packed(x), before)
        weight.copy_(kept[0]), bias.copy_(kept[1])


def test_opcheck():
    x, weight, bias, residual = case(3, 20, 8, torch.float32)
    opcheck("linear", (x, weight, bias, "gelu", residual))
    opcheck("linear", (x, weight, None))


def test_unknown_activation_is_named():
    x, weight, bias, _ = case(3, 20, 8, torch.float32)
    for backend in ("cpu", "torch"):
        with pytest.raises(ValueError, match="swish"):
            op.prepack(weight, bias, torch.float32, backend)(x, "swish")
