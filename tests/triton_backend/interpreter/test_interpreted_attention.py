import pytest
import torch
from test_attention import boundaries, case, stock_and_exact

from clinfast.backends.triton import attention as backend
from clinfast.backends.triton import attention_biased as triton_biased
from clinfast.ops import attention as op
from clinfast.ops import attention_biased as biased
from clinfast.ops import attention_windowed as near
from clinfast.ops import registry
from clinfast.ops.registry import calls


def check(args, ours=None, exact=None):
    """Root mean square error at most twice stock's; the largest, which is one draw from a tail, four times."""
    ours = op.attention(*args) if ours is None else ours
    stock, reference = stock_and_exact(args)
    exact = reference if exact is None else exact
    assert ours.is_contiguous() and ours.dtype == args[0].dtype
    assert ours.shape == exact.shape and torch.isfinite(ours).all()
    if exact.numel():
        floor = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps) * exact.abs().max()
        error, stock_error = ours.double() - exact, stock.double() - reference
        assert error.abs().max() <= 4 * stock_error.abs().max() + floor
        assert error.square().mean().sqrt() <= 2 * stock_error.square().mean().sqrt() + floor / 4
    return ours


@pytest.mark.parametrize("head_dim", [1, 16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 17, 130]])
def test_matches_reference(lengths, head_dim, dtype):
    check(case(lengths, 2, head_dim, dtype))


@pytest.mark.parametrize("lengths", [[63, 0, 64, 1, 65], [127, 128, 129], [0, 0], [0, 3]])
def test_edges_of_tiles_and_empty_notes(lengths, dtype):
    check(case(lengths, 4, 64, dtype))


def test_first_token_queries_over_all_keys(dtype):
    check(case([1, 1, 1, 1], 4, 64, dtype, k_lengths=[200, 1, 40, 129]))


def test_used_keys(dtype):
    args = case([40, 9, 100, 4], 4, 32, dtype, used=[23, 9, 64, 0])
    before = check(args)
    assert (before[-4:] == 0).all()
    for tensor in args[1:3]:
        tensor[23:40] = float("nan")
        tensor[49 + 64 : 149] = float("nan")
        tensor[149:] = float("nan")
    assert torch.equal(op.attention(*args), before)


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[20, 0, 64, 65, 3], [1] * 5])
def test_several_heads_a_program(lengths, together, dtype):
    args = case(lengths, 4, 64, dtype)
    ours = backend.extended(*args, heads_together=together)
    assert torch.equal(check(args, ours), backend.extended(*args, heads_together=1)) or together > 1


def test_many_short_notes_share_programs():
    """The choice of heads a program, as the wrapper makes it."""
    assert backend._kind_and_heads(0, 40 * 64, 64, 12) == ("short", 4)
    assert backend._kind_and_heads(0, 40, 1, 12) == ("short", 1)
    assert backend._kind_and_heads(0, 64, 64, 12) == ("few", 4)
    assert backend._kind_and_heads(0, 64, 64, 9) == ("few", 1)
    assert backend._kind_and_heads(0, 300 * 64, 64, 12) == ("long", 1)
    check(case([30, 25, 0, 7, 31] * 3, 4, 32))


@pytest.mark.parametrize("spread", [1e-3, 8.0, 200.0])
def test_small_and_large_scores(spread):
    check(case([70, 150], 2, 64, spread=spread))


def test_negative_and_zero_scale():
    args = case([70, 5], 2, 32)
    for scale in (-0.3, 0.0):
        check([*args[:-1], scale])


def windowed(args, window, bias):
    q, k, v, cu_q, _, _, scale = args
    out = torch.zeros(q.shape, dtype=torch.float64)
    for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double() * scale, k[a:b].double())
        distance = torch.arange(b - a)[None, :] - torch.arange(b - a)[:, None]
        if bias is not None:
            reach = bias.shape[1] // 2
            scores += bias.double()[:, distance.clamp(-reach, reach) + reach]
        if window is not None:
            scores = scores.masked_fill(distance.abs() > window, float("-inf"))
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b].double())
    return out


