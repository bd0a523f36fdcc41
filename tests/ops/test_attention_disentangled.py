import pytest
import torch
from helpers import opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, boundaries, case

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu.attention import attention as plain
from clinfast.backends.cpu.attention_disentangled import attention_disentangled as compiled
from clinfast.ops import attention_disentangled as op

NAMES = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "scale", "position_keys", "position_queries", "buckets",
    "q_places", "k_places",
)  # fmt: skip
BOTH = ("c2p", "p2c")


def disentangled(args, span=8, position_buckets=8, reach=32, terms=BOTH, q_places=None, k_places=None, seed=7):
    """With tables of 2 span rows; without position_buckets a row for each distance."""
    q = args[0]
    g = torch.Generator().manual_seed(seed)
    tables = [
        torch.randn(q.shape[1], 2 * span, q.shape[2], generator=g).to(q.dtype) if term in terms else None
        for term in BOTH
    ]
    buckets = op.log_buckets(span, position_buckets, reach if position_buckets else span)
    return [*args, *tables, buckets, q_places, k_places]


def own_rows(span, reach=0):
    """Settings of tables with a row for each distance."""
    return {"span": span, "position_buckets": 0, "reach": reach}


def exact(args):
    return op.reference(*(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in args))


def check(args, call=compiled):
    """Root mean square error at most twice the definition's in the dtype; the largest, a draw of a tail, four times."""
    ours, stock, truth = call(*args), op.reference(*args), exact(args)
    assert ours.is_contiguous() and ours.dtype == args[0].dtype
    assert ours.shape == truth.shape and torch.isfinite(ours).all()
    if truth.numel():
        floor = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps) * truth.abs().max()
        error, stock_error = ours.double() - truth, stock.double() - truth
        assert error.abs().max() <= 4 * stock_error.abs().max() + floor
        assert error.square().mean().sqrt() <= 2 * stock_error.square().mean().sqrt() + floor / 4
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 33, 64, 80, 256])
def test_matches_reference(isa, head_dim, dtype):
    check(disentangled(case([37, 1, 70], 1, head_dim, dtype), 16, 16, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tables",
    [{"span": 256, "position_buckets": 256, "reach": 512}, own_rows(160), own_rows(40), own_rows(1),
     {"terms": ("c2p",)}, {"terms": ("p2c",)}, {"span": 64, "position_buckets": 64, "reach": 70}],
    ids=str,
)  # fmt: skip
def test_tables(isa, tables, dtype):
    """Distances with rows of their own, in log buckets, and beyond the tables."""
    check(disentangled(case([150, 7], 1, 32, dtype), **tables))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_note_among_short_ones(isa, dtype):
    """More keys than a block, more queries than an item."""
    check(disentangled(case([3, 800, 40], 1, 32, dtype), 64, 64, 512))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_token_queries_over_all_keys(isa, dtype):
    check(disentangled(case([1, 1, 1, 1], 2, 64, dtype, k_lengths=[513, 1, 40, 129]), 64, 64, 512))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-3, 1.0])
