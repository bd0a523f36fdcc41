"""Captured graphs, and who may replay which when.

A lane is one memory pool, the graphs in it and the buffers that they read. One call has a lane at a time, and the next
one's stream waits until the device is through with it: so the graphs of a lane share memory and never run at once, and
calls that do run at once are on different lanes.
"""

from __future__ import annotations

import collections
import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from clinfast.engine.buckets import MAX_NOTES, MAX_ROWS, Bucket
from clinfast.ops.packing import PackedBuffers

LANES = 4
MAX_GRAPHS = 64
# Share of the device's memory that the graphs of one model may take.
MEMORY_SHARE = 1 / 16
# Once graphs were evicted, a size is captured when it was asked for so often: traffic of ever new sizes must not
# capture at every call.
ASKED = 8


class Driver(Protocol):
    """What graphs need of the device. `cuda_graph.CudaDriver`, or a stand-in of the tests."""

    def new_pool(self) -> Any: ...

    def capture(self, body: Any, pool: Any) -> tuple[Any, Any, int]:
        """(graph with `replay()`, what `body` returned, bytes that the pool grew by)."""

    def stream(self) -> Any:
        """Something that equals itself for the same current stream."""

    def event(self) -> Any:
        """With `record()`, `wait()` (by the current stream), `query()` and `synchronize()`."""

    def memory(self) -> int:
        """Bytes of the device."""

    def on(self) -> AbstractContextManager[Any]:
        """The device as the current one."""

    def fetch(self, source: torch.Tensor, target: torch.Tensor, ready: Any) -> list[int]:
        """Values of `source` on the host, through `target`, once `ready` came to pass."""


class Captured(NamedTuple):
    graph: Any
    output: Any
    nbytes: int


class Lane:
    def __init__(self, driver: Driver, device: torch.device, weights: Any) -> None:
        self.pool = driver.new_pool()
        with torch.inference_mode(False):  # tensors of inference mode could not be written to outside of it
            self.buffers = PackedBuffers.of(MAX_ROWS, MAX_NOTES, device)
            self.facts = torch.zeros_like(self.buffers.facts, device="cpu", pin_memory=device.type == "cuda")
        self.weights = weights  # held as long as a graph may read them
        self.graphs: collections.OrderedDict[Bucket, Captured] = collections.OrderedDict()
        self.packed, self.done = driver.event(), driver.event()
        self.stream: Any = None
        self.busy = False
        self.retired = False

    @property
    def nbytes(self) -> int:
        return sum(captured.nbytes for captured in self.graphs.values())

    def clear(self) -> None:
        """Free the graphs, once the device is through with them."""
        self.done.synchronize()
        self.graphs.clear()


class GraphPool:
    """The lanes of one model.

    Attributes:
        captures, replays, evictions: counts since it was made.
        off: why no graph is used any more, or None.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        lanes: int = LANES,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int | None = None,
    ) -> None:
        self.driver = driver
        self.max_lanes, self.max_graphs = lanes, max_graphs
        self._max_bytes = max_bytes
        self.lanes: list[Lane] = []
        self._lock = threading.Lock()  # CUDA does not outlive a fork either
        self._latest: Lane | None = None
        self._asked: collections.Counter[Bucket] = collections.Counter()
        self._uses: collections.OrderedDict[tuple[int, Bucket], Lane] = collections.OrderedDict()
        self.captures = self.replays = self.evictions = 0
        self.off: str | None = None

    @property
    def max_bytes(self) -> int:
        if self._max_bytes is None:
            self._max_bytes = int(self.driver.memory() * MEMORY_SHARE)
        return self._max_bytes

    @property
    def nbytes(self) -> int:
        return sum(lane.nbytes for lane in list(self.lanes))

    def acquire(self, key: Bucket, device: torch.device, weights: Any) -> tuple[Lane | None, Captured | None]:
        """A lane for the calling thread alone, ordered behind the device's earlier work on it, and its graph if it has
        one; None where all are in use. Lanes of other weights are retired. `release` gives it back."""
        stream = self.driver.stream()
        with self._lock:
            lane = self._latest
            if lane is None or lane.busy or lane.weights is not weights or lane.stream != stream or self.off:
                lane = self._latest = self._take(key, device, weights, stream)
                if lane is None:
                    return None, None
            lane.busy = True
            found = lane.graphs.get(key)
            if found is not None:
                self._uses.move_to_end((id(lane), key))
        if lane.stream is not None and lane.stream != stream:
            lane.done.wait()
        lane.stream = stream
        return lane, found

    def release(self, lane: Lane) -> None:
        lane.done.record()
        with self._lock:
            lane.busy = False
            if lane.retired:
                self._forget(lane)

    def _take(self, key: Bucket, device: torch.device, weights: Any, stream: Any) -> Lane | None:
        if self.off is not None:
            return None
        for lane in [lane for lane in self.lanes if lane.weights is not weights]:
            lane.retired = True
            self.lanes.remove(lane)
            if not lane.busy:
                self._forget(lane)
        idle = [lane for lane in self.lanes if not lane.busy]
        # Without a wait first: the same stream, or a device that is through; then one that has the graph.
        ready = [lane for lane in idle if lane.stream in (None, stream) or lane.done.query()]
        if not ready and len(self.lanes) < self.max_lanes:
            ready = [Lane(self.driver, device, weights)]
            self.lanes.append(ready[0])
        return max(ready or idle, key=lambda lane: (key in lane.graphs, lane.stream == stream), default=None)

    def _forget(self, lane: Lane) -> None:
        if self._latest is lane:
            self._latest = None
        for used in [used for used in self._uses if self._uses[used] is lane]:
            del self._uses[used]
        lane.clear()

    def wants(self, key: Bucket, *, asked: bool = False) -> bool:
        """Whether to capture a graph for it now; `asked` where the user said so by `warmup`."""
        if self.off is not None:
            return False
        with self._lock:
            self._asked[key] += 1
            return asked or not self.evictions or self._asked[key] >= ASKED

    def add(self, lane: Lane, key: Bucket, captured: Captured) -> bool:
        """Keep a graph, and evict those that were not used for longest. False where it alone is beyond the bound."""
        if captured.nbytes > self.max_bytes:
            return False
        with self._lock:
            self.captures += 1
            self._asked.pop(key, None)
            lane.graphs[key] = captured
            self._uses[id(lane), key] = lane
            while len(self._uses) > self.max_graphs or self.nbytes > self.max_bytes:
                # Graphs of a lane that another thread is on are passed over.
                oldest = next(
                    (used for used, at in self._uses.items() if (at is lane or not at.busy) and used[1] != key), None
                )
                if oldest is None:
                    break
                self._evict(oldest)
        return True

    def _evict(self, used: tuple[int, Bucket]) -> None:
        lane = self._uses.pop(used)
        lane.done.synchronize()
        del lane.graphs[used[1]]
        self.evictions += 1
        self._asked[used[1]] = 0
        if not lane.graphs and not lane.busy:  # its pool goes with it
            self.lanes.remove(lane)
            self._latest = None

    def switch_off(self, reason: str) -> bool:
        """Use no graph from now on, and free them all. False where that was so already."""
        with self._lock:
            if self.off is not None:
                return False
            self.off = reason
            lanes, self.lanes, self._latest = self.lanes, [], None
            for lane in lanes:
                lane.retired = True
                if not lane.busy:
                    self._forget(lane)
        return True
