"""layer_norm, gelu, embedding, pooling: rows in, rows out."""

import pytest
import test_embedding as embeddings
import test_rotate as rotations
import torch
from helpers import SENTINEL, assert_within_budget, offset_view

from clinfast.backends.triton import embedding as embedding_backend
from clinfast.backends.triton import gelu as gelu_backend
from clinfast.backends.triton import launch
from clinfast.backends.triton import layer_norm as norm_backend
from clinfast.backends.triton import pooling as pooling_backend
from clinfast.backends.triton import rotate as rotate_backend
from clinfast.ops import embedding, gate, gelu, layer_norm, linear, pooling, registry, rotate


def around(view):
    """The larger tensor that `offset_view` made."""
    return view.as_strided(view._base.shape, view._base.stride(), 0)


@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (3, 7), (19, 384), (5, 768), (2, 1023), (3, 1030), (1, 8192)])
def test_layer_norm(dtype, rows, hidden):
    g = torch.Generator().manual_seed(rows)
    x, residual = (offset_view((torch.randn(rows, hidden, generator=g) * 3 + 5).to(dtype)) for _ in "ab")
    weight, shift, bias = (torch.randn(hidden, generator=g) for _ in "abc")
    for second in (residual, None):
        exact = layer_norm.reference(x.double(), None if second is None else second.double(), weight, shift, 1e-12)
        stock = layer_norm.reference(x, second, weight, shift, 1e-12)
        assert_within_budget(layer_norm.layer_norm(x, second, weight, shift, 1e-12), stock, exact)
    biased = norm_backend.with_bias(x, residual, bias, weight, shift, 1e-5)
    exact = layer_norm.reference(x.double() + bias, residual.double(), weight, shift, 1e-5)
    assert_within_budget(biased, layer_norm.reference((x + bias).to(dtype), residual, weight, shift, 1e-5), exact)
    assert (around(x)[0] == torch.tensor(SENTINEL, dtype=dtype)).all()


def test_layer_norm_far_from_zero():
    """The variance is not E[x^2] - E[x]^2: at a mean of 1e4 that would have no digit left."""
    x = 1e4 + torch.randn(4, 768, generator=torch.Generator().manual_seed(0))
    ours = layer_norm.layer_norm(x, None, torch.ones(768), torch.zeros(768), 1e-12)
    exact = layer_norm.reference(x.double(), None, torch.ones(768), torch.zeros(768), 1e-12)
    assert (ours - exact).abs().max() < 1e-3


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (7, 33), (5, 1030)])
def test_gelu(dtype, approximate, rows, hidden):
    g = torch.Generator().manual_seed(rows)
    x = offset_view((torch.randn(rows, hidden, generator=g) * 3).to(dtype))
    bias = torch.randn(hidden, generator=g)
    for b in (None, bias):
        exact = gelu.reference(x.double(), b, approximate)
        assert_within_budget(gelu.gelu(x, b, approximate), gelu.reference(x, b, approximate), exact)


def test_gelu_over_all_16_bit_inputs():
    """The cheaper tails are no change: total relative error within half an ulp and the fit's own, negative tail too."""
    for kind, fit in ((torch.bfloat16, 6.5e-4), (torch.float16, 4e-5)):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(kind)
        every = every[torch.isfinite(every)].view(1, -1)
        ours = gelu.gelu(every).double()
        x = every.double()
        exact = x * 0.5 * torch.special.erfc(-x / 2**0.5)
        least = torch.finfo(kind).smallest_normal
        at = exact.abs() > 4 * least
        relative = ((ours - exact).abs() / exact.abs())[at].max()
        assert relative < torch.finfo(kind).eps / 2 + fit, relative
        assert ((ours - exact).abs()[~at] <= 2 * least).all()


def test_gelu_of_fp32():
    x = torch.cat([torch.linspace(-14, 14, 40001), torch.tensor([-0.0, 1e-30, -1e-30])]).view(1, -1)
    exact = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    at = exact.abs() > 1e-37
    assert ((gelu.gelu(x) - exact).abs() / exact.abs())[at].max() < 2e-5
    near = at & (x > -4)
    assert ((gelu.gelu(x) - exact).abs() / exact.abs())[near].max() < 2e-6


