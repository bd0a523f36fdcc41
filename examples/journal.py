"""Results in JSON lines that survive a kill: what is finished is never computed again, and nobody reads half a file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from common import Problem

Record = dict[str, Any]


def write_lines(path: Path, records: Iterable[Record]) -> None:
    with path.open("wb") as file:
        for record in records:
            file.write(encode(record))
        file.flush()
        os.fsync(file.fileno())


def encode(record: Record) -> bytes:
    """A line of JSON. Lone surrogates, as in file names that are not UTF-8, can only be written as escapes."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


class Journal:
    """The results of a run, in `OUT.partial` until `finish` puts the complete `OUT` in its place.

    Args:
        out: the file to make. `OUT.run.json` keeps the settings beside it.
        settings: what the results depend on; results of other settings are never mixed with these.
        key: names the work that a record is the result of.
        overwrite: forget what is there.
        seed: begin with the records of a finished `OUT`, for inputs that grow.

    Raises:
        Problem: `out` cannot be written, is being written, or holds the results of other settings.
    """

    def __init__(
        self, out: Path, settings: Record, key: Callable[[Record], Hashable], *, overwrite: bool, seed: bool = False
    ) -> None:
        self.out = out
        self._partial = out.with_name(f"{out.name}.partial")
        self._settings = out.with_name(f"{out.name}.run.json")
        self._key = key
        self._offsets: dict[Hashable, int] = {}
        if not out.parent.is_dir():
            raise Problem(f"--out {out}: the folder {out.parent} does not exist")
        try:
            self._check(settings, overwrite)
            self.complete = not overwrite and out.exists() and not self._partial.exists()
            seeds = self.complete and seed
            self._file = self._partial.open("a+b")
            self._lock()
            if overwrite:
                self._file.truncate(0)
            elif seeds:
                with out.open("rb") as finished:
                    shutil.copyfileobj(finished, self._file)
                self._file.flush()
            self._replace(self._settings, lambda path: write_lines(path, [settings]))
        except OSError as problem:
            raise Problem(f"--out {out} cannot be written: {problem.strerror}") from problem
        self._scan()

    def _check(self, settings: Record, overwrite: bool) -> None:
        if overwrite or not (self.out.exists() or self._partial.exists()):
            return
        way_out = "give another --out, or --overwrite"
        try:
            old = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Problem(f"--out {self.out} is there, and not from a run that could be resumed; {way_out}") from None
        changed = [name for name in settings | old if settings.get(name) != old.get(name)]
        if changed:
            told = ", ".join(changed)
            raise Problem(f"--out {self.out} holds results of a run with another {told}; {way_out}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise Problem(f"--out {self.out} is being written by another run") from None

    def _scan(self) -> None:
        """Find the finished records; a line that a kill cut short goes, and with it whatever is behind."""
        self._file.seek(0)
        offset = 0
        for line in self._file:
            try:
                key = self._key(json.loads(line))
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._offsets[key] = offset
            offset += len(line)
        self._file.truncate(offset)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, records: Iterable[Record]) -> None:
        """Add records; they are on the disk when this returns."""
        try:
            offset = self._file.seek(0, os.SEEK_END)
            for record in records:
                line = encode(record)
                self._file.write(line)
                self._offsets[self._key(record)] = offset
                offset += len(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise Problem(f"--out {self.out} cannot be written: {problem.strerror}") from problem

    def records(self, keys: Iterable[Hashable]) -> Iterator[Record]:
        """The finished records, in the order of `keys`."""
        for key in keys:
            self._file.seek(self._offsets[key])
            yield json.loads(self._file.readline())

    def finish(
        self, keys: Iterable[Hashable], write: Callable[[Path, Iterable[Record]], None] = write_lines
    ) -> None:
        """Put `OUT` in its place, complete, with the records of `keys` in that order."""
        try:
            self._replace(self.out, lambda path: write(path, self.records(keys)))
            self._partial.unlink()
        except OSError as problem:
            raise Problem(f"--out {self.out} cannot be written: {problem.strerror}") from problem

    @staticmethod
    def _replace(path: Path, write: Callable[[Path], None]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if not self._offsets:
                self._partial.unlink()
        self._file.close()
