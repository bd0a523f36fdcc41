import pytest
import torch
from helpers import SENTINEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import NAMES, boundaries, case, stock_and_exact

from clinfast.backends.cuda import attention as backend
from clinfast.backends.cuda import native

DTYPES = list(native.DTYPES)
KERNELS = ["mma", "simt", "wgmma"]


@pytest.fixture(params=KERNELS)
def attention(request, machine, monkeypatch):
    """One kernel of the backend; those that this machine has not are skipped by name."""
    if request.param == "wgmma" and (not machine.on_gpu or native.capability(0) != (9, 0)):
        pytest.skip("the Hopper kernel runs on compute capability 9.0 only; the emulation has no wgmma")
    monkeypatch.setattr(backend, "KERNEL", backend.KERNELS[request.param])

    def call(*args, **kwargs):
        dtype = (args[0] if args else kwargs["q"]).dtype
        if dtype is torch.float32 and request.param != "simt":
            pytest.skip(f"fp32 has no {request.param} kernel")
        return machine(backend.prechecked, *args, **kwargs)

    return call


def check(attention, args):
    """Root mean square error at most twice stock's; the largest, which is one draw from a tail, four times."""
    ours = attention(*args)
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
@pytest.mark.parametrize("head_dim", [1, 7, 32, 33, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 17], [64, 5, 130]])
def test_matches_reference(attention, lengths, head_dim, dtype):
    check(attention, case(lengths, 2, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("length", [16, 63, 65, 127, 128, 129, 192, 193])
def test_notes_around_the_tiles(attention, length, head_dim, dtype):
    """Aligned rows, so that keys come by cp.async; the margin of `case` is odd."""
    g = torch.Generator().manual_seed(length)
    qkv = torch.randn(length + 3, 3, 2, head_dim, generator=g).to(dtype)
    cu_seqlens = boundaries([3, length])
    check(attention, [*qkv.unbind(1), cu_seqlens, cu_seqlens, None, head_dim**-0.5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_note_among_short_ones(attention, dtype):
    check(attention, case([3, 500, 40], 1, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_notes_than_a_warp_has_lanes(attention, dtype):
    lengths = [(7 * i) % 23 for i in range(1100)]
    q, k, v, cu_seqlens, *_, scale = case(lengths, 1, 8, dtype)
    few = boundaries(lengths[:70])
    rows = int(few[-1])
    small = check(attention, [q[:rows], k[:rows], v[:rows], few, few, None, scale])
    ours = attention(q, k, v, cu_seqlens, cu_seqlens, None, scale)
    assert torch.equal(ours[:rows], small) and torch.isfinite(ours).all()
    last = slice(cu_seqlens[-3], None)
    assert torch.equal(ours[last], attention(q[last], k[last], v[last], *[boundaries(lengths[-2:])] * 2, None, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_token_queries_over_all_keys(attention, dtype):
    check(attention, case([1, 1, 1, 1], 2, 64, dtype, k_lengths=[213, 1, 40, 129]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 8.0])
def test_small_and_large_scores(attention, spread, dtype):
    check(attention, case([70, 150], 1, 64, dtype, spread=spread))


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_a_scale_that_is_not_positive(attention, scale):
    check(attention, [*case([70, 150], 1, 64)[:-1], scale])


def test_scores_beyond_the_range_of_exp(attention):
    check(attention, case([50], 2, 64, spread=200.0))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150), st.floats(0, 1)), max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES[1:]),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_lengths(attention, notes, heads, head_dim, dtype, bounded, seed):
    used = [int(share * keys) for _, keys, share in notes] if bounded else None
    args = case([n[0] for n in notes], heads, head_dim, dtype, [n[1] for n in notes], used, seed=seed)
    ours = check(attention, args)
    keys = used if bounded else [n[1] for n in notes]
    for note, count in enumerate(keys):
        if count == 0:
            assert (ours[args[3][note] : args[3][note + 1]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "used"), [(40, 23), (200, 150)])
def test_keys_past_the_used_ones_and_of_other_notes_do_not_count(attention, dtype, length, used):
    args = case([length, 9], 2, 32, dtype, used=[used, 9])
    before = attention(*args)
    args[1][used:length] = float("nan")
    args[2][used:length] = float("nan")
    assert torch.equal(attention(*args), before)
    args[1][length:] = float("nan")
    args[2][length:] = float("nan")
    assert torch.equal(attention(*args)[:length], before[:length])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_note_has_the_same_bits_in_any_batch(attention, dtype, head_dim):
    lengths = [5, 150, 64, 1, 200]
    args = case(lengths, 2, head_dim, dtype)
    q, k, v, cu_seqlens, *_ = args
    whole = attention(*args)
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in (q, k, v)]
        cu_alone = boundaries([length])
        assert torch.equal(whole[rows], attention(*alone, cu_alone, cu_alone, None, args[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [100, 300])
def test_a_query_alone_has_the_bits_it_has_among_its_note(attention, dtype, length):
    q, k, v, cu_seqlens, _, _, scale = case([length], 2, 64, dtype)
    whole = attention(q, k, v, cu_seqlens, cu_seqlens, None, scale)
    first = attention(q[:1], k, v, boundaries([1]), cu_seqlens, None, scale)
    assert torch.equal(first, whole[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [[0, 30], [0, 20, 90], [0, 50, 20], [-7, 20, 40], [0, 2**31 - 1, 40]])
def test_boundaries_outside_the_tensors_touch_nothing_outside(attention, dtype, bad):
    """Rows that no note owns are NaN, never what happened to lie in memory."""
    q, k, v, *_, scale = case([40], 2, 32, dtype)
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    ours = attention(q, k, v, cu_seqlens, cu_seqlens, None, scale)
    assert ours.shape == q.shape
    if bad[-1] < 40:
        assert torch.isnan(ours[max(bad[-1], *bad[:-1], 0) :]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [33, 64])
@pytest.mark.parametrize("kernel", ["", "few"])
def test_writes_nothing_outside_the_result(machine, kernel, dtype, head_dim):
    args = case([7, 0, 30], 2, head_dim, dtype)
    q, k, v, cu_seqlens = (machine.there(t) for t in args[:4])
    width = 2 * head_dim
    big = machine.there(torch.full((39, width + 6), SENTINEL, dtype=dtype))
    out = big[1:-1, 3:-3]
    machine.kernels.attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        *(stride for t in (q, k, v) for stride in t.stride()[:2]), width + 6, head_dim, cu_seqlens.data_ptr(),
        cu_seqlens.data_ptr(), 0, 3, 2, head_dim, 37, 37, args[-1], 0, 1, native.DTYPES[dtype],
        backend.KERNELS[kernel],
        *machine.device_and_stream(),
    )  # fmt: skip
    expected = machine(backend.prechecked, *args, backend.KERNELS[kernel])
    assert torch.equal(out.unflatten(1, (2, head_dim)).cpu(), expected)
    out.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


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
        ({"cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens_k is"),
        ({"seqused_k": torch.tensor([3], dtype=torch.int32)}, "seqused_k is"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 8], dtype=torch.int32)}, "cu_seqlens_q goes from 1 to 8"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 8], dtype=torch.int32)}, "cu_seqlens_k decreases after entry 1"),
        ({"seqused_k": torch.tensor([3, 6], dtype=torch.int32)}, r"seqused_k\[1\] is 6; the note has 5 keys"),
        ({"seqused_k": torch.tensor([-1, 5], dtype=torch.int32)}, r"seqused_k\[0\] is -1"),
    ],
)
def test_bad_arguments_are_named(machine, change, message):
    args = dict(zip(NAMES, case([3, 5], 2, 16), strict=True))
    machine(backend.attention, **args)
    with pytest.raises(ValueError, match=message):
        machine(backend.attention, **{**args, **change})


@pytest.mark.parametrize("head_dim", [0, 257])
def test_head_dim_beyond_the_kernel(machine, head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        machine(backend.attention, *([torch.zeros(4, 2, head_dim)] * 3), boundaries([4]), boundaries([4]), None, 1.0)
