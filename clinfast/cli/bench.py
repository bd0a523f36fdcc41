"""`clinfast bench`: a model before and after, and against the peers that are installed."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from clinfast.bench import cache, results
from clinfast.bench.cells import Batch, Cell, batch_of, parse_cell
from clinfast.bench.contenders import CONTENDERS, PEERS
from clinfast.bench.environment import environment
from clinfast.bench.progress import RaceProgress, run_cell
from clinfast.bench.race import BASE, OURS, ParityError, Race
from clinfast.bench.sources import PRECISIONS, ModelSource
from clinfast.bench.tables import cost_table, legend, remarks
from clinfast.cli import console
from clinfast.cli.notes import Notes, tokenize
from clinfast.engine.concurrency import available_cores
from clinfast.model_folder import BadInput
from clinfast.texts import read_texts
from clinfast_command import CELLS, FAILED, PASSED

PLOTS = (".png", ".svg", ".pdf")
SEED = 0

Task = tuple[Cell, Batch | None]


def run(options: argparse.Namespace) -> int:
    if not sys.platform.startswith("linux"):
        raise BadInput("the race holds its processes by Linux means; it does not run on this system")
    console.writable("--json", options.json)
    console.writable("--plot", options.plot)
    if options.plot is not None and options.plot.suffix not in PLOTS:
        raise BadInput(f"--plot {options.plot}: the name must end in {', '.join(PLOTS)}")
    source = ModelSource.at(options.model)
    source.model_class()
    contenders = (BASE, *peers(options.peers), OURS)
    precisions = _precisions(options, source)
    out = console.output()
    tasks = [task for name in options.cells or CELLS.split(",") if (task := _task(name, options, source, out))]
    if options.texts is not None:
        tasks = _with_texts(tasks, options, source, out)
    threads = options.threads or available_cores()
    found = results.empty()
    failures: list[str] = []
    with _cache(options), RaceProgress(Console(stderr=True), len(precisions) * len(tasks), lines=False) as progress:
        surroundings = environment(threads)
        for precision in precisions:
            with Race(source, precision, contenders, threads, progress.say) as race:
                if BASE in race.absent:
                    raise BadInput(race.absent[BASE])
                if OURS in race.absent:
                    failures.append(f"{precision}: {OURS} cannot run this model: {race.absent[OURS]}")
                    continue
                for cell, batch in tasks:
                    try:
                        record = run_cell(race, cell, options.rounds, progress, batch)
                    except (ParityError, cache.BuildError) as error:
                        failures.append(str(error))
                    else:
                        ours = record["contenders"][OURS]
                        if ours["status"] != "ok":
                            failures.append(f"{precision} {cell.name}: {OURS} cannot run it: {ours['reason']}")
                        record["inputs"] = "random ids" if batch is None else "texts"
                        results.merge(found, record, surroundings)
                    progress.cell_done()
    return _show(options, found, failures, out)


def peers(names: list[str]) -> tuple[str, ...]:
    """
    Raises:
        BadInput: a name is unknown.
    """
    if names == ["auto"]:
        return PEERS
    if names == ["none"]:
        return ()
    known = [name for name in CONTENDERS if name not in (BASE, OURS)]
    for name in names:
        if name not in known:
            raise BadInput(f"--peers {name!r} is unknown; choose auto, none, or from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _precisions(options: argparse.Namespace, source: ModelSource) -> list[str]:
    own = source.precision
    names = [name for group in options.precision or [] for name in group]
    for name in names:
        if name not in PRECISIONS:
            raise BadInput(f"--precision {name!r} is not raced; choose from {', '.join(PRECISIONS)}")
    return names or [own if own in PRECISIONS else PRECISIONS[0]]


def _task(name: str, options: argparse.Namespace, source: ModelSource, out: Console) -> Task | None:
    try:
        cell = parse_cell(name, source.longest)
    except ValueError as error:
        raise BadInput(f"--cells: {error}") from error
    if cell.padded_length <= source.longest:
        return cell, None
    if options.cells:
        raise BadInput(f"--cells {name}: this model takes at most {source.longest} tokens")
    out.print(f"[dim]left out: {name}, as this model takes at most {source.longest} tokens[/]")
    return None


def _with_texts(tasks: list[Task], options: argparse.Namespace, source: ModelSource, out: Console) -> list[Task]:
    """Ragged cells filled with the user's notes."""
    if not any(cell.name.startswith("ragged") for cell, _ in tasks):
        raise BadInput("--texts fills raggedN cells, and --cells names none")
    tokenizer = source.load_tokenizer()
    notes = tokenize(read_texts(options.texts), tokenizer, source, None)
    if notes.cut:
        out.print(f"{notes.cut} of {len(notes)} notes are longer than {notes.longest} tokens and are cut", style="dim")
    return [
        _filled(cell.batch_size, notes, tokenizer.pad_token_id) if cell.name.startswith("ragged") else (cell, batch)
        for cell, batch in tasks
    ]


