"""One query a note: its keys split over warps, and over blocks where there are more than a segment holds."""

import pytest
import torch
from engine_fakes import encoder_of
from test_attention import boundaries, case
from test_cuda_attention import check
from test_cuda_engine import backend_everywhere, models  # noqa: F401

import clinfast
from clinfast.backends.cuda import attention as backend
from clinfast.backends.cuda import native
from clinfast.ops import registry

DTYPES = list(native.DTYPES)
SEGMENT = 1024


@pytest.fixture
def few(machine):
    return lambda *args: machine(backend.first_token, *args)


def first_tokens(k_lengths, heads, head_dim, dtype, used=None, **more):
    return case([1] * len(k_lengths), heads, head_dim, dtype, k_lengths=k_lengths, used=used, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [7, 32, 64, 80, 128, 256])
def test_matches_reference(few, head_dim, dtype):
    """The margin of `case` is odd, so that no row is aligned."""
    check(few, first_tokens([213, 1, 40], 2, head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("keys", [1, 33, 127, 129])
def test_aligned_rows_and_keys_around_what_the_warps_take(few, keys, head_dim, dtype):
    g = torch.Generator().manual_seed(keys)
    q = torch.randn(2, 1, head_dim, generator=g).to(dtype)
    k, v = torch.randn(keys + 40, 2, 1, head_dim, generator=g).to(dtype).unbind(1)
    check(few, [q, k, v, boundaries([1, 1]), boundaries([keys, 40]), None, head_dim**-0.5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [SEGMENT, SEGMENT + 1, 2 * SEGMENT + 300])
def test_more_keys_than_a_segment_holds(few, keys, dtype):
    check(few, first_tokens([keys, 50], 1, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_queries_a_note_and_notes_without_any(few, dtype):
    args = case([2, 0, 1, 0, 3], 1, 64, dtype, k_lengths=[30, 5, 0, 8, 140], used=[20, 5, 0, 0, 140])
    ours = check(few, args)
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 200.0])
def test_small_scores_and_scores_beyond_the_range_of_exp(few, spread, dtype):
    check(few, first_tokens([70, 150], 1, 64, dtype, spread=spread))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_note_has_the_same_bits_in_any_batch(few, dtype):
    """Also beside a note that takes the batch beyond one segment, which adds a kernel."""
    args = first_tokens([150, 64, SEGMENT + 200], 2, 64, dtype)
    q, k, v, _, cu_k, _, scale = args
    whole = few(*args)
    for note, keys in enumerate([150, 64, SEGMENT + 200]):
        rows = slice(cu_k[note], cu_k[note + 1])
        alone = [q[note : note + 1], *(t[rows].contiguous() for t in (k, v))]
        assert torch.equal(whole[note : note + 1], few(*alone, boundaries([1]), boundaries([keys]), None, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_past_the_used_ones_do_not_count(few, dtype):
    args = first_tokens([40, 9], 2, 32, dtype, used=[23, 9])
    before = few(*args)
    args[1][23:40] = float("nan")
    args[2][23:40] = float("nan")
    assert torch.equal(few(*args), before) and torch.isfinite(before).all()


@pytest.mark.parametrize("bad", [[0, 30], [0, 20, 90], [0, 50, 20], [-7, 20, 40], [0, 2**31 - 1, 40]])
def test_boundaries_outside_the_tensors_touch_nothing_outside(few, bad):
    q, k, v, *_, scale = case([40], 1, 32, torch.bfloat16)
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    ours = few(q, k, v, cu_seqlens, cu_seqlens, None, scale)
    if bad[-1] < 40:
        assert torch.isnan(ours[max(bad[-1], *bad[:-1], 0) :]).all()


def test_more_notes_than_a_warp_has_lanes(few):
    lengths = [(7 * i) % 5 for i in range(70)]
    check(few, first_tokens(lengths, 1, 8, torch.bfloat16))


def test_the_engine_takes_it_in_the_last_layer_of_a_first_token_head(backend_everywhere):  # noqa: F811
    machine = backend_everywhere
    model = models(torch.float32)[1].to(machine.device)
    ids = torch.randint(3, 60, (3, 19), generator=torch.Generator().manual_seed(1)).to(machine.device)
    with torch.inference_mode():
        expected = model(ids).logits
        clinfast.optimize(model, backend="cuda", strict=True)
        encoder_of(model).graphs = None  # whose replays count nothing
        before = registry.calls.copy()
        ours = model(ids).logits
    layers = encoder_of(model).spec.num_layers
    assert registry.calls["attention.first_token[cuda]"] == before["attention.first_token[cuda]"] + 1
    assert registry.calls["attention[cuda]"] == before["attention[cuda]"] + layers - 1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
