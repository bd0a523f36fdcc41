"""Every op of the Triton backend on the device at hand, against the reference in float64, and whole models."""

import copy

import pytest
import torch

import clinfast
from clinfast.ops import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def ready():
    reason = registry.unavailable("triton")
    if reason is not None:
        pytest.skip(reason)


def within(ours, stock, exact):
    assert torch.isfinite(ours).all()
    floor = max(torch.finfo(ours.dtype).eps, 1e-6) * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * (stock.double() - exact).abs().max() + 2 * floor


def cuda(*tensors):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [7, 384, 768, 1024, 1023, 8192])
def test_layer_norm(dtype, hidden):
    from clinfast.ops import layer_norm as op

    x, residual = (torch.randn(33, hidden, dtype=torch.float64).to("cuda", dtype) for _ in "ab")
    weight, shift = (torch.randn(hidden, device="cuda") for _ in "ab")
    for second in (residual, None):
        exact = op.reference(x.double(), None if second is None else second.double(), weight, shift, 1e-12)
        stock = op.reference(x, second, weight, shift, 1e-12)
        within(op.layer_norm(x, second, weight, shift, 1e-12), stock, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(dtype, approximate):
    from clinfast.ops import gelu as op

    x = (torch.randn(64, 1000, device="cuda") * 4).to(dtype)
    bias = torch.randn(1000, device="cuda")
    exact = op.reference(x.double(), bias, approximate)
    within(op.gelu(x, bias, approximate), op.reference(x, bias, approximate), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 64, 65, 700], [16] * 200, [128] * 40])
def test_attention(dtype, head_dim, lengths):
    from clinfast.backends import torch as stock
    from clinfast.ops import attention as op

    qkv = torch.randn(sum(lengths), 3, 4, head_dim, device="cuda").to(dtype)
    q, k, v = qkv.unbind(1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    args = (cu_seqlens, cu_seqlens, None, head_dim**-0.5)
    exact = stock.attention(*(t.double() for t in (q, k, v)), *args)
    within(op.attention(q, k, v, *args), stock.attention(q, k, v, *args), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("places", [False, True])
def test_attention_biased(dtype, head_dim, places):
    from clinfast.ops import attention_biased as op

    lengths = [300, 1, 65, 0, 17]
    q, k, v = torch.randn(sum(lengths), 3, 4, head_dim, device="cuda").to(dtype).unbind(1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    bias = torch.randn(4, 257, device="cuda")
    at = torch.arange(sum(lengths), device="cuda").mul(2).int() if places else None
    args = (cu_seqlens, cu_seqlens, None, head_dim**-0.5, bias, at, at)
    exact, stock = op.reference(*(t.double() for t in (q, k, v)), *args), op.reference(q, k, v, *args)
    before = registry.calls["attention_biased[triton]"]
    within(op.attention_biased(q, k, v, *args), stock, exact)
    assert registry.calls["attention_biased[triton]"] == before + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_tokens_and_used_keys(dtype):
    from clinfast.backends import torch as stock
    from clinfast.ops import attention as op

    keys = [200, 1, 40, 129]
    cu_k = torch.tensor([0, *keys]).cumsum(0).to("cuda", torch.int32)
    cu_q = torch.arange(5, device="cuda", dtype=torch.int32)
    used = torch.tensor([150, 1, 0, 129], device="cuda", dtype=torch.int32)
    q = torch.randn(4, 4, 64, device="cuda").to(dtype)
    k, v = torch.randn(sum(keys), 2, 4, 64, device="cuda").to(dtype).unbind(1)
    exact = stock.attention(q.double(), k.double(), v.double(), cu_q, cu_k, used, 0.125)
    ours = op.attention(q, k, v, cu_q, cu_k, used, 0.125)
    within(ours, stock.attention(q, k, v, cu_q, cu_k, used, 0.125), exact)
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "tanh"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 768, 3072), (77, 768, 3072), (3000, 384, 1536), (40, 33, 7)]
)
def test_product(dtype, activation, rows, inputs, outputs):
    from clinfast.backends.triton.linear import GpuLinear
    from clinfast.ops import linear as op

    x = torch.randn(rows, inputs, device="cuda").to(dtype)
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    bias, residual = torch.randn(outputs, device="cuda").to(dtype), torch.randn(rows, outputs, device="cuda").to(dtype)
    linear = GpuLinear(weight, bias, dtype)
    for second in (None, residual):
        exact = op.reference(
            x.double(), weight.double(), bias.double(), activation, None if second is None else second.double()
        )
        stock = op.reference(x, weight, bias, activation, second)
        within(linear.product(x, activation, second), stock, exact)


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (8, 300), (40, 90), (3, 2000)])
@pytest.mark.parametrize("keep_padding", [False, True])
def test_packing(batch, seqlen, keep_padding):
    from clinfast.backends.triton import packing as backend
    from clinfast.ops import packing as op

    ids = torch.randint(0, 50, (batch, seqlen))
    mask = torch.rand(batch, seqlen) < 0.6
    expected = op.pack_reference(ids, mask, None, 50, 2, keep_padding)
    ours = op.pack(ids.cuda(), mask.cuda(), None, 50, 2, keep_padding)
    tokens = int(expected[3][0])
    assert ours[3].tolist() == expected[3].tolist() and ours[0].tolist() == expected[0].tolist()
    assert ours[1][:tokens].tolist() == expected[1][:tokens].tolist() and ours[2].tolist() == expected[2].tolist()
    packed = torch.randn(tokens, 96, device="cuda")
    padded = backend.prechecked(packed, ours[1], batch * seqlen, torch.float32)
    unpacked = op.unpack_reference(packed.cpu(), expected[1][:tokens], batch * seqlen, torch.float32)
    assert torch.equal(padded.cpu(), unpacked)
    assert torch.equal(op.position_ids(ids.cuda(), 1).cpu(), op.position_ids_reference(ids, 1))


