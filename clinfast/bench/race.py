"""A race: all contenders of one model and precision, loaded side by side, timed in alternating rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from clinfast.bench.cells import Batch, Cell, make_batch
from clinfast.bench.contenders import contender_class
from clinfast.bench.machine_load import MachineLoad
from clinfast.bench.process import ContenderFailed, WorkerProcess
from clinfast.bench.reference import output_error, reference_outputs
from clinfast.bench.sources import ModelSource
from clinfast.bench.worker import ROUND_SECONDS

OURS = "clinfast"
BASE = "stock"
ERROR_BUDGET = {"relative": 2.0, "max_abs": 4.0}
"""How many times stock's own error at the same dtype ours may have.

The norm is the measure. The largest single error is an extreme value, which in sound fp32 arithmetic already
differs twofold between libraries; its wider budget catches one wrong element, which a norm over many hides.
"""
BROKEN = 0.1
"""A peer with a larger relative error is not running this model, and is not timed."""
MIN_ROUNDS, MAX_ROUNDS = 3, 15
CELL_SECONDS = 60.0

Say = Callable[[str], None]


class ParityError(AssertionError):
    """Ours is further from fp64 than the budget allows."""


@dataclass
class Runner:
    """One contender's part in the current cell."""

    name: str
    worker: WorkerProcess
    facts: dict[str, Any] = field(default_factory=dict)
    load: MachineLoad = field(default_factory=MachineLoad)
    rounds: list[list[float]] = field(default_factory=list)
    call_seconds: float = 0.0

    @property
    def round_seconds(self) -> float:
        one = self.call_seconds
        return one if one >= ROUND_SECONDS else ROUND_SECONDS + 2 * one

    @property
    def round_medians(self) -> list[float]:
        return [median(times) for times in self.rounds]


