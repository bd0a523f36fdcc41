"""A race with a progress bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from clinfast.bench.cells import Batch, Cell
from clinfast.bench.race import Race

DESCRIPTION_WIDTH = 44


def run_cell(
    race: Race, cell: Cell, rounds: int | None, progress: RaceProgress, batch: Batch | None = None
) -> dict[str, Any]:
    """Parity first, then alternating rounds; the cell's entry for the result file.

    Raises:
        ParityError: ours is further from fp64 than the budget allows.
    """
    race.enter_cell(cell, batch)
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

    def __init__(self, console: Console, cells: int, *, lines: bool = True) -> None:
        """`lines`: without a terminal, say each step in a line of its own."""
        self.progress = Progress(
            TextColumn(f"{{task.description:<{DESCRIPTION_WIDTH}}}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
            transient=not lines,
            disable=not console.is_terminal,
        )
        self.lines = lines and not console.is_terminal
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
        if self.lines:
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