def test_gelu_of_what_is_not_finite():
    x = torch.tensor([[float("-inf"), float("inf"), float("nan")]])
    for approximate in ("none", "tanh"):
        ours = gelu.gelu(x, None, approximate)[0]
        assert ours[0] == 0 and ours[1] == float("inf") and ours[2].isnan()


def test_tanh_keeps_small_arguments():
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.logspace(-30, 0, 500)]).view(1, -1)
    ours = torch.empty_like(x)
    launch.launch(
        "gelu_kernel", (1, -(-x.shape[1] // 512), 1), (x, None, ours, 1, x.shape[1], x.shape[1], x.shape[1]),
        ("tanh", 4, 512),
    )  # fmt: skip
    exact = linear.activate(x.double(), "tanh")
    assert ((ours - exact).abs() <= 2e-6 * exact.abs()).all()


@pytest.mark.parametrize(("batch", "seqlen", "hidden"), [(1, 1, 1), (2, 7, 33), (3, 40, 384), (1, 20, 1023)])
def test_embedding(dtype, batch, seqlen, hidden):
    for types, table, placed, out in (
        (True, True, False, None), (False, True, True, torch.float32), (True, False, False, None),
        (False, False, True, torch.float16),
    ):  # fmt: skip
        args = embeddings.case(batch, seqlen, hidden, dtype, types, table, keep=0.8, out=out, placed=placed)
        for i in (4, 5) + ((6,) if table else ()):
            args[i] = offset_view(args[i])
        for i in (0, 1):
            args[i] = None if args[i] is None else args[i].int().t().contiguous().t()
        assert_within_budget(embedding.embedding(*args), *embeddings.stock_and_exact(args))
        assert torch.equal(embedding_backend.prechecked(*args), embedding.embedding(*args))


@pytest.mark.parametrize("hidden", [1, 384])
def test_embedding_without_a_layer_norm_is_the_sum(dtype, hidden):
    for table, placed, out in ((True, True, torch.float32), (False, False, dtype)):
        args = embeddings.case(2, 9, hidden, dtype, table=table, out=out, placed=placed)
        args[7] = args[8] = None
        tables = [None if a is None else a.float() for a in args[4:7]]
        assert torch.equal(embedding.embedding(*args), embedding.reference(*args[:4], *tables, *args[7:]))
    args[7] = torch.ones(hidden)
    with pytest.raises(ValueError, match="one of weight and shift is None"):
        embedding.embedding(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 40}, r"input_ids at row 1, column 3 is 40; word has 40 rows"),
        ({0: -1}, r"input_ids at row 1, column 3 is -1"),
        ({1: 2}, r"token_type_ids at row 1, column 3 is 2"),
        ({10: 60}, r"the position at row 0, column 4 is 64; position has 64 rows"),
    ],
)
def test_embedding_reads_nothing_outside(change, message):
    args = embeddings.case(2, 6, 32, keep=1)
    for at, value in change.items():
        if at == 10:
            args[at] = value
        else:
            args[at][1, 3] = value
    with pytest.raises(IndexError, match=message):
        embedding.embedding(*args)
    ours = embedding_backend.prechecked(*args)
    wrong = ours.isnan().any(1)
    assert wrong.any() and torch.equal(wrong, ours.isnan().all(1))


def test_embedding_refuses_an_index_outside():
    args = embeddings.case(2, 6, 32, keep=1)
    args[2][5] = 12
    with pytest.raises(IndexError, match=r"indices\[5\] is 12"):
        embedding.embedding(*args)


