import pytest
import torch
from helpers import SENTINEL, assert_within_budget, opcheck, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinfast.backends import torch as torch_backend
from clinfast.backends.cpu import native
from clinfast.backends.cpu.attention import attention as compiled
from clinfast.ops import attention as op

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "scale")


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(q_lengths, heads, head_dim, dtype=torch.float32, k_lengths=None, used=None, spread=1.0, seed=0):
    """q, k and v as views into one packed tensor with a margin of sentinels, as the engine has them."""
    g = torch.Generator().manual_seed(seed)
    k_lengths = q_lengths if k_lengths is None else k_lengths
    margin, hidden = 5, heads * head_dim
    big = torch.full((max(sum(q_lengths), sum(k_lengths)) + 2, 3 * hidden + 2 * margin), SENTINEL, dtype=dtype)
    views = []
    for i, tokens in enumerate((sum(q_lengths), sum(k_lengths), sum(k_lengths))):
        view = big[1 : tokens + 1, margin + i * hidden : margin + (i + 1) * hidden]
        view.copy_(torch.randn(tokens, hidden, generator=g) * spread)
        views.append(view.unflatten(1, (heads, head_dim)))
    used = None if used is None else torch.tensor(used, dtype=torch.int32)
    return [*views, boundaries(q_lengths), boundaries(k_lengths), used, head_dim**-0.5]


def stock_and_exact(args):
    """torch's own fused attention, note by note, and the definition in fp64."""
    return torch_backend.attention(*args), op.reference(*(t.double() for t in args[:3]), *args[3:])


def check(args):
    """Root mean square error at most twice stock's; the largest, which is one draw from a tail, four times.

    The floors are a few roundings of an fp32 score, or one of the result.
    """
    ours = compiled(*args)
    stock, exact = stock_and_exact(args)
    assert ours.is_contiguous() and ours.dtype == args[0].dtype
    assert ours.shape == exact.shape and torch.isfinite(ours).all()
    if exact.numel():
        floor = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps) * exact.abs().max()
        error, stock_error = ours.double() - exact, stock.double() - exact
        assert error.abs().max() <= 4 * stock_error.abs().max() + floor
        assert error.square().mean().sqrt() <= 2 * stock_error.square().mean().sqrt() + floor / 4
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 32, 33, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 17], [64, 5, 130]])
def test_matches_reference(isa, lengths, head_dim, dtype):
    check(case(lengths, 3, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_note_among_short_ones(isa, dtype):
    check(case([3, 1100, 40], 2, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_token_queries_over_all_keys(isa, dtype):
    check(case([1, 1, 1, 1], 4, 64, dtype, k_lengths=[513, 1, 40, 129]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 8.0])
def test_small_and_large_scores(isa, spread, dtype):
    check(case([70, 300], 2, 64, dtype, spread=spread))


def test_scores_beyond_the_range_of_exp(isa):
    check(case([50], 2, 64, spread=200.0))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70), st.floats(0, 1)), max_size=5),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_lengths(isa, notes, heads, head_dim, dtype, bounded, seed):
    used = [int(share * keys) for _, keys, share in notes] if bounded else None
    args = case([n[0] for n in notes], heads, head_dim, dtype, [n[1] for n in notes], used, seed=seed)
    ours = check(args)
    keys = used if bounded else [n[1] for n in notes]
    for note, count in enumerate(keys):
        if count == 0:
            assert (ours[args[3][note] : args[3][note + 1]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_past_the_used_ones_are_not_read(isa, dtype):
    args = case([40, 9], 2, 32, dtype, used=[23, 9])
    before = compiled(*args)
    args[1][23:40] = float("nan")
    args[2][23:40] = float("nan")
    assert torch.equal(compiled(*args), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(isa, dtype):
    lengths = [5, 200, 64, 1, 390]
    args = case(lengths, 3, 64, dtype)
    q, k, v, cu_seqlens, *_ = args
    with threads(1):
        whole = compiled(*args)
    with threads(2):
        assert torch.equal(whole, compiled(*args))
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in (q, k, v)]
        cu_alone = boundaries([length])
        assert torch.equal(whole[rows], compiled(*alone, cu_alone, cu_alone, None, args[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_alone_has_the_bits_it_has_among_its_note(isa, dtype):
    q, k, v, cu_seqlens, _, _, scale = case([300], 3, 64, dtype)
    whole = compiled(q, k, v, cu_seqlens, cu_seqlens, None, scale)
    first = compiled(q[:1], k, v, boundaries([1]), cu_seqlens, None, scale)
    assert torch.equal(first, whole[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_outside_the_result(isa, dtype):
    args = case([7, 0, 30], 2, 33, dtype)
    q, k, v, cu_seqlens, *_ = args
    big = torch.full((39, 72), SENTINEL, dtype=dtype)
    out = big[1:-1, 3:-3]
    native.kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        *(stride for t in (q, k, v) for stride in t.stride()[:2]), 72, 33, cu_seqlens.data_ptr(),
        cu_seqlens.data_ptr(), 0, 3, 2, 33, args[-1], native.DTYPES[dtype], 2, 37, 37,
    )  # fmt: skip
    assert torch.equal(out.unflatten(1, (2, 33)), compiled(*args))
    out.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend(dtype):
    for args in (
        case([9, 9, 9, 4], 2, 16, dtype),
        case([3, 3], 2, 16, dtype, k_lengths=[20, 20], used=[11, 11]),
        case([2, 0, 5], 2, 16, dtype, k_lengths=[7, 3, 0]),
    ):
        exact = op.reference(*(t.double() for t in args[:3]), *args[3:])
        assert_within_budget(torch_backend.attention(*args), op.reference(*args), exact)


def test_opcheck():
    opcheck("attention", tuple(case([3, 5], 2, 16)))
    opcheck("attention", tuple(case([3, 5], 2, 16, torch.bfloat16, used=[2, 0])))


def test_refuses_gradients():
    args = case([3, 5], 2, 16)
    args[0] = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        op.attention(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float64)}, "q has dtype torch.float64"),
        ({"q": torch.zeros(8, 32)}, "q has shape"),
        ({"q": torch.zeros(8, 16, 2).transpose(1, 2)}, "q has strides"),
        ({"k": torch.zeros(8, 2, 16, dtype=torch.bfloat16)}, "k has dtype torch.bfloat16"),
        ({"v": torch.zeros(7, 2, 16)}, "v has shape"),
        ({"k": torch.zeros(8, 1, 16)}, "k has shape"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 8])}, "cu_seqlens_q is .* torch.int64"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 8], dtype=torch.int32)}, "cu_seqlens_q goes from 1 to 8"),
        (
            {"cu_seqlens_k": torch.tensor([0, 9, 8], dtype=torch.int32)},
            "cu_seqlens_k decreases after entry 1",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens_k is"),
        ({"seqused_k": torch.tensor([3, 6], dtype=torch.int32)}, r"seqused_k\[1\] is 6; the note has 5 keys"),
        ({"seqused_k": torch.tensor([-1, 5], dtype=torch.int32)}, r"seqused_k\[0\] is -1"),
        ({"seqused_k": torch.tensor([3], dtype=torch.int32)}, "seqused_k is"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, case([3, 5], 2, 16), strict=True))
    op.attention(**args)
    with pytest.raises(ValueError, match=message):
        op.attention(**{**args, **change})


@pytest.mark.parametrize("head_dim", [0, 257])
def test_head_dim_beyond_the_kernel(head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        op.attention(*([torch.zeros(4, 2, head_dim)] * 3), boundaries([4]), boundaries([4]), None, 1.0)
