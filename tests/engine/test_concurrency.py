"""Threads, forked children, and the gate between them."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bert_models import assert_equal, ids, make, right_padded, run

import clinfast
from clinfast.engine import concurrency
from clinfast.engine.concurrency import ForkSafeLock, Gate

THREADS, CALLS = 8, 20


def work(thread, call):
    lengths = [1 + (thread * 7 + call * 3) % 40, 5, 1 + (thread + call) % 30]
    return {"input_ids": ids(3, max(lengths), seed=100 * thread + call), "attention_mask": right_padded(lengths)}


@pytest.mark.parametrize(("head", "dtype"), [("base", torch.float32), ("sequence", torch.bfloat16)])
def test_eight_threads_get_right_answers(head, dtype, thread_count):
    model = clinfast.optimize(make(head, dtype=dtype))
    expected = {(t, c): run(model, **work(t, c)) for t in range(THREADS) for c in range(CALLS)}
    barrier = threading.Barrier(THREADS)

    def calls(thread):
        barrier.wait(30)
        return [run(model, **work(thread, call)) for call in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(calls, range(THREADS)))
    for thread, found in enumerate(results):
        for call, outputs in enumerate(found):
            assert_equal(outputs, expected[thread, call])
    report = clinfast.report(model)
    assert report.calls_stock == 0 and report.units[0].facts["packs"] == 1


def test_threads_while_the_weights_change_get_old_or_new_answers(one_thread):
    model = clinfast.optimize(make())
    inputs = work(0, 0)
    old = run(model, **inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    new = run(clinfast.optimize(other), **inputs)
    stop = threading.Event()
    found = []

    def calls():
        while not stop.is_set():
            found.append(run(model, **inputs)["last_hidden_state"])

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    model.load_state_dict(other.state_dict(), assign=True)
    time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert_equal(run(model, **inputs), new)
    assert torch.equal(found[0], old["last_hidden_state"])
    assert torch.equal(found[-1], new["last_hidden_state"])


def test_two_models_in_two_threads(one_thread):
    models = [clinfast.optimize(make(seed=seed)) for seed in range(2)]
    expected = [[run(model, **work(0, call)) for call in range(CALLS)] for model in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: [run(model, **work(0, call)) for call in range(CALLS)], models))
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert_equal(a, b)


def test_disabled_is_per_thread(one_thread):
    model = clinfast.optimize(make())
    inside, outside = threading.Event(), threading.Event()

    def other():
        inside.wait(30)
        run(model, **work(0, 0))
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with clinfast.disabled(model):
        inside.set()
        assert outside.wait(30)
        assert clinfast.report(model).calls_fast == 1
        run(model, **work(0, 0))
    thread.join(30)
    assert (clinfast.report(model).calls_fast, clinfast.report(model).calls_stock) == (1, 1)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(concurrency, "_cores", 4)


def in_threads(count, function):
    threads = [threading.Thread(target=function, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread waits for ever"


@pytest.mark.parametrize(("threads_a_call", "limit"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_gate_lets_in_as_many_as_there_is_room_for(four_cores, monkeypatch, threads_a_call, limit):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads_a_call)
    gate, lock, running, most = Gate(), threading.Lock(), 0, 0

    def call(_):
        nonlocal running, most
        for _ in range(20):
            with gate.room():
                with lock:
                    running += 1
                    most = max(most, running)
                time.sleep(0.0005)
                with lock:
                    running -= 1

    in_threads(8, call)
    assert most == limit and not gate._inside


def test_gate_is_free_after_exceptions(four_cores):
    gate = Gate()

    def call(i):
        for error in (ValueError, KeyboardInterrupt, SystemExit):
            try:
                with gate.room():
                    raise error
            except error:
                pass

    in_threads(8, call)
    assert not gate._inside
    with gate.room():
        assert len(gate._inside) == 1


def test_gate_lets_a_call_within_a_call_pass(monkeypatch):
    monkeypatch.setattr(concurrency, "_cores", 1)
    gate = Gate()

    def call(_):
        with gate.room():
            with gate.room(), gate.room():
                assert len(gate._inside) == 1
            assert len(gate._inside) == 1

    in_threads(4, call)
    assert not gate._inside


def test_gate_with_different_limits_never_stalls(monkeypatch):
    monkeypatch.setattr(concurrency, "_cores", 4)
    own = threading.local()
    monkeypatch.setattr(torch, "get_num_threads", lambda: own.threads)
    gate = Gate()

    def call(i):
        own.threads = 1 + i % 4
        for _ in range(30):
            with gate.room():
                time.sleep(0.0002)

    in_threads(8, call)
    assert not gate._inside


def test_an_interrupted_waiter_leaves_the_gate_to_the_others(monkeypatch):
    monkeypatch.setattr(concurrency, "_cores", 1)
    gate = Gate()
    order = []

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        raise Interrupt

    holding, release = threading.Event(), threading.Event()

    def hold(_):
        with gate.room():
            holding.set()
            release.wait(30)

    def wait(_):
        holding.wait(30)
        with gate.room():
            order.append("waiter")

    threads = [threading.Thread(target=f, args=(0,), daemon=True) for f in (hold, wait)]
    for thread in threads:
        thread.start()
    holding.wait(30)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Interrupt), gate.room():
            order.append("never")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    release.set()
    for thread in threads:
        thread.join(30)
    assert order == ["waiter"] and not gate._inside


def test_a_signal_handler_may_call_the_model(one_thread, monkeypatch):
    """The handler interrupts a call of its own thread, wherever that stands."""
    monkeypatch.setattr(concurrency, "_cores", 1)
    model = clinfast.optimize(make())
    inputs = work(0, 0)
    expected = run(model, **inputs)
    from_handler = []
    before = signal.signal(signal.SIGALRM, lambda *_: from_handler.append(run(model, **inputs)))
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.003)
    try:
        while len(from_handler) < 20:
            assert_equal(run(model, **inputs), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    for outputs in from_handler:
        assert_equal(outputs, expected)


def test_a_signal_handler_may_enter_the_gate_anywhere(monkeypatch):
    """At every line of the gate's own code."""
    monkeypatch.setattr(concurrency, "_cores", 1)
    gate = Gate()
    entered = []

    def at_each_line(frame, event, _):
        if frame.f_code.co_filename != concurrency.__file__:
            return None
        sys.settrace(None)
        with gate.room():
            entered.append(frame.f_lineno)
        sys.settrace(at_each_line)
        return at_each_line

    def call(_):
        sys.settrace(at_each_line)
        try:
            with gate.room():
                pass
        finally:
            sys.settrace(None)

    in_threads(2, call)
    assert len(set(entered)) > 8 and not gate._inside


