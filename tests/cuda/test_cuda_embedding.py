import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_embedding import NAMES, POSITIONS, VOCAB, case, stock_and_exact

from clinfast.backends.cuda import native
from clinfast.backends.cuda.embedding import embedding, prechecked
from clinfast.ops import embedding as op

DTYPES = list(native.DTYPES)
SHAPES = [(1, 1, 1), (2, 7, 33), (2, 5, 384), (1, 6, 1023), (1, 3, 1032)]


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(("batch", "seqlen", "hidden"), SHAPES)
def test_matches_reference(machine, batch, seqlen, hidden, table_dtype, out_dtype):
    for types, table, placed in ((True, True, False), (False, True, True), (True, False, False), (False, False, True)):
        args = case(batch, seqlen, hidden, table_dtype, types, table, keep=1, out=out_dtype, placed=placed)
        ours = machine(embedding, *args)
        assert ours.dtype == out_dtype
        assert_within_budget(ours, *stock_and_exact(args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [33, 384, 1032])
def test_without_a_layer_norm_it_is_the_sum(machine, hidden, dtype):
    for table, placed, out in ((True, True, torch.float32), (False, False, torch.bfloat16)):
        args = case(2, 9, hidden, dtype, table=table, out=out, placed=placed)
        args[7] = args[8] = None
        tables = [None if a is None else a.float() for a in args[4:7]]
        assert torch.equal(machine(embedding, *args), op.reference(*args[:4], *tables, *args[7:]))
    args[7] = torch.ones(hidden)
    with pytest.raises(ValueError, match="one of weight and shift is None"):
        machine(embedding, *args)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 4),
    seqlen=st.integers(0, 30),
    hidden=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    narrow=st.booleans(),
    transposed=st.booleans(),
    offset=st.integers(0, POSITIONS - 30),
    placed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch_from_offset_views(machine, batch, seqlen, hidden, dtype, narrow, transposed, offset, placed, seed):
    args = case(batch, seqlen, hidden, dtype, offset=offset, placed=placed, seed=seed)
    views = list(args)
    for i in (4, 5, 6):
        views[i] = offset_view(args[i])
    for i in (0, 1):
        ids = args[i].int() if narrow else args[i]
        views[i] = ids.t().contiguous().t() if transposed else offset_view(ids) if batch else ids
    ours = machine(embedding, *views)
    assert torch.equal(ours, machine(embedding, *args))
    assert_within_budget(ours, *stock_and_exact(args))


@pytest.mark.parametrize("hidden", [20, 768])
@pytest.mark.parametrize("which", ["input_ids", "token_type_ids", "position_ids", "indices"])
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_a_token_outside_a_table_is_nan_and_the_others_are_not(machine, which, bad, hidden):
    args = dict(zip(NAMES, case(2, 6, hidden, keep=1, placed=True), strict=True))
    whole = machine(embedding, **args)
    values = args[which].clone()
    values.view(-1)[7] = bad
    ours = machine(prechecked, **{**args, which: values})
    assert torch.isnan(ours[7]).all()
    others = torch.arange(12) != 7
    assert torch.equal(ours[others], whole[others])
    names = {"token_type_ids": "token_type_ids at row 1, column 1", "position_ids": "the position at row 1, column 1"}
    names |= {"input_ids": "input_ids at row 1, column 1", "indices": r"indices\[7\]"}
    with pytest.raises(IndexError, match=f"{names[which]} is {bad}"):
        machine(embedding, **{**args, which: values})


def test_positions_past_the_table_are_nan(machine):
    args = case(1, 6, 40, offset=POSITIONS - 4, keep=1)
    ours = machine(prechecked, *args)
    assert torch.isfinite(ours[:4]).all() and torch.isnan(ours[4:]).all()


def test_writes_nothing_outside_the_result(machine):
    for dtype in DTYPES:
        args = case(2, 5, 40, dtype, keep=1)
        ids, types, indices, _, word, position, token_type, weight, shift = (
            None if t is None else machine.there(t) for t in args[:9]
        )
        big = machine.there(torch.full((12, 46), SENTINEL, dtype=dtype))
        out = big[1:-1, 3:-3]
        code = native.DTYPES[dtype]
        machine.kernels.embedding(
            ids.data_ptr(), types.data_ptr(), 5, 1, 5, 1, 8, 8, indices.data_ptr(), 0, 2, 5, 10, 40, 0,
            word.data_ptr(), position.data_ptr(), token_type.data_ptr(), 40, 40, 40, VOCAB, POSITIONS, 2,
            weight.data_ptr(), shift.data_ptr(), out.data_ptr(), 46, args[9], code, code,
            *machine.device_and_stream(),
        )  # fmt: skip
        assert torch.equal(out.cpu(), machine(embedding, *args))
        out.fill_(SENTINEL)
        assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word": torch.zeros(VOCAB, 20, dtype=torch.float64)}, "word has dtype"),
        ({"position": torch.zeros(POSITIONS, 21)}, "position has rows of 21"),
        ({"token_type": torch.zeros(2, 20, dtype=torch.float16)}, "token_type has dtype"),
        ({"input_ids": torch.zeros(2, 5)}, "input_ids has dtype torch.float32"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}, "token_type_ids has shape"),
        ({"indices": torch.zeros(4, dtype=torch.int64)}, "indices is"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, "position_ids is"),
        ({"weight": torch.zeros(21)}, "weight is"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_bad_arguments_are_named(machine, change, message):
    args = dict(zip(NAMES, case(2, 5, 20), strict=True))
    machine(embedding, **args)
    with pytest.raises(ValueError, match=message):
        machine(embedding, **{**args, **change})
