"""What the demo prints."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from rich import box
from rich.table import Table

import clinfast
from clinfast.cli.console import count
from clinfast.demo.measure import FAST, STOCK
from clinfast.demo.work import MAX_TOKENS, NOTES, Work

BUSY = 1.3


def opening(work: Work, options: argparse.Namespace, info: Any) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    shortest, median, longest = min(work.lengths), statistics.median(work.lengths), max(work.lengths)
    versions = {**info.versions, "clinfast": clinfast.__version__}
    kind = "synthetic clinical notes" if options.notes == NOTES else f"notes from {options.notes}"
    table.add_row("processor", f"{info.cpu}, {count(info.threads, 'thread')}")
    table.add_row("kernels", f"{info.isa}, in fp32 like the model")
    table.add_row("versions", ", ".join(f"{key} {value}" for key, value in versions.items()))
    table.add_row(
        "notes",
        f"{len(work.lengths)} {kind} of {shortest} to {longest} tokens, median {median:.0f}",
    )
    table.add_row(
        "timed",
        f"{work.timed_notes} notes, {len(work.timed)} of the {len(work.batches)} batches of "
        f"{options.batch_size}, cut at {MAX_TOKENS}; {1 - work.real_share:.0%} is padding",
    )
    table.add_row("method", f"{count(options.rounds, 'round')}, both sides in turn in one process; medians")
    return table


def comparison(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column("before:\nstock", justify="right", no_wrap=True)
    table.add_column("after:\nclinfast", justify="right", no_wrap=True, style="bold")
    table.add_column("", justify="right", no_wrap=True, style="bold green")
    sides = [result["sides"][side] for side in (STOCK, FAST)]

    def row(label: str, key: str, form: str, last: str = "", end_section: bool = False) -> None:
        table.add_row(label, *(format(side[key], form) for side in sides), last, end_section=end_section)

    row("notes per second", "notes_per_second", ".1f", f"{result['speedup']:.1f} x")
    row(f"seconds for {result['timed_notes']} notes, median pass", "median_seconds_per_pass", ".2f")
    ranges = [(min(side["seconds_per_pass"]), max(side["seconds_per_pass"])) for side in sides]
    table.add_row("  fastest to slowest pass", *(f"{a:.2f} to {b:.2f}" for a, b in ranges), end_section=True)
    saved = f"{1 / result['speedup'] - 1:+.0%}"
    row("CPU-hours per million notes", "cpu_hours_per_million_notes", ".1f", saved, end_section=True)
    row("largest error against float64", "error_against_float64", ".1e")
    table.add_row("largest difference from stock", "", f"{result['largest_difference']:.1e}")
    table.add_row("smallest cosine with stock", "", f"{result['smallest_cosine']:.9f}", end_section=True)
    table.add_row("calls on the fast path", "", f"{result['calls_fast']} of {result['calls_optimized']}")
    return table


def explanation(result: dict[str, Any]) -> str:
    lines = [
        "[dim]CPU-hours are threads times wall time. Errors and cosine are of mean-pooled",
        f"embeddings: all timed notes, but {result['float64_sample_notes']} of them against float64.[/]",
    ]
    passes = [side["seconds_per_pass"] for side in result["sides"].values()]
    spread = max(max(seconds) / min(seconds) for seconds in passes)
    if spread > BUSY:
        lines.append(
            f"[yellow]The slowest pass took {spread:.1f} times the fastest: something else keeps this\n"
            "machine busy. Take the ratio with care, or run again when it is quiet.[/]"
        )
    return "\n".join(lines) + "\n"
