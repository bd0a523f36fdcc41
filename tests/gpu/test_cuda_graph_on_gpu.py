"""Graphs, low precision and reproducibility on the device at hand."""

import copy
import threading

import pytest
import torch
from bert_models import HEADS, ids, make, right_padded, run

import clinfast
from clinfast import patch
from clinfast.engine.executors.cuda_graph import GraphExecutor
from clinfast.engine.precision import fp8_refusal
from clinfast.ops import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning"),
]
LENGTHS = [[20, 7, 13], [1], [64], [16, 16], [40, 1, 17, 33, 2, 9, 64, 5], [3] * 17]
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}


@pytest.fixture(autouse=True)
def kernels():
    reasons = [registry.unavailable(name) for name in ("triton", "cuda")]
    if None not in reasons:
        pytest.skip("; ".join(map(str, reasons)))


def batch_of(lengths):
    mask = right_padded(lengths)
    return {"input_ids": ids(*mask.shape, seed=sum(lengths)).cuda(), "attention_mask": mask.cuda()}


def encoder_of(model):
    ((_, _, forward),) = patch.find_patched(model)
    return forward.encoder


def optimized(head="base", dtype=torch.bfloat16, **options):
    return clinfast.optimize(make(head, dtype=dtype, **WIDE).cuda(), strict=True, **options)


def op_by_op(model, **batch):
    encoder = encoder_of(model)
    graphs, encoder.graphs = encoder.graphs, None
    try:
        return run(model, **batch)
    finally:
        encoder.graphs = graphs


def assert_close(a, b, mask, dtype):
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for name, expected in b.items():
        rows = mask.bool() if expected.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(a[name][rows], expected[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("head", HEADS)
def test_replays_give_what_op_by_op_gives(head, padding, dtype):
    model = optimized(head, dtype, padding=padding)
    graphs = encoder_of(model).graphs
    assert type(graphs) is GraphExecutor
    for lengths in LENGTHS:
        batch = batch_of(lengths)
        replays = graphs.pool.replays
        first, second = run(model, **batch), run(model, **batch)
        assert graphs.pool.off is None and graphs.pool.replays == replays + 2, graphs.describe()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_close(first, op_by_op(model, **batch), batch["attention_mask"], dtype)


def test_nothing_is_captured_after_warmup_and_memory_stands_still():
    model = optimized("token")
    clinfast.warmup(model, lengths=[16, 40, (20, 7, 13)])
    graphs = encoder_of(model).graphs
    captures, batches = graphs.pool.captures, [batch_of([40]), batch_of([16]), batch_of([20, 7, 13])]
    for batch in batches:
        run(model, **batch)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(50):
        for batch in batches:
            run(model, **batch)
    assert graphs.pool.captures == captures and torch.cuda.memory_reserved() == reserved


def test_threads_on_streams_of_their_own():
    model = optimized("token")
    batches = [batch_of(lengths) for lengths in LENGTHS]
    expected = [run(model, **batch) for batch in batches]
    torch.cuda.synchronize()
    failures = []

    def work(me):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
                for i in range(60):
                    at = (me + i) % len(batches)
                    found = run(model, **batches[at])
                    torch.cuda.current_stream().synchronize()
                    assert_close(found, expected[at], batches[at]["attention_mask"], torch.bfloat16)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert encoder_of(model).graphs.pool.off is None


def test_stale_weights_and_bad_ids():
    model = optimized("token", torch.float32)
    batch = batch_of([20, 7, 13])
    run(model, **batch)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(-0.7)
    assert_close(run(model, **batch), run(copy.deepcopy(model), **batch), batch["attention_mask"], torch.float32)
    for shape in ((2, 8), (9, 60)):
        bad = ids(*shape).cuda()
        bad[1, 3] = 97
        with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 97"):
            model(input_ids=bad, attention_mask=torch.ones_like(bad))


def test_under_the_callers_own_capture():
    model = clinfast.optimize(make("base", dtype=torch.bfloat16, **WIDE).cuda())
    batch = batch_of([16, 16])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), clinfast.disabled(model):
        run(model, **batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = run(model, **batch)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(captured, run(model, **batch), batch["attention_mask"], torch.bfloat16)


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    model = optimized("token")
    batch = batch_of([20, 7, 13])
    before = run(model, **batch)
    model.to("cuda:1")
    moved = run(model, **{name: x.to("cuda:1") for name, x in batch.items()})
    assert_close({k: v.cpu() for k, v in moved.items()}, {k: v.cpu() for k, v in before.items()},
                 batch["attention_mask"].cpu(), torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reproducible_notes_have_the_same_bits_in_any_batch(dtype):
    if registry.unavailable("triton") is not None:
        pytest.skip("fixed tiles are Triton's")
    model = optimized("token", dtype, reproducible=True)
    assert clinfast.report(model).units[0].facts["reproducible"]
    note = ids(1, 20, seed=5).cuda()
    alone = run(model, input_ids=note, attention_mask=torch.ones_like(note))["logits"]
    for others in ([64], [1, 2, 3], [40] * 15, [5] * 63):
        mask = right_padded([20, *others]).cuda()
        batch = ids(*mask.shape, seed=9).cuda()
        batch[0, :20] = note[0]
        assert torch.equal(run(model, input_ids=batch, attention_mask=mask)["logits"][0, :20], alone[0])


def test_fp8():
    if (reason := fp8_refusal("cuda")) is not None:
        with pytest.raises(clinfast.Unsupported, match="fp8"):
            optimized("token", precision="fp8")
        pytest.skip(reason)
    model = optimized("token", precision="fp8")
    found = clinfast.verify(model, batch_of([40, 1, 17, 33]))
    assert found.cosine > 0.95 and "fp8" in str(clinfast.report(model))
    assert encoder_of(model).graphs.pool.replays
