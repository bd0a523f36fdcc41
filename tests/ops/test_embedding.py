import pytest
import torch
from helpers import SENTINEL, assert_within_budget, offset_view, opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu import native
from clinfast.backends.cpu.embedding import embedding as compiled
from clinfast.ops import embedding as op

VOCAB, POSITIONS, TYPES, EPS = 40, 64, 2, 1e-12
DTYPES = [torch.float32, torch.bfloat16]
NAMES = (
    "input_ids", "token_type_ids", "indices", "position_ids", "word", "position", "token_type", "weight", "shift",
    "eps", "position_offset", "dtype",
)  # fmt: skip


def case(
    batch, seqlen, hidden, dtype=torch.float32, types=True, table=True, offset=0, keep=0.7, seed=0, out=None,
    placed=False,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, seqlen), generator=g)
    type_ids = torch.randint(0, TYPES, (batch, seqlen), generator=g) if types else None
    indices = (torch.rand(batch * seqlen, generator=g) < keep).nonzero().flatten().int()
    word, position, token_type = (
        torch.randn(rows, hidden, generator=g).to(dtype) for rows in (VOCAB, POSITIONS, TYPES)
    )
    weight, shift = torch.randn(hidden, generator=g), torch.randn(hidden, generator=g)
    token_type = token_type if table else None
    positions = torch.randint(0, POSITIONS, (batch, seqlen), generator=g, dtype=torch.int32) if placed else None
    return [ids, type_ids, indices, positions, word, position, token_type, weight, shift, EPS, offset, out or dtype]


def stock_and_exact(args):
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return op.reference(*args), op.reference(*exact[:-1], torch.float64)


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(("batch", "seqlen", "hidden"), [(1, 1, 1), (2, 7, 33), (3, 50, 384), (1, 60, 1023)])
def test_matches_reference(isa, batch, seqlen, hidden, table_dtype, out_dtype):
    for types, table, placed in ((True, True, False), (False, True, True), (True, False, False), (False, False, True)):
        args = case(batch, seqlen, hidden, table_dtype, types, table, keep=1, out=out_dtype, placed=placed)
        for backend in (compiled, torch_backend.embedding):
            ours = backend(*args)
            assert ours.dtype == out_dtype
            assert_within_budget(ours, *stock_and_exact(args))


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 33, 384])
def test_without_a_layer_norm_it_is_the_sum(isa, hidden, table_dtype, out_dtype):
    for table, placed in ((True, True), (False, False)):
        args = case(2, 9, hidden, table_dtype, table=table, out=out_dtype, placed=placed)
        args[7] = args[8] = None
        tables = [None if a is None else a.float() for a in args[4:7]]
        expected = op.reference(*args[:4], *tables, *args[7:])
        for backend in (compiled, torch_backend.embedding, op.embedding):
            assert torch.equal(backend(*args), expected)
    args[7] = torch.ones(hidden)
    with pytest.raises(ValueError, match="one of weight and shift is None"):
        compiled(*args)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
