"""The parent's end of a worker: a process that runs only while it is asked something."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clinfast.bench import cache
from clinfast.bench.sources import ModelSource

REPLY_SECONDS = 1800.0


class ContenderFailed(RuntimeError):
    """A contender cannot take part; the text is the reason, in one line."""


class WorkerProcess:
    """Between two questions the process is held by SIGSTOP: idle thread pools spin and would steal cores."""

    def __init__(self, contender: str, source: ModelSource, precision: str, threads: int) -> None:
        self.contender = contender
        self.log: Path = cache.logs() / f"{contender}-{source.name}-{precision}.log"
        ours, theirs = socket.socketpair()
        folder = str(source.folder.resolve())
        arguments = [str(theirs.fileno()), contender, source.name, folder, precision, str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "clinfast.bench.worker", *arguments],
                env=cache.environment_of_worker(threads),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, *question: Any) -> dict[str, Any]:
        self.resume()
        try:
            self.connection.send(question)
            if not self.connection.poll(REPLY_SECONDS):
                raise ContenderFailed(f"no answer to {question[0]} in {REPLY_SECONDS:.0f} s")
            reply: dict[str, Any] = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait(timeout=10)
            raise ContenderFailed(
                f"its process ended with code {code}: {cache.last_line(self.log)}"
            ) from None
        self.stop()
        if "failed" in reply:
            raise ContenderFailed(reply["failed"])
        return reply

    def stop(self) -> None:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
