"""Races as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

from clinfast.bench.cells import CELLS
from clinfast.bench.contenders import CONTENDERS, LABELS
from clinfast.bench.race import BASE, OURS

BUSY_OTHERS = 0.1
"""Cores in use by other processes from which on a timing is marked as disturbed."""


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


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Known names in their usual order, then the others as they come."""
    found = list(names)
    return [name for name in known if name in found] + [name for name in found if name not in set(known)]


def cost_table(title: str, cells: dict[str, dict[str, Any]]) -> Table:
    """One section a cell: time, rate, speed against stock, error, and what a million such notes cost."""
    table = narrow_table(title)
    table.add_column("", no_wrap=True)
    for heading in ("ms", "notes/s", "times\nstock", "error", "CPU-hours per\nmillion notes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for column in cells:
        entry = cells[column]
        padding = 1 - entry["tokens_real"] / entry["tokens_padded"]
        table.add_row(f"[cyan]{column}{f', {padding:.0%} padding' if padding else ''}[/]")
        for name in in_order(entry["contenders"], CONTENDERS):
            contender = entry["contenders"][name]
            style = "bold" if name == OURS else "" if is_racer(name) else "dim"
            table.add_row(f"  {LABELS.get(name, name)}", *_cost(contender), style=style)
        table.add_section()
    return table


def narrow_table(title: str) -> Table:
    """Fits eighty columns."""
    left: Any = {"title_justify": "left", "title_style": "bold", "padding": (0, 1, 0, 0)}
    return Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, **left)


def legend(cells: dict[str, dict[str, Any]]) -> Iterable[str]:
    """What the columns and the cells are."""
    yield "ms: median of a batch; times stock: speed, round by round; error: largest relative, against float64"
    for name, entry in cells.items():
        if entry["tokens_real"] != entry["tokens_padded"]:
            what = f"of {entry['inputs']}, " if "inputs" in entry else ""
            mean = entry["tokens_real"] / entry["batch_size"]
            yield (
                f"{name}: {entry['batch_size']} notes {what}{mean:.0f} tokens in the mean, "
                f"padded to {entry['padded_length']}"
            )


def _cost(contender: dict[str, Any]) -> list[str]:
    if contender["status"] != "ok":
        return ["skipped"]
    mark = "*" if contender["others_cores"] > BUSY_OTHERS else ""
    errors = [error["relative"] for error in contender["error"].values()]
    ratio = contender.get("over_stock")
    return [
        milliseconds(contender["median_ms"]) + mark,
        rate(contender["notes_per_second"]),
        f"{1 / ratio['median']:.2f}" if ratio else "",
        f"{max(errors):.1e}" if errors else "",
        rate(contender["cpu_hours_per_million_notes"]),
    ]


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
