"""How many calls run at once, and what a forked child may do.

Every calling thread brings an OpenMP team of its own. More teams than cores only take the cores from each other, so a
call waits until there is room: cores // threads of a call, at least one.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Gate:
    """Lets so many threads in; a thread that is inside already passes, since it must not wait for itself.

    Who is inside is a set of threads, not a count: a signal handler may call the model between any two steps of this
    code, and then a thread is found inside or not, never half-way.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._condition = threading.Condition()  # its RLock lets a signal handler of the holder in
        self._inside: set[int] = set()

    @contextmanager
    def room(self, device: str = "cpu") -> Iterator[None]:
        me = threading.get_ident()
        if device != "cpu" or me in self._inside:
            yield
            return
        try:
            self._enter(me, max(1, available_cores() // torch.get_num_threads()))
            yield
        finally:
            self._leave(me)

    def _enter(self, me: int, limit: int) -> None:
        with self._condition:
            while len(self._inside) >= limit:
                self._condition.wait()
            self._inside.add(me)

    def _leave(self, me: int) -> None:
        with self._condition:
            self._inside.discard(me)
            # All, since limits differ between threads: the one that a single notice reaches may have to wait on. And
            # an interrupted waiter, which was never inside, so hands on the notice that it may have got.
            self._condition.notify_all()


class ForkSafeLock:
    """A lock that is free in a forked child, whoever held it in the parent, and for a signal handler of its holder."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self.renew()
        _locks.add(self)

    def renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


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
    gate.renew()
    for lock in _locks:
        lock.renew()


def single_thread_if_forked() -> None:
    """In a forked child torch's thread pool hangs on first use; one thread works. Cheap to ask every time."""
    if _forked and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork_in_child)
