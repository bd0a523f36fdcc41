"""Host time of a call up to the launch of its graph: what a request waits for before the device begins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


class _Timed:
    """A graph that notes when it is launched."""

    def __init__(self, graph: Any, launched: list[float]) -> None:
        self._graph, self._launched = graph, launched

    def replay(self) -> None:
        self._launched.append(time.perf_counter())
        self._graph.replay()


def until_launch(
    graphs: Any, call: Callable[[], Any], wait: Callable[[], Any], calls: int = 300
) -> dict[str, float]:
    """Microseconds from entering `call` to the launch, `"median"` and `"p90"`, each call on an idle device.

    Args:
        graphs: the `GraphExecutor` that `call` runs on, with a graph for it.
        wait: until the device is through.

    Raises:
        RuntimeError: a call launched no graph.
    """
    launched: list[float] = []
    kept = [(lane, key, captured) for lane in graphs.pool.lanes for key, captured in lane.graphs.items()]
    for lane, key, captured in kept:
        lane.graphs[key] = captured._replace(graph=_Timed(captured.graph, launched))
    times = []
    try:
        for _ in range(calls):
            wait()
            launched.clear()
            begin = time.perf_counter()
            call()
            if not launched:
                raise RuntimeError(f"a call launched no graph: {graphs.describe()}")
            times.append((launched[0] - begin) * 1e6)
    finally:
        for lane, key, captured in kept:
            lane.graphs[key] = captured
    times.sort()
    return {"median": statistics.median(times), "p90": times[len(times) * 9 // 10]}