@pytest.mark.parametrize("window", [None, 0, 5, 64])
@pytest.mark.parametrize("reach", [None, 70])
def test_window_and_bias(window, reach, dtype):
    args = case([150, 1, 0, 65], 2, 32, dtype)
    bias = None if reach is None else torch.randn(2, 2 * reach + 1, generator=torch.Generator().manual_seed(0))
    ours = backend.extended(*args, window=window, bias=bias)
    check(args, ours, windowed(args, window, bias))


@pytest.mark.parametrize(("step", "scale"), [(None, 0.2), (1, 0.2), (3, 0.2), (3, -0.3), (None, 0.0)])
def test_biased_by_place(step, scale, dtype):
    lengths = [150, 1, 0, 65] if step != 1 else [9, 1, 0, 16]
    args = case(lengths, 4, 32, dtype, used=[131, 1, 0, 65] if step == 3 else None)
    args[-1] = scale
    bias = torch.randn(4, 141, generator=torch.Generator().manual_seed(0))
    places = None if step is None else torch.arange(sum(lengths)).mul(step).int()
    ours = biased.attention_biased(*args, bias, places, places)
    assert torch.equal(ours, triton_biased.prechecked(*args, bias, places, places))
    check(args, ours, biased.reference(*(t.double() for t in args[:3]), *args[3:], bias, places, places))


def test_bad_biases_are_named():
    args = case([3, 5], 2, 16)
    for bias, places, message in (
        (torch.zeros(2, 4), None, "bias has shape"),
        (torch.zeros(2, 5).double(), None, "bias has dtype"),
        (torch.zeros(2, 5), torch.zeros(8), "q_places is"),
    ):
        with pytest.raises(ValueError, match=message):
            biased.attention_biased(*args, bias, places, None)


def test_a_window_skips_what_is_outside():
    """Keys in tiles that no query of the tile sees are not read."""
    args = case([640], 1, 32)
    before = backend.extended(*args, window=10)[:64]
    args[1][256:] = float("nan")
    args[2][256:] = float("nan")
    assert torch.equal(backend.extended(*args, window=10)[:64], before)


def test_a_note_has_the_same_bits_in_any_batch(dtype):
    lengths = [5, 140, 64, 1]
    args = case(lengths, 1, 64, dtype)
    whole = backend.extended(*args)
    cu_seqlens = args[3]
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in args[:3]]
        bounds = boundaries([length])
        assert torch.equal(whole[rows], backend.extended(*alone, bounds, bounds, None, args[-1]))


def test_tiles_list_every_row_once_longest_notes_first():
    for lengths, block in (([3, 0, 200, 64, 65, 1], 64), ([5] * 300, 16), ([], 64), ([0, 0], 16)):
        cu_seqlens = boundaries(lengths)
        if not lengths:
            continue
        tiles, bound = backend._tiles(cu_seqlens, cu_seqlens, None, sum(lengths), sum(lengths), block)
        rows, counts, firsts, keys, places = tiles.view(5, bound).tolist()
        used = [i for i in range(bound) if counts[i]]
        assert used == list(range(len(used)))
        assert [keys[i] for i in used] == sorted((keys[i] for i in used), reverse=True)
        covered = sorted(r for i in used for r in range(rows[i], rows[i] + counts[i]))
        assert covered == list(range(sum(lengths)))
        assert all(rows[i] == firsts[i] + places[i] and places[i] % block == 0 for i in used)


def test_the_list_is_made_once_a_batch_and_anew_after_a_write():
    from clinfast.backends.triton import launch

    args = case([30, 12], 2, 32)
    backend.extended(*args)
    before = launch.launches["jit"]
    backend.extended(*args)
    assert launch.launches["jit"] == before + 1
    args[3][1], args[4][1] = 20, 20
    check(args, backend.extended(*args))
    assert launch.launches["jit"] == before + 3


