import pytest
import torch
from helpers import opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, boundaries, case

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu.attention import attention as plain
from clinfast.backends.cpu.attention_biased import attention_biased as compiled
from clinfast.ops import attention_biased as op

NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "scale", "bias", "q_places", "k_places")


def table(heads, reach, spread=2.0, seed=7):
    return torch.randn(heads, 2 * reach + 1, generator=torch.Generator().manual_seed(seed)) * spread


def biased(args, reach=5, spread=2.0, q_places=None, k_places=None):
    return [*args, table(args[0].shape[1], reach, spread), q_places, k_places]


def stock_and_exact(args, reference):
    """Matrix products, addition and softmax in the dtype, as transformers has them; the definition in fp64, and what
    its sums would come to if no two terms had opposite signs."""
    q, k, v, *rest = args
    wide = q.double(), k.double(), v.double()
    return reference(q, k, v, *rest), reference(*wide, *rest), reference(*wide[:2], wide[2].abs(), *rest)


def check(args, call=compiled, reference=op.reference):
    """Root mean square error at most twice stock's; the largest, which is one draw from a tail, four times.

    The floor is a few roundings of an fp32 sum's terms, or one of the result.
    """
    ours = call(*args)
    stock, exact, terms = stock_and_exact(args, reference)
    assert ours.is_contiguous() and ours.dtype == args[0].dtype
    assert ours.shape == exact.shape and torch.isfinite(ours).all()
    if exact.numel():
        floor = 4 * torch.finfo(torch.float32).eps * terms.max() + torch.finfo(ours.dtype).eps * exact.abs().max()
        error, stock_error = ours.double() - exact, stock.double() - exact
        assert error.abs().max() <= 4 * stock_error.abs().max() + floor
        assert error.square().mean().sqrt() <= 2 * stock_error.square().mean().sqrt() + floor / 4
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "reach"), [(1, 9), (33, 0), (32, 200), (64, 9), (80, 20), (128, 64), (256, 9)])
def test_matches_reference(isa, reach, head_dim, dtype):
    check(biased(case([64, 1, 5, 130], 2, head_dim, dtype), reach))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_note_among_short_ones(isa, dtype):
    """More keys than a block, more queries than an item."""
    check(biased(case([3, 1700, 40], 2, 64, dtype), 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_token_queries_over_all_keys(isa, dtype):
    check(biased(case([1, 1, 1, 1], 4, 64, dtype, k_lengths=[513, 1, 40, 129]), 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.125, 1e-3, 2.0])
def test_any_scale(isa, scale, dtype):
    args = case([70, 9], 2, 64, dtype)
    args[-1] = scale
    check(biased(args, 20))


@pytest.mark.parametrize("spread", [1e-3, 30.0, 3000.0])
def test_small_and_large_biases(isa, spread):
    check(biased(case([70, 300], 2, 64), 40, spread))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.floats(0, 1)), max_size=5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    reach=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
    places=st.sampled_from(["ranks", "offset", "holes"]),
)
def test_any_lengths_and_places(isa, notes, heads, head_dim, reach, dtype, bounded, seed, places):
    used = [int(share * keys) for _, keys, share in notes] if bounded else None
    args = case([n[0] for n in notes], heads, head_dim, dtype, [n[1] for n in notes], used, seed=seed)
    given = [None, None]
    if places != "ranks":
        steps = torch.Generator().manual_seed(seed)
        for i in (0, 1):
            rows = args[i].shape[0]
            jumps = torch.ones(rows) if places == "offset" else torch.randint(1, 4, (rows,), generator=steps)
            given[i] = (jumps.cumsum(0) + 1000).int()
    ours = check(biased(args, reach, q_places=given[0], k_places=given[1]))
    keys = used if bounded else [n[1] for n in notes]
    for note, count in enumerate(keys):
        if count == 0:
            assert (ours[args[3][note] : args[3][note + 1]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_consecutive_places_have_the_bits_of_ranks(isa, dtype):
    args = case([300, 17], 2, 64, dtype)
    columns = torch.cat([torch.arange(300) + 4, torch.arange(17) + 5000]).int()
    assert torch.equal(compiled(*biased(args)), compiled(*biased(args, q_places=columns, k_places=columns)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bias_is_plain_attention(isa, dtype):
    args = case([70, 300], 2, 64, dtype)
    expected = plain(*args)
    rounding = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(compiled(*args, torch.zeros(2, 1)), expected, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(isa, dtype):
    lengths = [5, 200, 64, 1, 390]
    args = biased(case(lengths, 3, 64, dtype), 60)
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
def test_keys_past_the_used_ones_are_not_read(isa, dtype):
    args = biased(case([40, 9], 2, 32, dtype, used=[23, 9]))
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
        check(biased(args), torch_backend.attention_biased)
        places = [torch.arange(t.shape[0]).mul(3).int() for t in args[:2]]
        check(biased(args, 4, 2.0, *places), torch_backend.attention_biased)


def test_opcheck():
    opcheck("attention_biased", tuple(biased(case([3, 5], 2, 16))))
    places = torch.arange(8).int()
    opcheck("attention_biased", tuple(biased(case([3, 5], 2, 16, torch.bfloat16), 2, 1.0, places, places)))


def test_refuses_gradients():
    args = biased(case([3, 5], 2, 16))
    args[7].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        op.attention_biased(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float64)}, "attention_biased: q has dtype torch.float64"),
        ({"v": torch.zeros(7, 2, 16)}, "v has shape"),
        ({"bias": torch.zeros(2, 4)}, r"bias has shape \[2, 4\]; it must be \[2, 2 R \+ 1\]"),
        ({"bias": torch.zeros(1, 5)}, "bias has shape"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"bias": torch.zeros(5, 2).T}, "bias has shape"),
        ({"bias": torch.zeros(2, 5, dtype=torch.bfloat16)}, "bias has dtype torch.bfloat16"),
        ({"q_places": torch.zeros(7, dtype=torch.int32)}, "q_places is"),
        ({"k_places": torch.zeros(8)}, "k_places is"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, biased(case([3, 5], 2, 16)), strict=True))
    op.attention_biased(**args)
    with pytest.raises(ValueError, match=message):
        op.attention_biased(**{**args, **change})
