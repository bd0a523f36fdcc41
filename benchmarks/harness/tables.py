"""The result file as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness.cells import CELLS
from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.goals import GOALS_FILE, Verdict, verdicts
from benchmarks.harness.race import BASE, OURS
from benchmarks.harness.results import Results

BUSY_OTHERS = 0.1
"""Cores in use by other processes from which on a timing is marked as disturbed."""


def print_results(results: Results, console: Console, goals_file: Path = GOALS_FILE) -> None:
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in results["cells"].values():
        groups.setdefault((entry["model"], entry["precision"]), {})[entry["cell"]] = entry
    for (model, precision), cells in groups.items():
        console.print(race_table(f"{model} {precision}", cells))
        for line in remarks(cells):
            console.print(line, style="dim", highlight=False)
        console.print()
    measured = [
        verdict for verdict in verdicts(results, goals_file) if (verdict.model, verdict.precision) in groups
    ]
    if measured:
        console.print(goal_table(measured))


def race_table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """Contenders as rows; in each cell the median in ms, and how many times ours (or stock's) that is."""
    columns = in_order(cells, CELLS)
    raced = any(entry["contenders"].get(OURS, {}).get("status") == "ok" for entry in cells.values())
    base = OURS if raced else BASE
    table = Table(title=f"{title}: ms (times {base})", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    names = in_order({name for entry in cells.values() for name in entry["contenders"]}, CONTENDERS)
    for name in names:
        row = [cell_text(cells[column]["contenders"].get(name), f"over_{base}") for column in columns]
        style = "bold" if name == OURS else "dim" if not is_racer(name) else ""
        table.add_row(name, *row, style=style)
    table.add_section()
    table.add_row("real / padded tokens", *(tokens(cells[column]) for column in columns), style="dim")
    return table


def is_racer(name: str) -> bool:
    return name not in CONTENDERS or CONTENDERS[name].has_outputs


def tokens(entry: dict[str, Any]) -> str:
    return f"{entry['tokens_real']} / {entry['tokens_padded']}"


def cell_text(contender: dict[str, Any] | None, key: str) -> str:
    if contender is None:
        return "-"
    if contender["status"] != "ok":
        return contender["status"]
    ratio = contender.get(key)
    mark = "*" if contender["others_cores"] > BUSY_OTHERS else ""
    return f"{milliseconds(contender['median_ms'])}{mark}" + (f" ({ratio['median']:.2f})" if ratio else "")


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def remarks(cells: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Who was skipped and why, and which figures others' work on the machine disturbed."""
    reasons: dict[tuple[str, str], list[str]] = {}
    disturbed = 0.0
    for cell, entry in cells.items():
        for name, contender in entry["contenders"].items():
            if contender["status"] != "ok":
                reasons.setdefault((name, contender["reason"]), []).append(cell)
            else:
                disturbed = max(disturbed, contender["others_cores"])
    for (name, reason), where in reasons.items():
        yield f"skipped: {name} ({'all cells' if len(where) == len(cells) else ', '.join(where)}): {reason}"
    if disturbed > BUSY_OTHERS:
        yield f"* other processes used up to {disturbed:.1f} cores meanwhile: measure again when it is quiet"


def goal_table(found: list[Verdict]) -> Table:
    met = sum(verdict.met for verdict in found)
    table = Table(
        title=f"Goals: {met} of {len(found)} met (peer's time over ours / goal)", title_justify="left"
    )
    columns = in_order({verdict.cell for verdict in found}, CELLS)
    for heading in ("model", "against", *columns):
        table.add_column(heading, justify="left" if heading in ("model", "against") else "right")
    rows: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in found:
        rows.setdefault((f"{verdict.model} {verdict.precision}", verdict.against), {})[verdict.cell] = verdict
    for (model, against), row in rows.items():
        name = against.replace("best_of:", "best of ").replace(",", ", ")
        table.add_row(model, name, *(goal_text(row.get(column)) for column in columns))
    return table


def goal_text(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("")
    if verdict.reached is None:
        return Text(f"{verdict.why_not} / {verdict.goal:g}", style="yellow")
    figures = f"{verdict.reached:.2f} / {verdict.goal:g}"
    if verdict.met:
        return Text(f"{figures} met", style="green")
    return Text(f"{figures} missed by {1 - verdict.reached / verdict.goal:.0%}", style="red")


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Known names in their usual order, then the others as they come."""
    found = list(names)
    return [name for name in known if name in found] + [name for name in found if name not in set(known)]
