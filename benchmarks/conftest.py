"""Options of the model benchmarks, and what every `benchmarks/models/bench_*.py` needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class RaceOptions:
    threads: int
    contenders: tuple[str, ...]
    rounds: int | None
    results: Path | None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("model races")
    group.addoption("--race-threads", type=int, default=2, help="threads of every contender (default: 2)")
    group.addoption("--race-contenders", help="comma-separated; default: all but int8")
    group.addoption("--race-rounds", type=int, help="rounds a cell (default: what fits a minute, 3 to 15)")
    group.addoption("--race-results", type=Path, help="also merge the cells into this result file")


@pytest.fixture(scope="session")
def race_options(pytestconfig: pytest.Config) -> RaceOptions:
    from clinfast.bench.contenders import DEFAULT_CONTENDERS

    named = pytestconfig.getoption("--race-contenders")
    return RaceOptions(
        threads=pytestconfig.getoption("--race-threads"),
        contenders=tuple(named.split(",")) if named else DEFAULT_CONTENDERS,
        rounds=pytestconfig.getoption("--race-rounds"),
        results=pytestconfig.getoption("--race-results"),
    )
