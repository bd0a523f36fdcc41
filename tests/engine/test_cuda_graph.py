"""The graph executor on a stand-in for the device: what is computed, when it is not, and who may run beside whom."""

import copy
import threading

import pytest
import torch
from bert_models import HEADS, assert_equal, ids, make, right_padded, run
from engine_fakes import FakeDriver, encoder_of, with_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RobertaConfig, RobertaModel

import clinfast
from clinfast.backends import torch as torch_backend
from clinfast.engine import buckets
from clinfast.engine.executors import cuda_graph
from clinfast.engine.graph_pool import ASKED, GraphPool
from clinfast.ops.packing import PackedBuffers, PackInto

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::clinfast.ClinfastWarning"),
]
LENGTHS = [[20, 7, 13], [1], [64], [16, 16], [40, 1, 17, 33, 2, 9, 64, 5], [3] * 17]


def batch_of(lengths, mask=True):
    batch = {"input_ids": ids(len(lengths), max(lengths), seed=sum(lengths))}
    return batch | ({"attention_mask": right_padded(lengths)} if mask else {})


@given(tokens=st.integers(1, buckets.MAX_ROWS), batch=st.integers(1, buckets.MAX_NOTES))
def test_a_bucket_holds_its_batch_and_wastes_less_than_an_eighth(tokens, batch):
    rows, notes = buckets.bucket(tokens, batch)
    assert tokens <= rows <= buckets.MAX_ROWS and batch <= notes <= buckets.MAX_NOTES
    assert rows - tokens < max(buckets.LEAST_ROWS, tokens / 8)
    assert buckets.bucket(rows, notes) == (rows, notes)


def test_there_are_few_buckets_and_an_end_to_them():
    assert len({buckets.rows_for(n) for n in range(1, buckets.MAX_ROWS + 1)}) == 56
    assert buckets.bucket(buckets.MAX_ROWS + 1, 1) is None and buckets.bucket(1, buckets.MAX_NOTES + 1) is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_buffers_hold_what_pack_says_and_valid_values_elsewhere(data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    buffers = PackedBuffers.of(160, 16, torch.device("cpu"))
    for _ in range(2):  # the second batch finds the rows of the first
        batch, seqlen = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 20))
        keep, counted = data.draw(st.booleans()), data.draw(st.booleans())
        input_ids = torch.randint(-1, 12, (batch, seqlen), generator=g)
        mask = torch.rand(batch, seqlen, generator=g) < 0.7 if data.draw(st.booleans()) else None
        types = torch.randint(0, 3, (batch, seqlen), generator=g) if data.draw(st.booleans()) else None
        constants = PackInto(10, 2, 3, 1 if counted else None, keep)
        torch_backend.pack_into(input_ids, mask, types, constants, 160, 16, buffers)
        cu, indices, used, facts = torch_backend.pack(input_ids, mask, types, 10, 2, keep)
        tokens = int(facts[0])
        at = indices[:tokens].long()
        assert torch.equal(buffers.facts, facts) and torch.equal(buffers.indices[:tokens], indices[:tokens])
        assert torch.equal(buffers.cu_seqlens[: batch + 1], cu) and torch.equal(buffers.seqused_k[:batch], used)
        assert (buffers.cu_seqlens[batch:17] == tokens).all() and buffers.cu_seqlens[17] == 160
        assert (buffers.seqused_k[batch:] == 0).all()
        flat = input_ids.reshape(-1)[at]
        assert torch.equal(buffers.input_ids[:tokens].long(), torch.where((flat < 0) | (flat >= 10), 0, flat))
        places = torch_backend.position_ids(input_ids, 1).reshape(-1)[at] if counted else (at % seqlen + 3)
        assert torch.equal(buffers.position_ids[:tokens].long(), places.long())
        for name, size in (("input_ids", 10), ("token_type_ids", 2), ("position_ids", 32), ("indices", 160)):
            values = getattr(buffers, name)
            assert (values >= 0).all() and (values < size).all()


@pytest.mark.parametrize("padding", ["remove", "keep"])
@pytest.mark.parametrize("head", HEADS)
def test_replays_give_what_the_eager_executor_gives(head, padding):
    model = clinfast.optimize(make(head), padding=padding, strict=True)
    encoder, (_, graphs) = encoder_of(model), with_graphs(model)
    for with_mask in (True, False):
        for lengths in LENGTHS:
            batch = batch_of(lengths, with_mask)
            encoder.graphs = None
            expected = run(model, **batch)
            encoder.graphs = graphs
            before = encoder.graphs.pool.replays
            for _ in range(2):
                assert_equal(run(model, **batch), expected)
            assert encoder.graphs.pool.replays == before + 2
    assert encoder.graphs.pool.captures == encoder.graphs.pool.driver.captures < 2 * len(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_are_counted_and_types_that_are_given(dtype):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=97, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=96,
        max_position_embeddings=64, pad_token_id=1, type_vocab_size=3,
    )  # fmt: skip
    model = clinfast.optimize(RobertaModel(config).eval().to(dtype), strict=True)
    batch = batch_of([20, 7, 13])
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 90 + 3, 1)
    batch["token_type_ids"] = batch["input_ids"] % 3
    expected = run(model, **batch)
    _, graphs = with_graphs(model)
    assert_equal(run(model, **batch), expected)
    assert graphs.pool.replays == 1


