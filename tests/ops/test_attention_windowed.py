import pytest
import torch
from helpers import opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, boundaries, case
from test_attention_biased import check as check_biased

from clinfast.backends import torch_variants as torch_backend
from clinfast.backends.cpu.attention import attention as plain
from clinfast.backends.cpu.attention_windowed import attention_windowed as compiled
from clinfast.ops import attention_windowed as op

NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "scale", "window", "q_places", "k_places")


def windowed(args, window, q_places=None, k_places=None):
    return [*args, window, q_places, k_places]


def check(args, call=compiled):
    """The budget of the biased attention, on this one's reference."""
    return check_biased(args, call, op.reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "window"), [(1, 9), (33, 0), (32, 1), (64, 64), (80, 20), (256, 9), (64, 5000)]
)
def test_matches_reference(isa, window, head_dim, dtype):
    check(windowed(case([64, 1, 5, 230], 2, head_dim, dtype), window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 64, 300])
def test_notes_longer_than_blocks_of_keys_and_items(isa, window, dtype):
    check(windowed(case([3, 1100, 40], 1, 64, dtype), window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [5, 600])
def test_first_token_queries(isa, window, dtype):
    check(windowed(case([1, 1, 1, 1], 4, 64, dtype, k_lengths=[1513, 1, 40, 129]), window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-3, 2.0])
def test_any_scale(isa, scale, dtype):
    args = case([270, 9], 2, 64, dtype)
    args[-1] = scale
    check(windowed(args, 20))


def test_scores_beyond_the_range_of_exp(isa):
    check(windowed(case([600], 2, 64, spread=200.0), 30))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.floats(0, 1)), max_size=5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    window=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
    places=st.sampled_from(["ranks", "offset", "holes"]),
)
def test_any_lengths_and_places(isa, notes, heads, head_dim, window, dtype, bounded, seed, places):
    """More queries than keys, and notes without keys, among them: some queries see nothing, and get zeros."""
    used = [int(share * keys) for _, keys, share in notes] if bounded else None
    args = case([n[0] for n in notes], heads, head_dim, dtype, [n[1] for n in notes], used, seed=seed)
    given = [None, None]
    if places != "ranks":
        steps = torch.Generator().manual_seed(seed)
        for i in (0, 1):
            rows = args[i].shape[0]
            jumps = torch.ones(rows) if places == "offset" else torch.randint(1, 4, (rows,), generator=steps)
            given[i] = (jumps.cumsum(0) + 1000).int()
    ours = check(windowed(args, window, *given))
    unseen = op.reference(*windowed([torch.ones_like(t.double()) for t in args[:3]] + args[3:], window, *given)) == 0
    assert (ours[unseen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_consecutive_places_have_the_bits_of_ranks(isa, dtype):
    args = case([700, 17], 2, 64, dtype)
    columns = torch.cat([torch.arange(700) + 4, torch.arange(17) + 5000]).int()
    assert torch.equal(compiled(*windowed(args, 30)), compiled(*windowed(args, 30, columns, columns)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_over_everything_is_plain_attention(isa, dtype):
    args = case([70, 700], 2, 64, dtype)
    expected = plain(*args)
    rounding = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(compiled(*args, 700), expected, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 64])
def test_a_note_has_the_same_bits_in_any_batch(isa, window, dtype):
    lengths = [5, 900, 64, 1]
    args = windowed(case(lengths, 3, 64, dtype), window)
    q, k, v, cu_seqlens, *_ = args
    with threads(1):
        whole = compiled(*args)
    with threads(2):
        assert torch.equal(whole, compiled(*args))
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in (q, k, v)]
        cu_alone = boundaries([length])
        assert torch.equal(whole[rows], compiled(*alone, cu_alone, cu_alone, None, *args[6:8]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_outside_are_skipped_and_not_masked(isa, dtype):
    """A NaN far off reaches nobody; masked, it would: a weight of 0 times NaN is NaN."""
    args = windowed(case([3000], 2, 64, dtype), 64)
    before = compiled(*args)
    for t in args[1:3]:
        t[:300] = t[2700:] = float("nan")
    after = compiled(*args)
    assert torch.equal(after[700:2300], before[700:2300]) and after[:300].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_past_the_used_ones_are_not_read(isa, dtype):
    args = windowed(case([640, 9], 2, 32, dtype, used=[523, 9]), 40)
    before = compiled(*args)
    args[1][523:640] = float("nan")
    args[2][523:640] = float("nan")
    assert torch.equal(compiled(*args), before)
    assert (before[563:640] == 0).all() and (before[562] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend(dtype):
    for args in (
        case([9, 9, 9, 400], 2, 16, dtype),
        case([3, 3], 2, 16, dtype, k_lengths=[20, 20], used=[11, 11]),
        case([2, 0, 50], 2, 16, dtype, k_lengths=[7, 3, 20]),
    ):
        check(windowed(args, 5), torch_backend.attention_windowed)
        places = [torch.arange(t.shape[0]).mul(3).int() for t in args[:2]]
        check(windowed(args, 7, *places), torch_backend.attention_windowed)


def test_opcheck():
    opcheck("attention_windowed", tuple(windowed(case([3, 5], 2, 16), 2)))
    places = torch.arange(8).int()
    opcheck("attention_windowed", tuple(windowed(case([3, 5], 2, 16, torch.bfloat16), 2, places, places)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float64)}, "attention_windowed: q has dtype torch.float64"),
        ({"v": torch.zeros(7, 2, 16)}, "v has shape"),
        ({"window": -1}, "window is -1; it must not be negative"),
        ({"q_places": torch.zeros(7, dtype=torch.int32)}, "q_places is"),
        ({"k_places": torch.zeros(8)}, "k_places is"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, windowed(case([3, 5], 2, 16), 4), strict=True))
    op.attention_windowed(**args)
    with pytest.raises(ValueError, match=message):
        op.attention_windowed(**{**args, **change})
