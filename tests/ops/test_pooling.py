import math

import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view, opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu import native
from clinfast.backends.cpu.pooling import pooling as compiled
from clinfast.ops import pooling as op

DTYPES = [torch.float32, torch.bfloat16]


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(lengths, hidden, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(sum(lengths), hidden, generator=g) + 0.5).to(dtype), boundaries(lengths)


@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [7, 0, 129, 2], [512, 64, 1, 8, 9, 300]])
@pytest.mark.parametrize("hidden", [1, 33, 384, 1023])
def test_matches_reference(isa, lengths, hidden, dtype, kind):
    x, cu_seqlens = case(lengths, hidden, dtype)
    stock, exact = op.reference(x, cu_seqlens, kind), op.reference(x.double(), cu_seqlens, kind)
    for backend in (compiled, torch_backend.pooling):
        ours = backend(x, cu_seqlens, kind)
        assert_within_budget(ours, stock, exact)
        if kind != "mean":
            assert torch.equal(ours, stock)


def test_the_mean_of_a_long_note_keeps_its_precision(isa):
    x, cu_seqlens = case([8000], 48)
    exact = op.reference(x.double() + 100, cu_seqlens, "mean")
    x += 100
    assert_within_budget(compiled(x, cu_seqlens, "mean"), op.reference(x, cu_seqlens, "mean"), exact)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    hidden=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(op.KINDS),
    seed=st.integers(0, 99),
)
def test_any_lengths_from_offset_views(isa, lengths, hidden, dtype, kind, seed):
    x, cu_seqlens = case(lengths, hidden, dtype, seed)
    ours = compiled(offset_view(x), cu_seqlens, kind)
    assert torch.equal(ours, compiled(x, cu_seqlens, kind))
    assert_within_budget(ours, op.reference(x, cu_seqlens, kind), op.reference(x.double(), cu_seqlens, kind))
    assert (ours[[i for i, n in enumerate(lengths) if n == 0]] == 0).all()


@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(isa, kind, dtype):
    lengths = [200, 3, 129, 64]
    x, cu_seqlens = case(lengths, 770, dtype)
    with threads(1):
        whole = compiled(x, cu_seqlens, kind)
    with threads(2):
        assert torch.equal(whole, compiled(x, cu_seqlens, kind))
    for note, length in enumerate(lengths):
        alone = x[cu_seqlens[note] : cu_seqlens[note + 1]].contiguous()
        assert torch.equal(whole[note : note + 1], compiled(alone, boundaries([length]), kind))


def test_a_nan_comes_through(isa):
    for at in (0, 3, 19):
        x = torch.ones(20, 40)
        x[at, 5] = math.nan
        x[at, 7] = -math.inf
        for kind in ("mean", "max"):
            y = compiled(x, boundaries([20]), kind)[0]
            assert torch.isnan(y[5]) and torch.isnan(y).sum() == 1
            assert y[7] == (1 if kind == "max" else -math.inf)


def test_the_maximum_of_negative_values(isa):
    x = torch.full((3, 20), -math.inf)
    assert torch.equal(compiled(x, boundaries([3]), "max"), x[:1])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_writes_nothing_outside_the_result(isa, kind):
    x, cu_seqlens = case([5, 0, 9], 300)
    big = torch.full((5, 306), SENTINEL)
    out = big[1:-1, 3:-3]
    native.kernels().pooling(x.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr(), 300, 306, 3, 14, 300, kind, 0, 2)
    assert torch.equal(out, compiled(x, cu_seqlens, op.KINDS[kind]))
    out.fill_(SENTINEL)
    assert (big == SENTINEL).all()


def test_opcheck():
    x, cu_seqlens = case([3, 0, 2], 20)
    for kind in op.KINDS:
        opcheck("pooling", (x, cu_seqlens, kind))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 20, dtype=torch.float64)}, "x has dtype"),
        ({"x": torch.zeros(20, 5).t()}, "x has strides"),
        ({"x": torch.zeros(100)}, "x has shape"),
        ({"kind": "min"}, "kind is 'min'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is .* torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "note 0 the rows 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5], dtype=torch.int32)}, "note 1 the rows 3 to 2"),
        ({"cu_seqlens": torch.tensor([-1, 3], dtype=torch.int32)}, "note 0 the rows -1 to 3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, cu_seqlens = case([3, 2], 20)
    args = {"x": x, "cu_seqlens": cu_seqlens, "kind": "max"}
    op.pooling(**args)
    with pytest.raises(ValueError, match=message):
        op.pooling(**{**args, **change})