def test_any_scale(isa, scale, dtype):
    args = case([70, 9], 2, 64, dtype, spread=0.5)
    args[-1] = scale
    check(disentangled(args))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.floats(0, 1)), max_size=5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    tables=st.sampled_from([(8, 8, 32), (16, 16, 20), (30, 0, 0), (3, 0, 0), (100, 0, 0)]),
    terms=st.sampled_from([BOTH, ("c2p",), ("p2c",)]),
    dtype=st.sampled_from(DTYPES),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
    places=st.sampled_from(["ranks", "offset", "holes"]),
)
def test_any_lengths_and_places(isa, notes, heads, head_dim, tables, terms, dtype, bounded, seed, places):
    used = [int(share * keys) for _, keys, share in notes] if bounded else None
    args = case([n[0] for n in notes], heads, head_dim, dtype, [n[1] for n in notes], used, seed=seed)
    given = [None, None]
    if places != "ranks":
        steps = torch.Generator().manual_seed(seed)
        for i in (0, 1):
            rows = args[i].shape[0]
            jumps = torch.ones(rows) if places == "offset" else torch.randint(1, 4, (rows,), generator=steps)
            given[i] = (jumps.cumsum(0) + 1000).int()
    ours = check(disentangled(args, *tables, terms, *given))
    keys = used if bounded else [n[1] for n in notes]
    for note, count in enumerate(keys):
        if count == 0:
            assert (ours[args[3][note] : args[3][note + 1]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_consecutive_places_have_the_bits_of_ranks(isa, dtype):
    args = case([300, 17], 2, 64, dtype)
    columns = torch.cat([torch.arange(300) + 4, torch.arange(17) + 5000]).int()
    with_places = disentangled(args, q_places=columns, k_places=columns)
    assert torch.equal(compiled(*disentangled(args)), compiled(*with_places))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hole_leaves_the_other_scores_as_they_are(isa, dtype):
    """The last key moved away by more than the tables reach: rows before it read what they read before."""
    args = case([200], 2, 64, dtype)
    args[2][199] = 0
    near = torch.arange(200).int()
    far = near.clone()
    far[199] = 100_000
    keys_only = disentangled(args, q_places=near, k_places=near)
    moved = compiled(*disentangled(args, q_places=near, k_places=far))
    check(disentangled(args, q_places=near, k_places=far))
    # Queries further than the tables reach from the last key see no difference at all.
    assert torch.equal(moved[:160], compiled(*keys_only)[:160])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_tables_are_plain_attention(isa, dtype):
    args = case([70, 300], 2, 64, dtype)
    expected = plain(*args)
    rounding = torch.finfo(dtype).eps * expected.abs().max().item()
    zero = torch.zeros(2, 16, 64, dtype=dtype)
    for tables in ((zero, zero), (None, None)):
        found = compiled(*args, *tables, op.log_buckets(8, 0, 8) if tables[0] is not None else torch.zeros(1).int())
        torch.testing.assert_close(found, expected, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(isa, dtype):
    lengths = [5, 130, 64, 1, 290]
    args = disentangled(case(lengths, 2, 64, dtype), 64, 64, 128)
    q, k, v, cu_seqlens, *_ = args
    with threads(1):
        whole = compiled(*args)
    with threads(2):
        assert torch.equal(whole, compiled(*args))
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in (q, k, v)]
        cu_alone = boundaries([length])
        assert torch.equal(whole[rows], compiled(*alone, cu_alone, cu_alone, None, *args[6:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_alone_has_the_bits_it_has_among_its_note(isa, dtype):
    args = disentangled(case([300], 3, 64, dtype), 64, 64, 128)
    whole = compiled(*args)
    first = compiled(args[0][:1], *args[1:3], boundaries([1]), *args[4:])
    # With AMX a note of few queries is computed by the vector unit.
    if isa == "amx" and dtype is torch.bfloat16:
        torch.testing.assert_close(first, whole[:1], rtol=0, atol=1e-2)
    else:
        assert torch.equal(first, whole[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_past_the_used_ones_are_not_read(isa, dtype):
    args = disentangled(case([40, 9], 2, 32, dtype, used=[23, 9]))
    before = compiled(*args)
    args[1][23:40] = float("nan")
    args[2][23:40] = float("nan")
    assert torch.equal(compiled(*args), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend(dtype):
    for args in (
        case([9, 9, 9, 400], 2, 16, dtype),
        case([3, 3], 2, 16, dtype, k_lengths=[20, 20], used=[11, 11]),
        case([2, 0, 5], 2, 16, dtype, k_lengths=[7, 3, 0]),
    ):
        check(disentangled(args), torch_backend.attention_disentangled)
        check(disentangled(args, terms=("p2c",)), torch_backend.attention_disentangled)
        places = [torch.arange(t.shape[0]).mul(3).int() for t in args[:2]]
        check(disentangled(args, q_places=places[0], k_places=places[1]), torch_backend.attention_disentangled)


@pytest.mark.parametrize("sizes", [(256, 256, 512), (8, 8, 16), (4, 4, 16), (6, 6, 13), (10, 10, 100), (16, 0, 16)])
def test_buckets_are_stocks(sizes):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    span, position_buckets, reach = sizes
    buckets = op.log_buckets(*sizes)
    for tokens in (5, 100, reach + 3):
        x = torch.zeros(1, tokens, 8)
        found = build_relative_position(x, x, position_buckets or -1, reach if position_buckets else -1)[0]
        places = torch.arange(tokens)
        assert torch.equal(op.rows_of(buckets, places, places), (found + span).clamp(0, 2 * span - 1))


def test_opcheck():
    opcheck("attention_disentangled", tuple(disentangled(case([3, 5], 2, 16))))
    places = torch.arange(8).int()
    args = disentangled(case([3, 5], 2, 16, torch.bfloat16), terms=("c2p",), q_places=places, k_places=places)
    opcheck("attention_disentangled", tuple(args))


def test_refuses_gradients():
    args = disentangled(case([3, 5], 2, 16))
    args[7].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        op.attention_disentangled(*args)


RISING = torch.arange(8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float64)}, "attention_disentangled: q has dtype torch.float64"),
        ({"v": torch.zeros(7, 2, 16)}, "v has shape"),
        ({"position_keys": torch.zeros(2, 16, 8)}, r"position_keys has shape \[2, 16, 8\]; it must have shape"),
        ({"position_queries": torch.zeros(2, 14, 16)}, "position_queries has shape"),
        ({"position_keys": torch.zeros(2, 16, 16).bfloat16()}, "position_keys has dtype torch.bfloat16"),
        ({"position_keys": torch.zeros(16, 2, 16).transpose(0, 1)}, "position_keys is .* contiguous"),
        ({"buckets": torch.zeros(4, dtype=torch.int32)}, r"buckets has shape \[4\]; it must be \[2 D \+ 1\]"),
        ({"buckets": torch.zeros(5)}, "buckets is"),
        ({"buckets": torch.tensor([0, 1, 16], dtype=torch.int32)}, r"buckets\[2\] is 16; .* within the 16 rows"),
        ({"buckets": torch.tensor([0, 2, 1], dtype=torch.int32)}, r"buckets\[2\] is 1; .* not decrease"),
        ({"q_places": torch.zeros(7, dtype=torch.int32)}, "q_places is"),
        ({"k_places": torch.zeros(8)}, "k_places is"),
        ({"q_places": RISING.flip(0)}, r"q_places\[1\] is 6; within a note places must rise"),
        ({"k_places": torch.where(RISING == 7, 1 << 30, RISING).int()}, r"k_places\[7\] is 1073741824; within a note"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, disentangled(case([3, 5], 2, 16)), strict=True))
    op.attention_disentangled(**args)
    with pytest.raises(ValueError, match=message):
        op.attention_disentangled(**{**args, **change})
