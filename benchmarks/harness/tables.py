"""The result file as tables for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness.goals import GOALS_FILE, Verdict, verdicts
from clinfast.bench.cells import CELLS
from clinfast.bench.results import Results
from clinfast.bench.tables import in_order, race_table, remarks


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
