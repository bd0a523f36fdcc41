"""Where the commands write: tables to stdout, progress to stderr."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import clinfast
from clinfast.model_folder import BadInput
from clinfast.report import Info

WIDTH_OF_FILES = 140


def output() -> Console:
    """Standard output; wide enough for every table where it is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH_OF_FILES)


def writable(option: str, path: Path | None) -> None:
    """Said before minutes are spent on measuring.

    Raises:
        BadInput: `path` cannot be written.
    """
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir():
        raise BadInput(f"{option} {path} is a folder; name a file")
    if not folder.is_dir():
        raise BadInput(f"{option} {path}: the folder {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise BadInput(f"{option} {path} cannot be written")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def machine() -> Info:
    """`clinfast.info()`, with our version also where the package is not installed but only on the path."""
    found = clinfast.info()
    return dataclasses.replace(found, versions={**found.versions, "clinfast": clinfast.__version__})


def facts() -> dict[str, Any]:
    return dataclasses.asdict(machine())


def facts_table() -> Table:
    """Names and facts in two columns, after a blank line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row()
    return table


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
