"""`clinfast verify`: the fast path held against stock and float64, on the user's model and texts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from clinfast.bench.tables import narrow_table
from clinfast.cli import console
from clinfast.cli.measure import Composition, Measurement, Row
from clinfast.cli.notes import Notes, tokenize
from clinfast.cli.sides import RunsStock, Sides
from clinfast.model_folder import ModelFolder
from clinfast.texts import read_texts


def run(options: argparse.Namespace) -> int:
    console.writable("--json", options.json)
    folder = ModelFolder.at(options.model)
    texts = read_texts(options.texts)
    out = console.output()
    folder.model_class()
    tokenizer = folder.load_tokenizer()
    notes = tokenize(texts, tokenizer, folder, options.max_length)
    model = folder.load_model()
    facts: dict[str, Any] = {
        "model": folder.name,
        "architecture": folder.architecture,
        "texts": str(options.texts),
        "notes": len(notes),
        "max_length": notes.longest,
        "notes_cut": notes.cut,
        "batch_size": options.batch_size,
        "threshold": options.threshold,
        "machine": console.facts(),
    }
    asked = [name for group in options.precision for name in group] if options.precision else None
    try:
        sides = Sides(model, asked)
    except RunsStock as reason:
        said = escape(f"{folder.architecture} runs stock: {reason}")
        out.print(f"[bold red]FAILED[/]  {said}", soft_wrap=True)
        _write(options.json, facts | {"passed": False, "runs_stock": str(reason), "rows": [], "compositions": []})
        return 1
    measurement = _measure(sides, notes, options)
    rows, compositions = measurement.rows, measurement.compositions
    passed = all(row.passed for row in rows) and all(part.passed for part in compositions)
    out.print(_opening(folder, notes, options.texts))
    out.print(error_table(rows))
    out.print()
    out.print(composition_table(compositions))
    out.print()
    out.print(verdict(rows, compositions, options.threshold), soft_wrap=True)
    _write(
        options.json,
        facts
        | {
            "passed": passed,
            "runs_stock": None,
            "rows": [_row_facts(row) for row in rows],
            "compositions": [vars(part) | {"passed": part.passed} for part in compositions],
        },
    )
    return 0 if passed else 1


def _measure(sides: Sides, notes: Notes, options: argparse.Namespace) -> Measurement:
    stderr = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<20}"), BarColumn(bar_width=40), TaskProgressColumn(), TimeRemainingColumn(),
        console=stderr, transient=True, auto_refresh=False, disable=not stderr.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("measuring", total=None)

        def advance(what: str, tokens: int) -> None:
            bar.update(task, description=what, advance=tokens, refresh=True)

        measurement = Measurement(sides, notes, options.batch_size, advance)
        bar.update(task, total=measurement.work())
        measurement.run(options.threshold)
    return measurement


def _opening(folder: ModelFolder, notes: Notes, texts: Path) -> Table:
    cut = f"{notes.cut:,} of them longer, and cut" if notes.cut else "none longer"
    table = console.facts_table()
    table.add_row("model", f"{escape(folder.name)}, {escape(folder.architecture)}")
    table.add_row("notes", f"{len(notes):,} of {escape(str(texts))}")
    table.add_row("length", f"at most {notes.longest} tokens, {cut}\n")
    return table


def error_table(rows: list[Row]) -> Table:
    table = narrow_table("largest error against float64, and largest difference from stock")
    labelled = any(row.tally.labels for row in rows)
    for heading in ("dtype", "padding", "width", "tokens"):
        table.add_column(heading, no_wrap=True)
    for heading in ("notes", "error,\nours", "error,\nstock", "from\nstock"):
        table.add_column(heading, justify="right", no_wrap=True)
    if labelled:
        table.add_column("labels\nagree", justify="right", no_wrap=True)
    table.add_column("")
    for place, row in enumerate(rows):
        tally = row.tally
        cells = [row.precision, row.padding, row.padded_to, row.tokens, f"{row.notes:,}"]
        cells += [f"{value:.1e}" for value in (tally.ours_error, tally.stock_error, tally.worst)]
        if labelled:
            cells.append(percent(tally.agreed, tally.labels))
        last = place + 1 == len(rows) or rows[place + 1].precision != row.precision
        table.add_row(*cells, _mark(row), end_section=last)
    return table


def percent(part: int, whole: int) -> str:
    """Never 100% where one is missing."""
    if part == whole:
        return "100%" if whole else ""
    return f"{math.floor(part / whole * 1e4) / 100:.2f}%"


def _mark(row: Row) -> str:
    if row.stock_calls:
        return "[red]stock[/]"
    return "[green]ok[/]" if row.passed else "[bold red]far[/]"


def composition_table(compositions: list[Composition]) -> Table:
    table = narrow_table("same bits as in batches sorted by length")
    for heading in ("dtype", "batches"):
        table.add_column(heading, no_wrap=True)
    for heading in ("notes", "same bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for part in compositions:
        state = "[green]ok[/]" if part.same == part.notes else "[bold red]differ[/]"
        if not part.promised:
            state = "[dim]not promised for this head or machine[/]"
        table.add_row(part.precision, part.batches, f"{part.notes:,}", f"{part.same:,}", state)
    return table


def verdict(rows: list[Row], compositions: list[Composition], threshold: float | None) -> str:
    rule = "twice stock's own error" if threshold is None else f"{threshold:g} from stock"
    reasons = sorted({reason for row in rows for reason in row.stock_calls})
    if reasons:
        return f"[bold red]FAILED[/]  calls ran stock, so nothing was verified of them: {escape('; '.join(reasons))}"
    far = sum(not row.passed for row in rows)
    differ = sum(not part.passed for part in compositions)
    if not far and not differ:
        held = "; same note, same bits" if all(part.promised for part in compositions) else ""
        return f"[bold green]PASSED[/]  {len(rows)} combinations within {rule}{held}"
    said = [f"{far} of {len(rows)} combinations are beyond {rule}"] if far else []
    if differ:
        said.append(f"bits differ with the batch in {differ} of {len(compositions)} comparisons")
    return f"[bold red]FAILED[/]  {'; '.join(said)}"


def _row_facts(row: Row) -> dict[str, Any]:
    tally = row.tally
    return {
        "precision": row.precision,
        "padding": row.padding,
        "padded_to": row.padded_to,
        "tokens": row.tokens,
        "notes": row.notes,
        "ours_error": _finite(tally.ours_error),
        "stock_error": _finite(tally.stock_error),
        "max_difference": _finite(tally.worst),
        "cosine": tally.cosine,
        "labels": tally.labels,
        "labels_agreed": tally.agreed,
        "stock_calls": dict(row.stock_calls),
        "passed": row.passed,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity; a NaN among the outputs was counted as one."""
    return value if math.isfinite(value) else None


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        console.write_json(path, content)
