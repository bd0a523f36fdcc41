import itertools
import math

import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pooling import boundaries, case

from clinfast.backends.cuda import native
from clinfast.backends.cuda.pooling import pooling, prechecked
from clinfast.ops import pooling as op

DTYPES = list(native.DTYPES)


@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [7, 0, 129, 2], [8, 9]])
@pytest.mark.parametrize("hidden", [1, 33, 384, 1023])
def test_matches_reference(machine, lengths, hidden, dtype, kind):
    x, cu_seqlens = case(lengths, hidden, dtype)
    stock, exact = op.reference(x, cu_seqlens, kind), op.reference(x.double(), cu_seqlens, kind)
    ours = machine(pooling, x, cu_seqlens, kind)
    assert_within_budget(ours, stock, exact)
    if kind != "mean":
        assert torch.equal(ours, stock)


def test_the_mean_of_a_long_note_keeps_its_precision(machine):
    x, cu_seqlens = case([8000], 8)
    exact = op.reference(x.double() + 100, cu_seqlens, "mean")
    x += 100
    assert_within_budget(machine(pooling, x, cu_seqlens, "mean"), op.reference(x, cu_seqlens, "mean"), exact)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4),
    hidden=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(op.KINDS),
    seed=st.integers(0, 99),
)
def test_any_lengths_from_offset_views(machine, lengths, hidden, dtype, kind, seed):
    x, cu_seqlens = case(lengths, hidden, dtype, seed)
    ours = machine(pooling, offset_view(x), cu_seqlens, kind)
    assert torch.equal(ours, machine(pooling, x, cu_seqlens, kind))
    assert_within_budget(ours, op.reference(x, cu_seqlens, kind), op.reference(x.double(), cu_seqlens, kind))
    assert (ours[[i for i, n in enumerate(lengths) if n == 0]] == 0).all()


@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(machine, kind, dtype):
    lengths = [50, 3, 29, 64]
    x, cu_seqlens = case(lengths, 70, dtype)
    whole = machine(pooling, x, cu_seqlens, kind)
    for note, length in enumerate(lengths):
        alone = x[cu_seqlens[note] : cu_seqlens[note + 1]].contiguous()
        assert torch.equal(whole[note : note + 1], machine(pooling, alone, boundaries([length]), kind))


def test_a_nan_comes_through(machine):
    for at in (0, 3, 19):
        x = torch.ones(20, 40)
        x[at, 5] = math.nan
        x[at, 7] = -math.inf
        for kind in ("mean", "max"):
            y = machine(pooling, x, boundaries([20]), kind)[0]
            assert torch.isnan(y[5]) and torch.isnan(y).sum() == 1
            assert y[7] == (1 if kind == "max" else -math.inf)


def test_the_maximum_of_negative_values(machine):
    x = torch.full((3, 20), -math.inf)
    assert torch.equal(machine(pooling, x, boundaries([3]), "max"), x[:1])


@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("bad", [[0, 6], [0, 3, 2, 5], [-1, 3]])
def test_a_note_whose_rows_are_not_there_is_nan(machine, kind, bad):
    x, _ = case([5], 20)
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    ours = machine(prechecked, x, cu_seqlens, kind)
    wrong = [not 0 <= a <= b <= 5 for a, b in itertools.pairwise(bad)]
    assert torch.isnan(ours[wrong]).all() and torch.isfinite(ours[[not w for w in wrong]]).all()
    note = wrong.index(True)
    with pytest.raises(ValueError, match=f"note {note} the rows {bad[note]} to {bad[note + 1]}"):
        machine(pooling, x, cu_seqlens, kind)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_writes_nothing_outside_the_result(machine, kind):
    x, cu_seqlens = (machine.there(t) for t in case([5, 0, 9], 300))
    big = machine.there(torch.full((5, 306), SENTINEL))
    out = big[1:-1, 3:-3]
    machine.kernels.pooling(
        x.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr(), 300, 306, 3, 14, 300, kind, 0,
        *machine.device_and_stream(),
    )  # fmt: skip
    assert torch.equal(out, pooling(x, cu_seqlens, op.KINDS[kind]))
    out.fill_(SENTINEL)
    assert (big == SENTINEL).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 20, dtype=torch.float64)}, "x has dtype"),
        ({"x": torch.zeros(20, 5).t()}, "x has strides"),
        ({"x": torch.zeros(100)}, "x has shape"),
        ({"kind": "min"}, "kind is 'min'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is .* torch.int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens has shape"),
    ],
)
def test_bad_arguments_are_named(machine, change, message):
    x, cu_seqlens = case([3, 2], 20)
    args = {"x": x, "cu_seqlens": cu_seqlens, "kind": "max"}
    machine(pooling, **args)
    with pytest.raises(ValueError, match=message):
        machine(pooling, **{**args, **change})