FORK = """
import os, sys, threading, torch
sys.path.insert(0, {tests!r})
from bert_models import ids, make, run
import clinfast
from clinfast import patch

torch.set_num_threads({threads})
model = clinfast.optimize(make(hidden_size=256, num_attention_heads=4, intermediate_size=512))
inputs = {{"input_ids": ids(4, 60)}}
expected = run(model, **inputs)["last_hidden_state"]
((_, _, forward),) = patch.find_patched(model)

def in_child(when):
    child = os.fork()
    if child == 0:
        same = torch.allclose(run(model, **inputs)["last_hidden_state"], expected, atol=1e-5)
        model.encoder.layer[0].output.dense.weight.data.mul_(-1)
        changed = not torch.allclose(run(model, **inputs)["last_hidden_state"], expected, atol=1e-2)
        os._exit(0 if same and changed and torch.get_num_threads() == 1 else 3)
    status = os.waitpid(child, 0)[1]
    print(when, os.waitstatus_to_exitcode(status), flush=True)

def hold():
    with forward.encoder._lock:
        held.set()
        let_go.wait()

def calls():
    while True:
        run(model, **inputs)

in_child("quiet")
held, let_go = threading.Event(), threading.Event()
threading.Thread(target=hold, daemon=True).start()
held.wait()
in_child("while another thread holds the lock")
let_go.set()
for _ in range(3):
    threading.Thread(target=calls, daemon=True).start()
for _ in range(3):
    in_child("while other threads are in calls")
assert torch.equal(run(model, **inputs)["last_hidden_state"], expected)
print("the parent goes on", flush=True)
# At a normal exit torch aborts where daemon threads are inside one of its ops.
os._exit(0)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_computes_after_its_parent_did(threads):
    code = FORK.format(tests=str(Path(__file__).parents[1]), threads=threads)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "quiet 0",
        "while another thread holds the lock 0",
        *["while other threads are in calls 0"] * 3,
        "the parent goes on",
    ], done.stdout + done.stderr[-2000:]


def test_fork_safe_lock():
    lock = ForkSafeLock()
    with lock, lock, pytest.raises(KeyError), ForkSafeLock():
        raise KeyError

    def taken(_):
        free = lock._lock.acquire(blocking=False)
        if free:
            lock._lock.release()
        seen.append(not free)

    seen = []
    in_threads(1, taken)
    with lock:
        in_threads(1, taken)
    lock._lock.acquire()
    lock.renew()
    in_threads(1, taken)
    assert seen == [False, True, False]


def _child(model, inputs, results):
    stock = "forward" not in model.__dict__ and not any("clinfast" in str(type(m)) for m in model.modules())
    results.put((stock, {name: value.tolist() for name, value in run(model, **inputs).items()}))


def test_a_spawned_process_gets_a_stock_model(one_thread):
    model = clinfast.optimize(make())
    inputs = work(1, 1)
    expected = run(copy.deepcopy(model), **inputs)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_child, args=(model, inputs, results))
    child.start()
    stock, found = results.get(timeout=300)
    child.join(300)
    assert stock and child.exitcode == 0
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), value, rtol=0, atol=1e-5)
