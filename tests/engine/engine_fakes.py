"""A device of graphs that the CPU plays: a capture runs nothing that is kept, a replay runs the body again."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch

from clinfast import patch
from clinfast.engine.executors.cuda_graph import GraphExecutor


class Event:
    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver

    def record(self) -> None: ...

    def wait(self) -> None:
        self.driver.waits += 1

    def query(self) -> bool:
        return self.driver.through

    def synchronize(self) -> None:
        self.driver.synchronized += 1


class Graph:
    """Replaying writes to the memory of its pool, for as long as the driver says."""

    def __init__(self, driver: FakeDriver, body: Any, pool: Any, output: Any) -> None:
        self.driver, self.body, self.pool, self.output = driver, body, pool, output

    def replay(self) -> None:
        driver = self.driver
        with driver.lock:
            driver.replays += 1
            assert self.pool not in driver.running, "two graphs of one pool at once"
            driver.running.add(self.pool)
            driver.most_at_once = max(driver.most_at_once, len(driver.running))
        for hook in driver.before_replay:
            hook()
        time.sleep(driver.seconds)
        with torch.inference_mode(False), torch.no_grad():
            for kept, new in zip(tensors(self.output), tensors(self.body()), strict=True):
                kept.copy_(new)
        with driver.lock:
            driver.running.remove(self.pool)


def tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in (output.hidden_states, *output.branches) if x is not None]


class FakeDriver:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds, self.nbytes, self.total = 0.0, 1 << 20, 1 << 40
        self.before_replay: list[Any] = []
        self.replays = self.captures = self.waits = self.synchronized = self.most_at_once = 0
        self.running: set[Any] = set()
        self.through = True
        self.fails: BaseException | None = None
        self.streams = threading.local()

    def on(self) -> Any:
        return contextlib.nullcontext()

    def new_pool(self) -> Any:
        return object()

    def capture(self, body: Any, pool: Any) -> tuple[Any, Any, int]:
        if self.fails is not None:
            raise self.fails
        assert not torch.is_inference_mode_enabled()
        self.captures += 1
        output = body()
        for x in tensors(output):
            x.fill_(float("nan"))  # a capture computes nothing
        return Graph(self, body, pool, output), output, self.nbytes

    def stream(self) -> Any:
        return getattr(self.streams, "current", 0)

    def event(self) -> Event:
        return Event(self)

    def memory(self) -> int:
        return self.total

    def fetch(self, source: torch.Tensor, target: torch.Tensor, ready: Any) -> list[int]:
        return target.copy_(source).tolist()


def encoder_of(model: Any) -> Any:
    ((_, _, forward),) = patch.find_patched(model)
    return forward.encoder


def with_graphs(model: Any, **limits: Any) -> tuple[FakeDriver, GraphExecutor]:
    """Give an optimized model graphs, as a GPU would."""
    encoder, driver = encoder_of(model), FakeDriver()
    encoder.graphs = GraphExecutor(encoder._executor, encoder.head, encoder.padding, driver, **limits)
    return driver, encoder.graphs
