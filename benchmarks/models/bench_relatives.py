"""BERT's relatives and heads: base sizes with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness.pytest_benchmark import open_race, race_cell, worker_clock
from benchmarks.harness.sources import MODELS
from clinfast.bench.cells import CELLS
from clinfast.bench.race import Race

pytestmark = pytest.mark.benchmark(timer=worker_clock)

RACES = [
    (model, precision)
    for model, timed in MODELS.items()
    if model not in ("bert-base", "minilm")
    for precision in timed.precisions
]


@pytest.fixture(scope="module", params=RACES, ids="-".join)
def race(request: pytest.FixtureRequest, race_options: Any) -> Iterator[Race]:
    yield from open_race(request, race_options)


@pytest.mark.parametrize("cell", (*CELLS, "long8"))
def bench_relatives(benchmark: Any, race: Race, cell: str, race_options: Any) -> None:
    if cell not in MODELS[race.source.name].cells:
        pytest.skip(f"{race.source.name} is not timed at {cell}")
    race_cell(benchmark, race, cell, race_options)