def _filled(size: int, notes: Notes, pad_id: int) -> Task:
    """`size` notes at evenly spaced quantiles of length, in shuffled order; all of them, where there are fewer."""
    size = min(size, len(notes))
    chosen = [int((place + 0.5) * len(notes) / size) for place in range(size)]
    random.Random(SEED).shuffle(chosen)
    rows = [notes.encoded[note]["input_ids"] for note in chosen]
    return Cell(f"ragged{size}", tuple(map(len, rows))), batch_of(rows, pad_id)


@contextmanager
def _cache(options: argparse.Namespace) -> Iterator[None]:
    """Where the harness keeps exported models: in --cache, or nowhere after this run."""
    before = os.environ.get(cache.VARIABLE)
    with tempfile.TemporaryDirectory(prefix="clinfast-") as scratch:
        folder = options.cache or scratch
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--cache {folder} cannot be made: {error.strerror}") from error
        os.environ[cache.VARIABLE] = str(os.path.abspath(folder))
        try:
            yield
        finally:
            os.environ.pop(cache.VARIABLE)
            if before is not None:
                os.environ[cache.VARIABLE] = before


def _show(options: argparse.Namespace, found: results.Results, failures: list[str], out: Console) -> int:
    groups: dict[str, dict[str, Any]] = {}
    for entry in found["cells"].values():
        groups.setdefault(entry["precision"], {})[entry["cell"]] = entry
    for precision, cells in groups.items():
        model, threads = (next(iter(cells.values()))[key] for key in ("model", "threads"))
        title = f"{escape(model)}, {precision}, {console.count(threads, 'thread')}"
        out.print()
        out.print(cost_table(title, cells))
        out.print()
        for line in (*legend(cells), *remarks(cells)):
            out.print(line, style="dim", markup=False, soft_wrap=True)
    if options.json is not None:
        console.write_json(options.json, {**results.rounded(found), "failures": failures})
    if options.plot is not None and groups:
        _plot(options, found, groups)
    for failure in failures:
        out.print(f"[bold red]FAILED[/]  {escape(failure)}", soft_wrap=True)
    return FAILED if failures else PASSED


def _plot(options: argparse.Namespace, found: results.Results, groups: dict[str, dict[str, Any]]) -> None:
    from clinfast.bench.plot import draw

    for place, (precision, cells) in enumerate(groups.items()):
        entries = [entry for entry in cells.values() if "over_stock" in entry["contenders"][OURS]]
        if not entries:
            continue
        # One figure a precision; the first has the name that was asked for.
        file = options.plot if place == 0 else options.plot.with_stem(f"{options.plot.stem}-{precision}")
        figure = draw(entries, found["environments"][entries[-1]["environment"]], entries[0]["model"], precision)
        figure.savefig(file, dpi=200, facecolor="white")
