"""Rows of notes from JSONL or CSV, with what is wrong in each told rather than raised."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import Problem

DELIMITERS = ",;\t|"


class Row(NamedTuple):
    """A note; `error` says why there is no usable `text`."""

    id: Any
    text: str
    error: str | None


def read_rows(path: Path, text_field: str, id_field: str, encoding: str) -> Iterator[Row]:
    """The rows of a .jsonl (blank lines are none) or .csv file; raises `Problem` where the file as a whole is wrong."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise Problem(f"--notes {path} must end in .jsonl or .csv")
    try:
        yield from (_jsonl if suffix == ".jsonl" else _csv)(path, text_field, id_field, encoding)
    except OSError as problem:
        raise Problem(f"--notes {path} cannot be read: {problem.strerror}") from problem
    except LookupError:
        raise Problem(f"--encoding {encoding} is not known to Python") from None


def _jsonl(path: Path, text_field: str, id_field: str, encoding: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode(encoding).removeprefix("\ufeff"))
            except UnicodeDecodeError as problem:
                yield Row(None, "", f"is not {encoding} (byte 0x{line[problem.start]:02x})")
                continue
            except ValueError as problem:
                yield Row(None, "", f"is not JSON: {problem}")
                continue
            if not isinstance(fields, dict):
                yield Row(None, "", "is not a JSON object")
            else:
                yield _row(fields.get(id_field), fields.get(text_field), text_field)


def _csv(path: Path, text_field: str, id_field: str, encoding: str) -> Iterator[Row]:
    # The module's own limit of 131,072 characters is less than a long discharge report.
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding=encoding, errors="surrogateescape") as file:
        header = file.readline()
        # Spreadsheets in half of Europe write semicolons; Excel's UTF-8 begins with a byte order mark.
        delimiter = max(DELIMITERS, key=header.count)
        columns = next(csv.reader([header.removeprefix("\ufeff")], delimiter=delimiter), [])
        if text_field not in columns:
            raise Problem(f"--notes {path} has no column {text_field!r}; it has {', '.join(columns) or 'none'}")
        try:
            for fields in csv.DictReader(file, columns, delimiter=delimiter):
                yield _row(fields.get(id_field), fields[text_field], text_field, encoding)
        except csv.Error as problem:
            raise Problem(f"--notes {path} is not CSV: {problem}") from problem


def _row(identity: Any, text: Any, field: str, encoding: str = "UTF-8") -> Row:
    if not isinstance(text, str):
        return Row(identity, "", f"has no string in {field!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        return Row(identity, "", f"is not {encoding}")
    return Row(identity, text, None if text.strip() else "is empty")


def file_digest(path: Path) -> str:
    """SHA-256 of the file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as problem:
        raise Problem(f"--notes {path} cannot be read: {problem.strerror}") from problem
    return digest.hexdigest()