def test_chosen_positions_of_a_masked_lm():
    model = clinfast.optimize(make("mlm"), strict=True)
    batch = batch_of([20, 7, 13])
    positions = torch.zeros(3, 20, dtype=torch.bool)
    positions[0, 3] = positions[2, 12] = True
    expected = run(model, **batch, logits_positions=positions)
    _, graphs = with_graphs(model)
    assert_equal(run(model, **batch, logits_positions=positions), expected)
    assert graphs.pool.replays == 1


def test_what_was_returned_is_not_written_to_again():
    for head in ("base", "sequence", "token"):
        model = clinfast.optimize(make(head), strict=True)
        with_graphs(model)
        batches = [batch_of([20, 7, 13]), {**batch_of([20, 7, 13]), "input_ids": ids(3, 20, seed=99)}]
        first = run(model, **batches[0])
        kept = copy.deepcopy(first)
        run(model, **batches[1])
        assert_equal(first, kept)


def test_under_inference_mode_and_outside():
    model = clinfast.optimize(make("base"), strict=True)
    _, graphs = with_graphs(model)
    batch = batch_of([20, 7, 13])
    with torch.inference_mode():
        inside = {k: v.clone() for k, v in run(model, **batch).items()}
    assert_equal(run(model, **batch), inside)
    assert graphs.pool.replays == 2 and graphs.pool.captures == 1