def test_any_batch_from_offset_views(isa, batch, seqlen, hidden, dtype, narrow, transposed, offset, placed, seed):
    args = case(batch, seqlen, hidden, dtype, offset=offset, placed=placed, seed=seed)
    views = list(args)
    for i in (4, 5, 6):
        views[i] = offset_view(args[i])
    for i in (0, 1):
        ids = args[i].int() if narrow else args[i]
        views[i] = ids.t().contiguous().t() if transposed else offset_view(ids) if batch else ids
    ours = compiled(*views)
    assert torch.equal(ours, compiled(*args))
    assert_within_budget(ours, *stock_and_exact(args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_any_batch(isa, dtype):
    args = case(4, 60, 384, dtype)
    with threads(1):
        whole = compiled(*args)
    with threads(2):
        assert torch.equal(whole, compiled(*args))
    for t in (0, 50, len(whole) - 1):
        args[2] = args[2][t : t + 1]
        assert torch.equal(whole[t : t + 1], compiled(*args))
        args = case(4, 60, 384, dtype)


def test_writes_nothing_outside_the_result(isa):
    ids, types, indices, _, word, position, token_type, weight, shift, *_ = args = case(2, 9, 37)
    tokens = len(indices)
    big = torch.full((tokens + 2, 43), SENTINEL)
    out = big[1:-1, 3:-3]
    native.kernels().embedding(
        ids.data_ptr(), types.data_ptr(), 9, 1, 9, 1, 8, 8, indices.data_ptr(), 0, 9, tokens, 37, 0,
        word.data_ptr(), position.data_ptr(), token_type.data_ptr(), 37, 37, 37, weight.data_ptr(),
        shift.data_ptr(), out.data_ptr(), 43, EPS, 0, 0, 2, 2, VOCAB, POSITIONS, TYPES,
    )  # fmt: skip
    assert torch.equal(out, compiled(*args))
    out.fill_(SENTINEL)
    assert (big == SENTINEL).all()


def test_opcheck():
    opcheck("embedding", tuple(case(2, 5, 20)))
    opcheck("embedding", tuple(case(2, 5, 20, placed=True)))
    opcheck("embedding", tuple(case(2, 5, 20, torch.bfloat16, types=False, table=False, out=torch.float32)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", VOCAB, "input_ids at row 1, column 40 is 40; word has 40 rows"),
        ("input_ids", -1, "input_ids at row 1, column 40 is -1"),
        ("token_type_ids", TYPES, "token_type_ids at row 1, column 40 is 2; token_type has 2 rows"),
        ("token_type_ids", -(2**62), "token_type_ids at row 1, column 40"),
        ("indices", 100, r"indices\[90\] is 100; input_ids has 2 x 50 positions"),
        ("indices", -1, r"indices\[90\] is -1"),
    ],
)
def test_nothing_is_read_outside_the_tables(name, value, message, count):
    args = dict(zip(NAMES, case(2, 50, 200, keep=1), strict=True))
    args[name].view(-1)[90] = value
    with threads(count), pytest.raises(IndexError, match=message):
        op.embedding(**args)


def test_a_position_outside_its_table():
    args = dict(zip(NAMES, case(2, 50, 20, keep=1), strict=True))
    for offset, message in (
        (20, "position at row 0, column 44 is 64"),
        (-1, "position at row 0, column 0 is -1"),
    ):
        with pytest.raises(IndexError, match=message):
            op.embedding(**{**args, "position_offset": offset})
    for value in (POSITIONS, -1):
        positions = torch.zeros(2, 50, dtype=torch.int32)
        positions[1, 40] = value
        with pytest.raises(IndexError, match=f"position at row 1, column 40 is {value}"):
            op.embedding(**{**args, "position_ids": positions})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(2, 5)}, "input_ids has dtype"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}, "token_type_ids has shape"),
        ({"indices": torch.zeros(3, dtype=torch.int64)}, "indices"),
        ({"indices": torch.zeros(3, 1, dtype=torch.int32)}, "indices has shape"),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, "position_ids is"),
        ({"position_ids": torch.zeros(5, 2, dtype=torch.int32)}, "position_ids is"),
        ({"position_ids": torch.zeros(5, 2, dtype=torch.int32).t()}, "position_ids is"),
        ({"word": torch.zeros(VOCAB, 20, dtype=torch.float64)}, "word has dtype"),
        ({"word": torch.zeros(20, VOCAB).t()}, "word has strides"),
        ({"position": torch.zeros(POSITIONS, 19)}, "position has rows of 19"),
        ({"token_type": torch.zeros(2, 20, dtype=torch.bfloat16)}, "token_type has dtype"),
        ({"weight": torch.zeros(19)}, "weight"),
        ({"shift": torch.zeros(20, dtype=torch.bfloat16)}, "shift"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, case(2, 5, 20), strict=True))
    op.embedding(**args)
    with pytest.raises(ValueError, match=message):
        op.embedding(**{**args, **change})