def test_boundaries_that_lie_reach_nothing_outside():
    q, k, v, *_, scale = case([40], 2, 32)
    for bounds in ([0, 90, 40], [-5, 70, 300], [7, 3, 40]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        backend._latest.kept = None
        try:
            backend.prechecked(q, k, v, cu_seqlens, cu_seqlens, torch.tensor([99, -3], dtype=torch.int32), scale)
        except AssertionError as error:  # overlapping notes write a row twice, as they ask for
            assert "two programs" in str(error)


NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "scale")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 2, 16, dtype=torch.float64)}, "q has dtype torch.float64"),
        ({"q": torch.zeros(8, 32)}, "q has shape"),
        ({"q": torch.zeros(8, 16, 2).transpose(1, 2)}, "q has strides"),
        ({"k": torch.zeros(8, 2, 16, dtype=torch.bfloat16)}, "k has dtype torch.bfloat16"),
        ({"v": torch.zeros(7, 2, 16)}, "v has shape"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 8])}, "cu_seqlens_q is .* torch.int64"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32)}, "cu_seqlens_q goes from 0 to 7"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 8], dtype=torch.int32)}, "cu_seqlens_k decreases after entry 1"),
        ({"seqused_k": torch.tensor([3, 6], dtype=torch.int32)}, r"seqused_k\[1\] is 6; the note has 5 keys"),
        ({"seqused_k": torch.tensor([3], dtype=torch.int32)}, "seqused_k is"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(zip(NAMES, case([3, 5], 2, 16), strict=True))
    op.attention(**args)
    with pytest.raises(ValueError, match=message):
        op.attention(**{**args, **change})


def test_bad_options_are_named():
    args = case([3, 5], 2, 16)
    with pytest.raises(ValueError, match="window is -1"):
        backend.extended(*args, window=-1)
    with pytest.raises(ValueError, match="bias has shape"):
        backend.extended(*args, bias=torch.zeros(2, 4))
    with pytest.raises(registry.NotOffered, match="head_dim is 257"):
        backend.attention(*([torch.zeros(4, 2, 257)] * 3), boundaries([4]), boundaries([4]), None, 1.0)


def test_fixed_tiles_give_a_note_the_same_bits_in_any_batch(dtype):
    """Where `prechecked` would take other tiles: a note of 12 tokens among short ones, and beside a long one."""
    lengths = [12, 3, 16, 9]
    args = case([*lengths, 200], 4, 64, dtype)
    whole = check(args, backend.fixed(*args))
    q, k, v, cu_seqlens, _, used, scale = args
    tokens = sum(lengths)
    few = cu_seqlens[: len(lengths) + 1].contiguous()
    used = None if used is None else used[: len(lengths)]
    alone = backend.fixed(q[:tokens], k[:tokens], v[:tokens], few, few, used, scale)
    assert torch.equal(alone, whole[:tokens])


@pytest.mark.parametrize("window", [0, 5, 70])
def test_the_op_of_windows(window, dtype):
    args = case([130, 1, 0, 70], 2, 32, dtype)
    exact = near.reference(*(t.double() for t in args[:3]), *args[3:], window)
    check(args, near.attention_windowed(*args, window), exact)
    first = case([1, 1], 2, 32, dtype, k_lengths=[130, 40], used=[100, 40])
    exact = near.reference(*(t.double() for t in first[:3]), *first[3:], window)
    check(first, near.attention_windowed(*first, window), exact)


def test_windows_by_place_are_pytorchs(dtype):
    args = case([40, 9], 2, 32, dtype)
    places = (torch.arange(49) * 3).int()
    before = calls["attention_windowed[torch]"]
    ours = near.attention_windowed(*args, 20, places, places)
    assert calls["attention_windowed[torch]"] == before + 1
    check(args, ours, near.reference(*(t.double() for t in args[:3]), *args[3:], 20, places, places))
