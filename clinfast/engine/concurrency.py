"""How many calls run at once, and what a forked child may do.

Every calling thread brings an OpenMP team of its own. More teams than cores only take the cores from each other, so a
call waits until there is room: cores // threads of a call, at least one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Gate:
    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._running = 0

    def after_fork(self) -> None:
        self._reset()

    @contextmanager
    def room(self) -> Iterator[None]:
        limit = max(1, available_cores() // torch.get_num_threads())
        with self._condition:
            while self._running >= limit:
                self._condition.wait()
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify()


def available_cores() -> int:
    global _cores
    if _cores is None:
        _cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _cores


_cores: int | None = None
_forked = False
gate = Gate()


def _after_fork_in_child() -> None:
    global _forked
    _forked = True
    gate.after_fork()


def single_thread_if_forked() -> None:
    """In a forked child torch's thread pool hangs on first use; one thread works. Cheap to ask every time."""
    if _forked and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork_in_child)