@pytest.mark.parametrize("kind", ["first_token", "mean", "max"])
def test_pooling(dtype, kind):
    lengths = [5, 0, 1, 40, 17, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    g = torch.Generator().manual_seed(1)
    x = offset_view(torch.randn(sum(lengths), 200, generator=g).to(dtype))
    exact = pooling.reference(x.double(), cu_seqlens, kind)
    ours = pooling.pooling(x, cu_seqlens, kind)
    assert_within_budget(ours, pooling.reference(x, cu_seqlens, kind), exact)
    assert (ours[1] == 0).all() and (ours[5] == 0).all()
    alone = pooling.pooling(x[6:46].contiguous(), torch.tensor([0, 40], dtype=torch.int32), kind)
    assert torch.equal(alone[0], ours[3])


def test_pooling_keeps_nan():
    x = torch.randn(6, 130)
    x[4, 7] = float("nan")
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    for kind in ("mean", "max"):
        assert pooling.pooling(x, cu_seqlens, kind).isnan().sum() == 1


def test_pooling_refuses_boundaries_outside_and_reads_nothing_there():
    x = torch.randn(6, 16)
    for bounds in ([0, 9], [3, 2], [-1, 4]):
        with pytest.raises(ValueError, match="cu_seqlens gives note 0"):
            pooling.pooling(x, torch.tensor(bounds, dtype=torch.int32), "mean")


def test_rows_that_are_too_wide_go_to_the_next_backend_with_the_reason(monkeypatch):
    partial = registry.Backend("clinfast.backends.triton", ("cpu",), partial=True)
    monkeypatch.setitem(registry.BACKENDS, "triton", partial)
    monkeypatch.setattr(registry, "substitutes", [])
    registry.implementation.cache_clear()
    registry.calls.clear()
    x, weight = torch.randn(2, 9000), torch.ones(9000)
    try:
        ours = layer_norm.layer_norm(x, None, weight, weight, 1e-5)
    finally:
        registry.implementation.cache_clear()
    torch.testing.assert_close(ours, torch.nn.functional.layer_norm(x, (9000,), weight, weight, 1e-5))
    assert registry.calls == {"layer_norm[torch]": 1}
    assert registry.substitutes == [
        "torch serves layer_norm where hidden is 9000, and Triton's kernel has rows of at most 8192"
    ]


def norm(x, residual=None, weights=None):
    weight = torch.ones(weights or x.shape[1])
    return layer_norm.layer_norm(x, residual, weight, torch.ones(x.shape[1]), 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm(torch.zeros(2, 4).double()), "x has dtype"),
        (lambda: norm(torch.zeros(2, 4), torch.zeros(3, 4)), "residual has shape"),
        (lambda: norm(torch.zeros(2, 4), weights=5), "weight is"),
        (lambda: gelu.gelu(torch.zeros(4, 2).t()), "x has strides"),
        (lambda: gelu_backend.gelu(torch.zeros(2, 4), None, "erf"), "approximate is 'erf'"),
        (lambda: gelu.gelu(torch.zeros(2, 4), torch.zeros(3)), "bias is"),
        (lambda: pooling_backend.pooling(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), "sum"), "kind is 'sum'"),
        (lambda: pooling.pooling(torch.zeros(2, 4), torch.zeros(2), "max"), "cu_seqlens is"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (7, 33), (5, 515)])
def test_gate(dtype, activation, rows, outputs):
    x = offset_view((torch.randn(rows, 2 * outputs, generator=torch.Generator().manual_seed(rows)) * 3).to(dtype))
    ours = gate.gate(x, activation)
    assert_within_budget(ours, gate.reference(x, activation), gate.reference(x.double(), activation))


@pytest.mark.parametrize("head_dim", [2, 32, 64, 80])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 17, 5], [0, 0, 30, 0]])
@pytest.mark.parametrize("placed", [False, True])
def test_rotate(dtype, lengths, head_dim, placed):
    big, x, cos, sin, cu_seqlens = rotations.case(lengths, 6, head_dim, dtype)
    places = (torch.arange(x.shape[0]) * 7 % 99 - 49).int() if placed else None
    before = x.clone()
    rotate.rotate(x, cos, sin, cu_seqlens, places)
    exact = rotate.reference(before.double(), cos.double(), sin.double(), cu_seqlens, places)
    assert_within_budget(x, rotate.reference(before, cos, sin, cu_seqlens, places), exact)
    x.fill_(SENTINEL)
    assert (big == torch.tensor(SENTINEL, dtype=dtype)).all()


def test_rotate_leaves_what_is_beyond_the_tables():
    _, x, cos, sin, cu_seqlens = rotations.case([52], 3, 16)
    before = x.clone()
    with pytest.raises(IndexError, match="token 50 is beyond"):
        rotate.rotate(x, cos, sin, cu_seqlens)
    rotate_backend.prechecked(x, cos, sin, cu_seqlens)
    assert torch.equal(x[50:], before[50:]) and not torch.equal(x[:50], before[:50])
