import pytest
import torch
from test_attention import boundaries, case
from test_attention_disentangled import BOTH, check, disentangled

from clinfast.backends.triton import attention_disentangled as backend
from clinfast.ops import attention_disentangled as op


def run(*args):
    return op.attention_disentangled(*args)


def test_matches_reference(dtype):
    check(disentangled(case([2, 1, 70], 1, 64, dtype)), run)


@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_head_dimensions(head_dim):
    check(disentangled(case([2, 37], 2, head_dim)), run)


@pytest.mark.parametrize("terms", [("c2p",), ("p2c",)])
def test_one_term(terms):
    check(disentangled(case([40, 9], 1, 32), terms=terms), run)


@pytest.mark.parametrize("tables", [(256, 256, 512), (40, 0, 0), (1, 0, 0), (64, 64, 70)])
def test_tables(tables):
    """Distances with rows of their own, in log buckets, beyond the tables, and several rows a step."""
    check(disentangled(case([7, 97], 1, 32), *tables), run)


@pytest.mark.parametrize("lengths", [[31, 0, 32, 1, 33], [0, 0], [0, 3]])
def test_edges_of_tiles_and_empty_notes(lengths):
    check(disentangled(case(lengths, 1, 64)), run)


def test_first_token_queries_over_all_keys():
    check(disentangled(case([1, 1, 1], 1, 64, k_lengths=[140, 1, 40]), 64, 64, 128), run)


def test_used_keys():
    args = disentangled(case([40, 9, 70, 4], 1, 32, used=[23, 9, 64, 0]))
    before = check(args, run)
    assert (before[-4:] == 0).all()
    for tensor in args[1:3]:
        tensor[23:40] = float("nan")
        tensor[49 + 64 :] = float("nan")
    assert torch.equal(run(*args), before)


@pytest.mark.parametrize("holes", [False, True])
def test_places(holes):
    args = case([70, 33], 1, 32)
    steps = torch.randint(1, 9, (103,), generator=torch.Generator().manual_seed(0)) if holes else torch.ones(103)
    places = (steps.cumsum(0) + 5000).int()
    with_places = disentangled(args, 30, 0, q_places=places, k_places=places)
    ours = check(with_places, run)
    assert torch.equal(ours, run(*disentangled(args, 30, 0))) or holes


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_negative_and_zero_scale(scale):
    args = case([40, 5], 1, 32)
    args[-1] = scale
    check(disentangled(args), run)


def test_a_note_has_the_same_bits_in_any_batch():
    lengths = [5, 70, 1]
    args = disentangled(case(lengths, 1, 64))
    whole = backend.prechecked(*args)
    cu_seqlens = args[3]
    for note, length in enumerate(lengths):
        rows = slice(cu_seqlens[note], cu_seqlens[note + 1])
        alone = [t[rows].contiguous() for t in args[:3]]
        bounds = boundaries([length])
        assert torch.equal(whole[rows], backend.prechecked(*alone, bounds, bounds, None, *args[6:]))


def test_every_backend_that_is_asked_offers_what_the_engine_binds():
    from clinfast.backends.triton import implementations

    assert {f"attention_disentangled{form}" for form in ("", ".prechecked", ".fixed")} <= implementations().keys()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (7, torch.zeros(2, 16, 8), "position_keys has shape"),
        (8, torch.zeros(2, 14, 16), "position_queries has shape"),
        (9, torch.zeros(4, dtype=torch.int32), r"buckets has shape \[4\]"),
        (9, torch.tensor([0, 1, 16], dtype=torch.int32), r"buckets\[2\] is 16; .* the 16 rows"),
        (10, torch.zeros(7, dtype=torch.int32), "q_places is"),
    ],
)
def test_bad_arguments_are_named(at, value, message):
    args = disentangled(case([3, 5], 2, 16))
    assert len(BOTH) == 2 and run(*args).shape == (8, 2, 16)
    args[at] = value
    with pytest.raises(ValueError, match=message):
        run(*args)
