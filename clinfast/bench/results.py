"""The result file: one entry per (model, precision, cell), replaced whole when it is measured again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clinfast.bench import cache

SCHEMA = 1
Results = dict[str, Any]


def empty() -> Results:
    return {"schema": SCHEMA, "environments": {}, "cells": {}}


def read(path: Path) -> Results:
    if not path.exists():
        return empty()
    found: Results = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {found.get('schema')!r}; this version reads {SCHEMA}")
    return found


def cell_key(model: str, precision: str, cell: str) -> str:
    return f"{model}/{precision}/{cell}"


def add_application(path: Path, task: str, record: dict[str, Any], environment: dict[str, Any]) -> None:
    """One measurement of a whole application, which has no cells; `environment` is stored with it."""
    results = read(path)
    results.setdefault("applications", {})[task] = {**record, "environment": environment}
    write(path, results)


def merge(results: Results, record: dict[str, Any], environment: dict[str, Any]) -> None:
    """Puts one cell in. Equal environments are stored once; environments that no cell names any more go."""
    date = environment["date"]
    lasting = {name: value for name, value in environment.items() if name != "date"}
    name = cache.key(**lasting)
    results["environments"][name] = lasting
    key = cell_key(record["model"], record["precision"], record["cell"])
    results["cells"][key] = {**record, "environment": name, "date": date}
    used = {cell["environment"] for cell in results["cells"].values()}
    results["environments"] = {name: env for name, env in results["environments"].items() if name in used}


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(rounded(results), indent=1) + "\n")
    unfinished.replace(path)


def add(path: Path, record: dict[str, Any], environment: dict[str, Any]) -> Results:
    """Merges one cell into the file, read afresh, so that runs in several commands add up."""
    results = read(path)
    merge(results, record, environment)
    write(path, results)
    return results


def rounded(value: Any) -> Any:
    """Floats to 5 significant digits: more is noise, and would make the committed file's diffs long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
