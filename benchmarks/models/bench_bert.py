"""BERT: base size with random weights, and all-MiniLM-L6-v2 with its real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness.pytest_benchmark import open_race, race_cell, worker_clock
from clinfast.bench.cells import CELLS
from clinfast.bench.race import Race
from clinfast.bench.sources import PRECISIONS

pytestmark = pytest.mark.benchmark(timer=worker_clock)

RACES = [(model, precision) for model in ("minilm", "bert-base") for precision in PRECISIONS]


@pytest.fixture(scope="module", params=RACES, ids="-".join)
def race(request: pytest.FixtureRequest, race_options: Any) -> Iterator[Race]:
    yield from open_race(request, race_options)


@pytest.mark.parametrize("cell", CELLS)
def bench_bert(benchmark: Any, race: Race, cell: str, race_options: Any) -> None:
    race_cell(benchmark, race, cell, race_options)
