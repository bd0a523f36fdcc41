"""`python -m benchmarks run | show`: the race without pytest."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.applications import COUNTS, SIDES, race
from benchmarks.harness.goals import GOALS_FILE
from benchmarks.harness.sources import MODELS, model_source
from benchmarks.harness.tables import print_results
from clinfast.bench import results
from clinfast.bench.cells import Cell, parse_cell
from clinfast.bench.contenders import DEFAULT_CONTENDERS, contender_class
from clinfast.bench.environment import environment
from clinfast.bench.progress import RaceProgress, run_cell
from clinfast.bench.race import ParityError, Race
from clinfast.bench.sources import PRECISIONS


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, merge into the result file, print tables")
    run.add_argument("--models", type=names, default=list(MODELS), help="default: %(default)s")
    run.add_argument("--precisions", type=names, help="default: the model's own choice")
    run.add_argument("--cells", type=names, help="default: the model's own choice")
    run.add_argument(
        "--contenders", type=names, default=list(DEFAULT_CONTENDERS), help="default: %(default)s"
    )
    run.add_argument("--rounds", type=int, help="per cell; default: what fits a minute, 3 to 15")
    run.add_argument("--threads", type=int, default=2, help="of every contender; default: %(default)s")
    run.add_argument("--json", type=Path, required=True, help="result file, merged into if it is there")
    run.add_argument("--missing", action="store_true", help="skip cells that the result file has already")
    whole = commands.add_parser("applications", help="encode and CrossEncoder, tokeniser included, before and after")
    whole.add_argument("--tasks", type=names, default=list(COUNTS), help="default: %(default)s")
    whole.add_argument("--precisions", type=names, default=list(SIDES), help="default: %(default)s")
    whole.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    whole.add_argument("--threads", type=int, default=2, help="of both sides; default: %(default)s")
    whole.add_argument("--json", type=Path, required=True, help="result file, merged into if it is there")
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
    if options.command == "applications":
        return applications(options, console)
    if options.command == "run":
        try:
            for name in options.cells or ():
                parse_cell(name)
            for name in options.contenders:
                contender_class(name)
            for name, known in ((options.models, MODELS), (options.precisions or (), PRECISIONS)):
                if unknown := set(name) - set(known):
                    raise ValueError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        except ValueError as error:
            top.error(str(error))
        failures = run(options, console)
    print_results(results.read(options.json), console, options.goals)
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red", highlight=False)
    return 1 if failures else 0


def run(options: argparse.Namespace, console: Console) -> list[str]:
    surroundings = environment(options.threads)
    plan: list[tuple[str, str, list[Cell]]] = []
    for model in options.models:
        cells = [parse_cell(name) for name in options.cells or MODELS[model].cells]
        for precision in options.precisions or MODELS[model].precisions:
            left = [c for c in cells if not (options.missing and done(options.json, model, precision, c))]
            if left:
                plan.append((model, precision, left))
    failures = []
    with RaceProgress(console, sum(len(left) for *_, left in plan)) as progress:
        for model, precision, left in plan:
            source = model_source(model, options.threads)
            with Race(source, precision, options.contenders, options.threads, progress.say) as race:
                for cell in left:
                    try:
                        record = run_cell(race, cell, options.rounds, progress)
                        results.add(options.json, record, surroundings)
                    except ParityError as error:
                        failures.append(str(error))
                    progress.cell_done()
    return failures


def applications(options: argparse.Namespace, console: Console) -> int:
    if unknown := set(options.tasks) - set(COUNTS):
        console.print(f"{', '.join(unknown)} is none of {', '.join(COUNTS)}")
        return 2
    if unknown := set(options.precisions) - set(SIDES):
        console.print(f"{', '.join(unknown)} is none of {', '.join(SIDES)}")
        return 2
    for task, precision in itertools.product(options.tasks, options.precisions):
        record = race(task, options.rounds, options.threads, precision)
        results.add_application(options.json, f"{task}/{precision}", record, environment(options.threads))
        for name, ratio in record["over_clinfast"].items():
            console.print(
                f"{task} {precision}: {ratio['median']:.2f} x {name} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
    return 0


def done(file: Path, model: str, precision: str, cell: Cell) -> bool:
    return results.cell_key(model, precision, cell.name) in results.read(file)["cells"]
