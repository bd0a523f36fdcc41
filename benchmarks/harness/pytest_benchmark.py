"""A race as a pytest-benchmark test.

pytest-benchmark reads its timer around the call it times. Here that timer is `worker_clock`, which moves
only by what our worker measured, so the statistics that it prints and saves are the worker's own times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness.sources import model_source
from clinfast.bench import results
from clinfast.bench.cells import parse_cell
from clinfast.bench.environment import environment
from clinfast.bench.race import OURS, Race


class WorkerClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


worker_clock = WorkerClock()


def open_race(request: pytest.FixtureRequest, options: Any) -> Iterator[Race]:
    """The body of a `race` fixture whose parameter is (model, precision)."""
    model, precision = request.param
    with Race(model_source(model, options.threads), precision, options.contenders, options.threads) as race:
        yield race


def race_cell(benchmark: Any, race: Race, cell: str, options: Any) -> None:
    """Parity first, then rounds in which everybody runs once; `extra_info` gets the cell's whole record.

    Raises:
        ParityError: ours is further from fp64 than the budget allows.
    """
    race.enter_cell(parse_cell(cell))
    if OURS not in race.runners:
        pytest.fail(f"{OURS} cannot run: {race.skipped.get(OURS, 'it is not among the contenders')}")
    peers = [name for name in race.runners if name != OURS]

    def run_peers() -> None:
        for name in peers:
            race.step(name)

    def run_ours() -> None:
        worker_clock.advance(race.step(OURS))

    benchmark.group = f"{race.source.name} {race.precision}"
    rounds = options.rounds or race.suggested_rounds()
    benchmark.pedantic(run_ours, setup=run_peers, rounds=rounds, iterations=1)
    record, surroundings = race.record(), environment(options.threads)
    benchmark.extra_info.update(results.rounded({**record, "environment": surroundings}))
    if options.results:
        results.add(options.results, record, surroundings)