class Race:
    """Use as a context: entering starts and loads the workers, leaving ends them."""

    def __init__(
        self,
        source: ModelSource,
        precision: str,
        contenders: Sequence[str],
        threads: int,
        say: Say = lambda text: None,
    ) -> None:
        self.precision = precision
        self.threads = threads
        self.say = say
        self.contenders = contenders if BASE in contenders else (BASE, *contenders)
        self.source = source
        self.absent: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.workers: dict[str, WorkerProcess] = {}
        self.runners: dict[str, Runner] = {}
        self.load_seconds: dict[str, float] = {}

    def __enter__(self) -> Race:
        try:
            for name in self.contenders:
                self._load(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _load(self, name: str) -> None:
        contender = contender_class(name)
        if self.precision not in contender.precisions:
            self.absent[name] = f"has no {self.precision} mode"
            return
        if missing := [package for package in contender.missing() if package != OURS]:
            self.absent[name] = f"not installed: pip install {' '.join(missing)}"
            return
        self.say(f"{self.source.name} {self.precision}: loading {name}")
        worker = WorkerProcess(name, self.source, self.precision, self.threads)
        try:
            self.load_seconds[name] = worker.ask("load")["load_s"]
        except BaseException as failure:
            worker.close()
            if not isinstance(failure, ContenderFailed):
                raise
            self.absent[name] = str(failure)
        else:
            self.workers[name] = worker

    def enter_cell(self, cell: Cell, batch: Batch | None = None) -> None:
        """Prepares every contender for `cell` and compares its output with fp64; no time is taken before.

        Args:
            batch: the inputs, where they are not random ids of the cell's lengths; nothing of it is kept on disk.

        Raises:
            ParityError: ours has more than `ERROR_BUDGET` times stock's own error.
        """
        self.cell = cell
        self.runners = {}
        self.skipped = dict(self.absent)
        self.say(f"{self._where}: fp64 reference")
        keep = batch is None
        batch = batch or make_batch(cell, self.source.vocab_size, self.source.pad_id)
        reference = reference_outputs(
            self.source, self.precision, batch, self.threads, name=cell.name, keep=keep
        )
        for name, worker in list(self.workers.items()):
            self.say(f"{self._where}: parity of {name}")
            try:
                reply = worker.ask("prepare", batch)
                errors = {key: output_error(out, reference[key]) for key, out in reply["outputs"].items()}
                worst = max((error.relative for error in errors.values()), default=0.0)
                if name != OURS and not worst <= BROKEN:
                    raise ContenderFailed(f"relative error {worst:.2g} against fp64: not the same model")
            except ContenderFailed as failure:
                self.skipped[name] = str(failure)
                if worker.process.poll() is not None:
                    self.absent[name] = str(failure)
                    self.workers.pop(name).close()
                continue
            runner = self.runners[name] = Runner(name, worker, call_seconds=reply["warm_call_s"])
            runner.facts = {
                "version": reply["version"],
                "load_s": self.load_seconds[name],
                "first_call_s": reply["first_call_s"],
                "error": {key: error.as_dict() for key, error in errors.items()},
                "notes": reply["notes"],
            }
        self._check_parity()

    @property
    def _where(self) -> str:
        return f"{self.source.name} {self.precision} {self.cell.name}"

    def _check_parity(self) -> None:
        if OURS not in self.runners or BASE not in self.runners:
            return
        ours, stock = (self.runners[name].facts["error"] for name in (OURS, BASE))
        for key, errors in ours.items():
            for norm, error in errors.items():
                budget = ERROR_BUDGET[norm] * stock[key][norm]
                if not error <= budget:
                    raise ParityError(
                        f"{self._where}: {OURS} has a {norm} error of {error:.3g} in {key} against fp64; "
                        f"{ERROR_BUDGET[norm]:g} times stock's own is {budget:.3g}"
                    )

    def suggested_rounds(self) -> int:
        seconds = sum(runner.round_seconds for runner in self.runners.values())
        return max(MIN_ROUNDS, min(MAX_ROUNDS, round(CELL_SECONDS / seconds)))

    def step(self, name: str) -> float:
        """One round of one contender; the median of its own times in seconds."""
        runner = self.runners[name]
        runner.load.begin(runner.worker.pid)
        reply = runner.worker.ask("run")
        runner.load.end(runner.worker.pid)
        runner.rounds.append(reply["times"])
        runner.facts["peak_rss_mb"] = round(reply["peak_rss"] / 2**20)
        return median(reply["times"])

    def order(self, round_number: int) -> list[str]:
        """Who runs when: the starting place moves on by one each round, so nobody always follows the same."""
        names = list(self.runners)
        start = round_number % len(names)
        return names[start:] + names[:start]

    def record(self) -> dict[str, Any]:
        """The cell's entry in the result file."""
        contenders: dict[str, dict[str, Any]] = {
            name: {"status": "skipped", "reason": reason} for name, reason in self.skipped.items()
        }
        for name, runner in self.runners.items():
            times = [seconds for round_times in runner.rounds for seconds in round_times]
            contenders[name] = {
                "status": "ok",
                "median_ms": median(times) * 1e3,
                "min_ms": min(times) * 1e3,
                "max_ms": max(times) * 1e3,
                "round_ms": [seconds * 1e3 for seconds in runner.round_medians],
                "calls": len(times),
                "notes_per_second": self.cell.batch_size / median(times),
                "cpu_hours_per_million_notes": median(times) * self.threads / 3600 / self.cell.batch_size * 1e6,
                "others_cores": round(runner.load.others, 3),
                **runner.facts,
            }
            for key, against in (("over_clinfast", OURS), ("over_stock", BASE)):
                if against in self.runners:
                    contenders[name][key] = ratio(runner, self.runners[against])
            if not contender_class(name).has_outputs:
                flops = self.source.gemm_flops(self.cell.tokens_real)
                contenders[name]["gflops"] = flops / median(times) / 1e9
        return {
            "model": self.source.name,
            "precision": self.precision,
            "cell": self.cell.name,
            "batch_size": self.cell.batch_size,
            "padded_length": self.cell.padded_length,
            "tokens_real": self.cell.tokens_real,
            "tokens_padded": self.cell.tokens_padded,
            "threads": self.threads,
            "gemm_gflop": self.source.gemm_flops(self.cell.tokens_real) / 1e9,
            "rounds": max(len(runner.rounds) for runner in self.runners.values()),
            "contenders": {name: contenders[name] for name in self.contenders if name in contenders},
        }


def ratio(runner: Runner, base: Runner) -> dict[str, float]:
    """The contender's time over the base's, round by round."""
    ratios = [ours / theirs for ours, theirs in zip(runner.round_medians, base.round_medians, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