def test_errors_and_refusals_are_those_of_the_eager_executor():
    model = clinfast.optimize(make("base"))
    _, graphs = with_graphs(model)
    for shape in ((2, 8), (9, 60)):
        bad = {"input_ids": ids(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
        bad["input_ids"][1, 3] = 97
        with torch.no_grad(), pytest.raises(IndexError, match=r"input_ids\[1, 3\] is 97"):
            model(**bad)
        left = {"input_ids": ids(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
        left["attention_mask"][0, 0] = 0
        stock = clinfast.report(model).calls_stock
        run(model, **left)
        assert clinfast.report(model).calls_stock == stock + 1
    assert graphs.pool.replays == 2  # of the batches that are too small to ask for their lengths first
    no_pooler = clinfast.optimize(make("no-pooler"), strict=True)
    with_graphs(no_pooler)
    empty = {"input_ids": ids(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    assert (run(no_pooler, **empty)["last_hidden_state"] == 0).all()


def test_stale_weights_are_seen_while_the_device_works():
    model = clinfast.optimize(make("token"), strict=True)
    driver, graphs = with_graphs(model)
    batch = batch_of([20, 7, 13])
    before = run(model, **batch)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(-0.7)
    replays = driver.replays
    after = run(model, **batch)
    assert driver.replays == replays + 2  # one result was thrown away
    expected = run(copy.deepcopy(model), **batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(after["logits"][real], expected["logits"][real], rtol=1e-4, atol=1e-4)
    assert (after["logits"] - before["logits"]).abs().max() > 1e-2
    assert len(graphs.pool.lanes) == 1  # the lane of the old weights is gone
    assert_equal(run(model, **batch), after)
    assert driver.replays == replays + 3


def test_a_change_during_the_replay_is_seen_too():
    model = clinfast.optimize(make("token"), strict=True)
    driver, _ = with_graphs(model)
    batch = batch_of([20, 7, 13])
    run(model, **batch)

    def change():
        driver.before_replay.clear()
        with torch.no_grad():
            model.classifier.bias.add_(5.0)

    driver.before_replay.append(change)
    real = batch["attention_mask"].bool()
    ours, stock = run(model, **batch), run(copy.deepcopy(model), **batch)
    torch.testing.assert_close(ours["logits"][real], stock["logits"][real], rtol=1e-4, atol=1e-4)


def test_a_changed_module_runs_stock_though_the_device_had_begun():
    model = clinfast.optimize(make("base"))
    driver, _ = with_graphs(model)
    batch = batch_of([20, 7, 13])
    run(model, **batch)
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    replays = driver.replays
    assert_equal(run(model, **batch), run(copy.deepcopy(model), **batch))
    assert seen and driver.replays == replays + 1
    assert "encoder.layer.1 has a forward hook" in clinfast.report(model).fallbacks


@pytest.mark.parametrize(
    ("error", "words"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory"), (RuntimeError("no capture"), "no capture")],
)
def test_a_capture_that_fails_leaves_the_model_without_graphs_and_says_so_once(error, words, caplog):
    model = clinfast.optimize(make("base"), strict=True)
    batches = [batch_of([20, 7, 13]), batch_of([5])]
    expected = [run(model, **batch) for batch in batches]
    driver, graphs = with_graphs(model)
    assert_equal(run(model, **batches[0]), expected[0])
    driver.fails = error
    for _ in range(3):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(run(model, **batch), wanted)
    assert [words in record.message for record in caplog.records] == [True]
    assert not graphs.pool.lanes and words in graphs.pool.off
    assert "CUDA graphs: 1 captured, " in str(clinfast.report(model)) and words in str(clinfast.report(model))


def test_a_shape_beyond_the_bounds_runs_op_by_op(monkeypatch):
    model = clinfast.optimize(make("base"), strict=True)
    batches = [batch_of([20, 7, 13]), batch_of([60] * 9)]
    expected = [run(model, **batch) for batch in batches]
    monkeypatch.setattr(buckets, "MAX_ROWS", 64)
    driver, graphs = with_graphs(model, max_bytes=100)
    for batch, wanted in zip(batches, expected, strict=True):
        assert_equal(run(model, **batch), wanted)
    assert driver.replays == 0 and graphs.op_by_op == {
        "a batch beyond the largest graph": 1, "a graph beyond the bound on memory": 1,
    }  # fmt: skip


@pytest.mark.parametrize("limits", [{"max_graphs": 3}, {"max_bytes": 3 << 20}])
def test_the_graph_not_used_for_longest_goes(limits):
    model = clinfast.optimize(make("token"), strict=True)
    driver, graphs = with_graphs(model, **limits)
    for length in (10, 20, 40, 10, 60):  # 20 goes
        run(model, **batch_of([length]))
    pool = graphs.pool
    assert (driver.captures, pool.evictions) == (4, 1)
    assert {key.rows for lane in pool.lanes for key in lane.graphs} == {16, 48, 64}
    for _ in range(ASKED - 1):
        run(model, **batch_of([20]))
    assert driver.captures == 4  # ever new sizes do not capture at every call
    run(model, **batch_of([20]))
    assert driver.captures == 5 and pool.nbytes == 3 << 20
    clinfast.warmup(model, lengths=[10, (30, 18)])
    assert driver.captures == 6  # 10 was there still


@pytest.mark.parametrize("streams", [False, True])
def test_threads_never_share_what_is_in_use(streams):
    model = clinfast.optimize(make("token"), strict=True)
    batches = [batch_of(lengths) for lengths in LENGTHS]
    expected = [run(model, **batch) for batch in batches]
    driver, graphs = with_graphs(model, lanes=3)
    driver.seconds, failures = 0.002, []
    three, first = threading.Barrier(3), iter(range(3))  # the first three replays wait for each other
    driver.before_replay.append(lambda: next(first, None) is None or three.wait(60))

    def work(me):
        if streams:
            driver.streams.current = me
        try:
            for i in range(12):
                at = (me + i) % len(batches)
                assert_equal(run(model, **batches[at]), expected[at])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert driver.replays + sum(graphs.op_by_op.values()) == 72
    assert driver.most_at_once == len(graphs.pool.lanes) == 3
    assert all(not lane.busy for lane in graphs.pool.lanes)


def test_a_stream_whose_lane_is_still_at_work_gets_another():
    driver = FakeDriver()
    pool, device, weights = GraphPool(driver, lanes=2), torch.device("cpu"), object()
    key = buckets.Bucket(16, 1)

    def take(stream):
        driver.streams.current = stream
        lane, captured = pool.acquire(key, device, weights)
        assert captured is None
        pool.release(lane)
        return lane

    first = take(1)
    assert take(1) is first and take(2) is first and driver.waits == 1  # the device is through, and orders itself
    driver.through = False
    second = take(1)
    assert second is not first and len(pool.lanes) == 2
    assert take(1) is second and take(2) is first
    waits = driver.waits
    assert take(3) in (first, second) and driver.waits == waits + 1  # no lane is left: it waits on the device


def test_two_models_have_pools_of_their_own():
    models = [clinfast.optimize(make("base", seed=seed), strict=True) for seed in (1, 2)]
    graphs = [with_graphs(model)[1] for model in models]
    batch = batch_of([20, 7, 13])
    a, b = (run(model, **batch)["last_hidden_state"] for model in models)
    assert not torch.equal(a, b)
    assert graphs[0].pool.lanes[0].pool is not graphs[1].pool.lanes[0].pool


def test_first_token_heads_skip_the_last_layers_unused_rows(monkeypatch):
    model = clinfast.optimize(make("sequence"), strict=True)
    _, graphs = with_graphs(model)
    asked = []
    real = type(graphs.executor)._first_rows
    monkeypatch.setattr(
        type(graphs.executor), "_first_rows", lambda self, *args: asked.append(1) or real(self, *args)
    )
    run(model, **batch_of([20, 7, 13]))
    assert asked and graphs.pool.replays == 1


def test_no_capture_where_graphs_are_switched_off(monkeypatch):
    monkeypatch.setenv("CLINFAST_CUDA_GRAPHS", "0")
    encoder = encoder_of(clinfast.optimize(make("base")))
    assert encoder._make_graphs(torch.device("cuda:0")) is None
    monkeypatch.setenv("CLINFAST_CUDA_GRAPHS", "1")
    assert type(encoder._make_graphs(torch.device("cuda:0")).pool.driver) is cuda_graph.CudaDriver