@pytest.mark.parametrize("kind", ["first_token", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling(kind, dtype):
    from clinfast.ops import pooling as op

    lengths = [5, 0, 1, 400]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    x = torch.randn(406, 768, device="cuda").to(dtype)
    exact = op.reference(x.double().cpu(), cu_seqlens.cpu(), kind).cuda()
    within(op.pooling(x, cu_seqlens, kind), exact.to(dtype), exact)


def bert(dtype):
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=256, num_attention_heads=4, num_hidden_layers=3, intermediate_size=512
    )
    return BertForTokenClassification(config).eval().to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_model(dtype):
    stock = bert(dtype)
    exact, model = copy.deepcopy(stock).double(), clinfast.optimize(copy.deepcopy(stock), strict=True)
    ids = torch.randint(0, 200, (7, 90), device="cuda")
    mask = (torch.arange(90) < torch.tensor([90, 1, 33, 64, 65, 2, 17])[:, None]).long().cuda()
    registry.calls.clear()
    with torch.no_grad():
        ours, theirs, truth = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (model, stock, exact))
    within(ours, theirs, truth)
    assert registry.calls["attention[triton]"] == 3 and clinfast.report(model).calls_fast == 1
    assert not [label for label in registry.calls if label.endswith("[torch]")]


def test_an_id_out_of_range_raises_on_the_host_and_the_device_lives():
    model = clinfast.optimize(bert(torch.float32))
    ids = torch.zeros(2, 5, dtype=torch.long, device="cuda")
    ids[1, 2] = 200
    with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids\[1, 2\] is 200"):
        model(input_ids=ids)
    assert torch.ones(3, device="cuda").sum() == 3


def test_under_the_callers_capture_stock_serves():
    model = clinfast.optimize(bert(torch.float16))
    ids = torch.randint(0, 200, (2, 16), device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(input_ids=ids)
        torch.cuda.current_stream().wait_stream(side)
        before = clinfast.report(model).calls_stock
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(input_ids=ids)
    assert clinfast.report(model).calls_stock == before + 1
