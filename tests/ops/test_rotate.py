import pytest
import torch
from helpers import SENTINEL, assert_within_budget, opcheck, threads
from test_attention import DTYPES, boundaries

from clinfast.backends import torch_variants as torch_backend
from clinfast.backends.cpu.rotate import rotate as compiled
from clinfast.ops import rotate as op

CALLS = {"cpu": compiled, "torch": torch_backend.rotate}


def case(lengths, heads, head_dim, dtype=torch.float32, positions=50, seed=0):
    """Queries and keys of a packed tensor among sentinels, and tables."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    big = torch.full((tokens + 2, heads + 3, head_dim), SENTINEL, dtype=dtype)
    x = big[1:-1, 1 : heads + 1]
    x.copy_(torch.randn(tokens, heads, head_dim, generator=g))
    frequencies = 1.0 / 100.0 ** (torch.arange(0, head_dim, 2) / head_dim)
    return big, x, *op.tables(frequencies, positions), boundaries(lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("call", CALLS)
def test_matches_reference_and_writes_nothing_else(isa, head_dim, dtype, call):
    big, x, cos, sin, cu_seqlens = case([17, 1, 0, 40], 5, head_dim, dtype)
    before = x.clone()
    CALLS[call](x, cos, sin, cu_seqlens)
    exact = op.reference(before.double(), cos.double(), sin.double(), cu_seqlens)
    assert_within_budget(x, op.reference(before, cos, sin, cu_seqlens), exact)
    x.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


def test_it_is_transformers_rotation():
    """Its formula: x cos + rotate_half(x) sin, with the angles twice side by side."""
    _, x, cos, sin, cu_seqlens = case([30], 4, 32)
    c, s = (torch.cat((t, t), -1)[:30, None] for t in (cos, sin))
    expected = x * c + torch.cat((-x[..., 16:], x[..., :16]), -1) * s
    compiled(x, cos, sin, cu_seqlens)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_places(isa, call):
    _, x, cos, sin, cu_seqlens = case([5, 9], 3, 16)
    places = torch.tensor([0, -4, 49, 3, -49, *range(9)], dtype=torch.int32)
    before = x.clone()
    CALLS[call](x, cos, sin, cu_seqlens, places)
    exact = op.reference(before.double(), cos.double(), sin.double(), cu_seqlens, places)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(x[0], before[0]), "place 0 turns nothing"
    # Back to where it was: a negative place undoes the positive one.
    CALLS[call](x, cos, sin, cu_seqlens, -places)
    torch.testing.assert_close(x, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_have_the_bits_of_their_places_in_any_batch(isa, dtype):
    lengths = [33, 1, 50]
    _, x, cos, sin, cu_seqlens = case(lengths, 4, 64, dtype)
    by_rank, by_place = x.clone(), x.clone()
    with threads(1):
        compiled(by_rank, cos, sin, cu_seqlens)
    places = torch.cat([torch.arange(n) for n in lengths]).int()
    with threads(2):
        compiled(by_place, cos, sin, cu_seqlens, places)
    assert torch.equal(by_rank, by_place)
    alone = x[34:].clone()
    compiled(alone, cos, sin, boundaries([50]))
    assert torch.equal(alone, by_rank[34:])


@pytest.mark.parametrize("call", CALLS)
def test_places_beyond_the_tables(call):
    _, x, cos, sin, cu_seqlens = case([3, 51], 2, 8)
    with pytest.raises(IndexError, match="the place of token 53 is beyond the tables, which have 50 positions"):
        CALLS[call](x, cos, sin, cu_seqlens)
    places = torch.zeros(54, dtype=torch.int32)
    places[7] = -50
    with pytest.raises(IndexError, match="token 7 is beyond"):
        CALLS[call](x, cos, sin, cu_seqlens, places)


def test_opcheck():
    _, x, cos, sin, cu_seqlens = case([3, 5], 2, 16)
    opcheck("rotate", (x.clone(), cos, sin, cu_seqlens))
    opcheck("rotate", (x.clone(), cos, sin, cu_seqlens, torch.arange(8).int()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 2, 15)}, r"x is \[8, 2, 15\]"),
        ({"x": torch.zeros(8, 2, 16, dtype=torch.float64)}, "x has dtype torch.float64"),
        ({"x": torch.zeros(8, 16, 2).transpose(1, 2)}, "last dimension contiguous"),
        ({"cos": torch.zeros(50, 7)}, r"cos is \[50, 7\]"),
        ({"sin": torch.zeros(49, 8)}, r"sin is \[49, 8\]"),
        ({"sin": torch.zeros(50, 8).bfloat16()}, "sin is .* torch.bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens is .* torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens goes from 0 to 7"),
        ({"places": torch.zeros(7, dtype=torch.int32)}, r"places is \[7\]"),
        ({"places": torch.zeros(16, dtype=torch.int32)[::2]}, "places must be contiguous"),
    ],
)
def test_bad_arguments_are_named(change, message):
    _, x, cos, sin, cu_seqlens = case([3, 5], 2, 16)
    args = {"x": x, "cos": cos, "sin": sin, "cu_seqlens": cu_seqlens, "places": None}
    op.rotate(**args)
    with pytest.raises(ValueError, match=message):
        op.rotate(**{**args, **change})
