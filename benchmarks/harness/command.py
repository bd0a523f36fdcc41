"""`python -m benchmarks run | show`: the race without pytest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.harness import results
from benchmarks.harness.cells import CELLS, Cell, parse_cell
from benchmarks.harness.contenders import DEFAULT_CONTENDERS, contender_class
from benchmarks.harness.environment import environment
from benchmarks.harness.goals import GOALS_FILE
from benchmarks.harness.race import ParityError, Race
from benchmarks.harness.sources import MODELS, PRECISIONS
from benchmarks.harness.tables import print_results

DESCRIPTION_WIDTH = 44


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, merge into the result file, print tables")
    run.add_argument("--models", type=names, default=list(MODELS), help="default: %(default)s")
    run.add_argument("--precisions", type=names, default=list(PRECISIONS), help="default: %(default)s")
    run.add_argument("--cells", type=names, default=list(CELLS), help="default: %(default)s")
    run.add_argument(
        "--contenders", type=names, default=list(DEFAULT_CONTENDERS), help="default: %(default)s"
    )
    run.add_argument("--rounds", type=int, help="per cell; default: what fits a minute, 3 to 15")
    run.add_argument("--threads", type=int, default=2, help="of every contender; default: %(default)s")
    run.add_argument("--json", type=Path, required=True, help="result file, merged into if it is there")
    run.add_argument("--missing", action="store_true", help="skip cells that the result file has already")
    show = commands.add_parser("show", help="print the tables of a result file")
    show.add_argument("json", type=Path)
    for command in (run, show):
        command.add_argument("--goals", type=Path, default=GOALS_FILE, help="default: benchmarks/goals.json")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    failures: list[str] = []
    if options.command == "run":
        try:
            cells = [parse_cell(name) for name in options.cells]
            for name in options.contenders:
                contender_class(name)
            for name, known in ((options.models, MODELS), (options.precisions, PRECISIONS)):
                if unknown := set(name) - set(known):
                    raise ValueError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        except ValueError as error:
            top.error(str(error))
        failures = run(options, cells, console)
    print_results(results.read(options.json), console, options.goals)
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red", highlight=False)
    return 1 if failures else 0


def run(options: argparse.Namespace, cells: list[Cell], console: Console) -> list[str]:
    surroundings = environment(options.threads)
    plan = []
    for model in options.models:
        for precision in options.precisions:
            left = [c for c in cells if not (options.missing and done(options.json, model, precision, c))]
            if left:
                plan.append((model, precision, left))
    failures = []
    with RaceProgress(console, sum(len(left) for *_, left in plan)) as progress:
        for model, precision, left in plan:
            with Race(model, precision, options.contenders, options.threads, progress.say) as race:
                for cell in left:
                    try:
                        record = run_cell(race, cell, options.rounds, progress)
                        results.add(options.json, record, surroundings)
                    except ParityError as error:
                        failures.append(str(error))
                    progress.cell_done()
    return failures


def done(file: Path, model: str, precision: str, cell: Cell) -> bool:
    return results.cell_key(model, precision, cell.name) in results.read(file)["cells"]


def run_cell(race: Race, cell: Cell, rounds: int | None, progress: RaceProgress) -> dict[str, Any]:
    race.enter_cell(cell)
    rounds = rounds or race.suggested_rounds()
    where = f"{race.source.name} {race.precision} {cell.name}"
    progress.begin(rounds * sum(runner.round_seconds for runner in race.runners.values()))
    for number in range(rounds):
        for name in race.order(number):
            progress.show(f"{where} {number + 1}/{rounds} {name}")
            race.step(name)
            progress.advance(race.runners[name].round_seconds)
    return race.record()


class RaceProgress:
    """Drawn only between two rounds, never by a thread of its own: that would take time from a contender."""

    def __init__(self, console: Console, cells: int) -> None:
        self.progress = Progress(
            TextColumn(f"{{task.description:<{DESCRIPTION_WIDTH}}}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self.quiet = not console.is_terminal
        self.count = cells
        self.cells = self.progress.add_task(f"cell 1 of {cells}", total=cells)
        self.cell = self.progress.add_task("starting", total=None)

    def __enter__(self) -> RaceProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A step that takes a while; where there is no terminal it becomes a line."""
        if self.quiet:
            self.progress.console.print(text, highlight=False)
        self.show(text)

    def show(self, text: str) -> None:
        self.progress.update(self.cell, description=text)
        self.progress.refresh()

    def begin(self, seconds: float) -> None:
        self.progress.reset(self.cell, total=round(seconds), completed=0)

    def advance(self, seconds: float) -> None:
        self.progress.advance(self.cell, seconds)

    def cell_done(self) -> None:
        self.progress.advance(self.cells)
        done = int(self.progress.tasks[self.cells].completed)
        self.progress.update(self.cells, description=f"cell {min(done + 1, self.count)} of {self.count}")
        self.progress.reset(self.cell, total=None)
