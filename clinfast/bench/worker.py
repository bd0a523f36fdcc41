"""The process of one contender: `python -m clinfast.bench.worker FD CONTENDER NAME FOLDER PRECISION THREADS`.

It obeys commands on the socket FD. Its times are its own clock around each call, so neither the socket nor
the parent is in them.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from clinfast.bench.cache import BuildError
from clinfast.bench.cells import Batch
from clinfast.bench.contenders import contender_class
from clinfast.bench.contenders.base import CannotRun, Contender
from clinfast.bench.reference import comparable
from clinfast.bench.sources import ModelSource
from clinfast.engine.spec import Unsupported
from clinfast.model_folder import BadInput

ROUND_SECONDS = 0.25
WARM_UP_SECONDS = 1.0
CALLS_PER_ROUND = 200
LONG_CALL_SECONDS = 3.0
"""A first call this long is warm-up enough: allocation and page faults are a small part of it."""
PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.call: Callable[[], Any] | None = None
        self.call_seconds = 0.0

    def load(self) -> dict[str, Any]:
        start = perf_counter()
        self.contender.load()
        return {"load_s": perf_counter() - start}

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """Sets the batch up, gives the outputs of the first call (real tokens only), then warms up."""
        self.call = None
        gc.collect()
        start = perf_counter()
        call = self.contender.prepare(batch)
        raw = call()
        first_s = perf_counter() - start
        outputs = comparable(self.contender.outputs(raw), batch.attention_mask.astype(bool))
        del raw
        self.call = call
        if first_s > LONG_CALL_SECONDS and not self.contender.compiles_at_first_call:
            warm = [first_s]
        else:
            warm = [self.timed_call()]
        while sum(warm) + warm[-1] < WARM_UP_SECONDS:
            warm.append(self.timed_call())
        self.call_seconds = warm[-1]
        return {
            "outputs": outputs,
            "first_call_s": first_s,
            "warm_call_s": warm[-1],
            "version": self.contender.version,
            "notes": self.contender.describe(),
        }

    def run(self) -> dict[str, Any]:
        """One round: the times of as many calls as fill `ROUND_SECONDS`, at least one."""
        assert self.call is not None
        if self.call_seconds < ROUND_SECONDS:
            # Others had the caches since our last round; a call this short would show it.
            self.timed_call()
        times: list[float] = []
        while not times or (sum(times) < ROUND_SECONDS and len(times) < CALLS_PER_ROUND):
            times.append(self.timed_call())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"times": times, "peak_rss": peak}

    def timed_call(self) -> float:
        assert self.call is not None
        start = perf_counter()
        result = self.call()
        seconds = perf_counter() - start
        del result
        return seconds


def serve(connection: Connection, worker: Worker) -> None:
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "load": worker.load,
        "prepare": worker.prepare,
        "run": worker.run,
    }
    while True:
        command, *arguments = connection.recv()
        if command == "quit":
            return
        try:
            reply = commands[command](*arguments)
        except Exception as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            print(f"{command} failed:", repr(error), file=sys.stderr, flush=True)
            told = isinstance(error, (CannotRun, BuildError, BadInput, Unsupported))
            connection.send({"failed": (text if told else f"{type(error).__name__}: {text}")[:300]})
        else:
            connection.send(reply)


def main() -> None:
    # The parent stops workers; if it died, a stopped one would stay for ever.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor, contender, name, folder, precision, threads = sys.argv[1:]
    source = ModelSource(name, Path(folder))
    serve(Connection(int(descriptor)), Worker(contender_class(contender)(source, precision, int(threads))))


if __name__ == "__main__":
    main()
