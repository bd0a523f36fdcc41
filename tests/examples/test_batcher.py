"""The batcher with a fake model: what shares a batch, what is refused, what cancelled and failing jobs do to others."""

import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
from embedding_service.batcher import Batcher, Closed, Full


class Model:
    """Doubles its texts, when `open` is set; remembers its batches."""

    def __init__(self):
        self.open, self.entered, self.batches = threading.Event(), threading.Event(), []
        self.open.set()

    def __call__(self, texts):
        self.entered.set()
        assert self.open.wait(20)
        self.batches.append(texts)
        if "bad" in texts:
            raise ValueError("a bad text")
        return [text * 2 for text in texts]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def start(model):
    started = []

    def starter(**options):
        batcher = Batcher(model, **{"window": 0.0, "token_budget": 100, "queue_tokens": 1000} | options)
        started.append(batcher)
        return batcher

    yield starter
    model.open.set()
    for batcher in started:
        assert batcher.close(20)


def busy(model, batcher):
    """A job that the worker is held in; what is queued from now on waits."""
    model.open.clear()
    model.entered.clear()
    job = batcher.submit(["busy"], 1)
    assert model.entered.wait(20)
    return job


def test_jobs_share_batches_under_the_budget_in_order(model, start):
    batcher = start(token_budget=10)
    busy(model, batcher)
    jobs = [batcher.submit([f"{i}", "x"], tokens) for i, tokens in enumerate([4, 6, 3, 30, 5, 5, 1])]
    assert batcher.waiting_jobs == 7 and batcher.waiting_tokens == 54
    model.open.set()
    assert [job.result(20) for job in jobs] == [[f"{i}" * 2, "xx"] for i in range(7)]
    assert [texts[::2] for texts in model.batches] == [["busy"], ["0", "1"], ["2"], ["3"], ["4", "5"], ["6"]]
    assert (batcher.batches, batcher.texts, batcher.tokens) == (6, 15, 55)
    assert batcher.waiting_jobs == batcher.waiting_tokens == 0


def test_the_first_job_waits_for_others_but_not_past_the_budget(model, start):
    batcher = start(window=20.0, token_budget=10)
    begin = time.monotonic()
    jobs = [batcher.submit(["a"], 5), batcher.submit(["b"], 5)]
    assert [job.result(10) for job in jobs] == [["aa"], ["bb"]]
    assert time.monotonic() - begin < 10 and model.batches == [["a", "b"]]


def test_the_window_ends(model, start):
    assert start(window=0.01).submit(["a"], 5).result(10) == ["aa"]


def test_a_full_queue_refuses_and_says_when_to_come_back(model, start):
    batcher = start(queue_tokens=10)
    busy(model, batcher)
    large = batcher.submit(["a"], 50)
    with pytest.raises(Full, match="50 tokens are waiting and the queue holds 10") as full:
        batcher.submit(["b"], 1)
    assert full.value.retry_after > 0
    large.cancel()
    small = batcher.submit(["b"], 10)
    with pytest.raises(Full):
        batcher.submit(["c"], 1)
    model.open.set()
    assert small.result(20) == ["bb"] and batcher.submit(["c"], 1).result(20) == ["cc"]
    assert batcher.cancelled == 1


def test_a_cancelled_job_is_not_computed_and_breaks_nothing(model, start):
    batcher = start()
    running = busy(model, batcher)
    jobs = [batcher.submit([f"{i}"], 1) for i in range(4)]
    assert jobs[0].cancel() and jobs[2].cancel() and not running.cancel()
    model.open.set()
    assert running.result(20) == ["busybusy"]
    assert [jobs[1].result(20), jobs[3].result(20)] == [["11"], ["33"]]
    assert model.batches == [["busy"], ["1", "3"]] and batcher.cancelled == 2
    with pytest.raises(CancelledError):
        jobs[0].result(0)


def test_a_queue_of_cancelled_jobs_alone(model, start):
    batcher = start()
    busy(model, batcher)
    jobs = [batcher.submit(["x"], 1) for _ in range(3)]
    assert all(job.cancel() for job in jobs)
    model.open.set()
    assert batcher.submit(["y"], 1).result(20) == ["yy"] and model.batches == [["busy"], ["y"]]


def test_only_the_job_at_fault_fails(model, start):
    batcher = start()
    busy(model, batcher)
    jobs = [batcher.submit([text], 1) for text in ("a", "bad", "c")]
    model.open.set()
    assert jobs[0].result(20) == ["aa"] and jobs[2].result(20) == ["cc"]
    with pytest.raises(ValueError, match="a bad text"):
        jobs[1].result(20)


def test_close_finishes_what_waits_and_takes_no_more(model, start):
    batcher = start(window=20.0)
    busy_job = busy(model, start())
    jobs = [batcher.submit([f"{i}"], 1) for i in range(3)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    model.open.set()
    assert [job.result(10) for job in jobs] == [["00"], ["11"], ["22"]] and busy_job.result(10)
    closing.join(10)
    assert not batcher.alive
    with pytest.raises(Closed, match="shutting down"):
        batcher.submit(["late"], 1)


def test_close_in_time_even_where_the_model_is_not(model, start):
    batcher = start()
    running = busy(model, batcher)
    waiting, cancelled = batcher.submit(["a"], 1), batcher.submit(["b"], 1)
    cancelled.cancel()
    assert batcher.close(0.01) is False
    with pytest.raises(Closed, match="before this was computed"):
        waiting.result(10)
    model.open.set()
    assert running.result(10) == ["busybusy"]


def test_many_threads(model, start):
    batcher = start(window=0.001, queue_tokens=10**6)
    jobs = []

    def send(name):
        for i in range(50):
            job = batcher.submit([f"{name}-{i}"], 3)
            jobs.append((f"{name}-{i}", job))
            if i % 7 == 0:
                job.cancel()

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wait([job for _, job in jobs], 20)
    for name, job in jobs:
        assert job.cancelled() or job.result(0) == [name * 2]
    assert len(jobs) == 400 and batcher.cancelled == sum(job.cancelled() for _, job in jobs)
    assert batcher.texts == 400 - batcher.cancelled and batcher.waiting_tokens == 0
