"""Requests that arrive together are computed together: one worker thread behind a bounded queue. No HTTP, no model."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

SMOOTHING = 0.2


class Full(Exception):
    """No room in the queue; `retry_after` is when there should be some, in seconds."""

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(f"{waiting:,} tokens are waiting and the queue holds {limit:,}")
        self.retry_after = retry_after


class Closed(Exception):
    """The batcher takes no more work."""


class Job(NamedTuple):
    texts: list[str]
    tokens: int
    answer: Future[Any]


class Batcher:
    """Runs `compute` over the texts of several jobs at once.

    Args:
        compute: texts to as many rows, in order; called in one thread only.
        window: seconds that the first job of a batch waits for others.
        token_budget: most tokens of a batch; a job that is larger goes alone.
        queue_tokens: most tokens that wait; an empty queue takes any job.
    """

    def __init__(
        self, compute: Callable[[list[str]], Sequence[Any]], *, window: float, token_budget: int, queue_tokens: int
    ) -> None:
        self._compute = compute
        self._window, self._budget, self._limit = window, token_budget, queue_tokens
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._seconds_per_token = 1e-3
        self.waiting_tokens = 0
        self.taken = self.cancelled = 0  # jobs
        self.batches = self.texts = self.tokens = 0
        self._thread = threading.Thread(target=self._work, name="embedding-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_jobs(self) -> int:
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, texts: list[str], tokens: int) -> Future[Any]:
        """Queue texts of so many tokens in all; the future gives their rows, and may be cancelled while it waits.

        Raises:
            Full: try again after `retry_after` seconds.
            Closed: after `close`.
        """
        job = Job(texts, tokens, Future())
        with self._changed:
            if not self.alive:
                raise Closed("the service is shutting down")
            if self._jobs and self.waiting_tokens + tokens > self._limit:
                self._drop_cancelled()
            if self._jobs and self.waiting_tokens + tokens > self._limit:
                raise Full(self.waiting_tokens, self._limit, self.waiting_tokens * self._seconds_per_token)
            self._jobs.append(job)
            self.taken += 1
            self.waiting_tokens += tokens
            self._changed.notify_all()
        return job.answer

    def close(self, timeout: float | None = None) -> bool:
        """Take no more jobs, finish those that wait, and end the thread.

        Returns:
            False where `timeout` seconds were not enough; what still waits then fails with `Closed`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._jobs)
            self._jobs.clear()
            self.waiting_tokens = 0
        for job in left:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Closed("the service shut down before this was computed"))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next_batch():
            begin = time.perf_counter()
            self._run(batch)
            spent = (time.perf_counter() - begin) / max(1, sum(job.tokens for job in batch))
            self._seconds_per_token += SMOOTHING * (spent - self._seconds_per_token)

    def _next_batch(self) -> list[Job]:
        """Jobs that nobody has cancelled, no longer cancellable; none when there will be no more."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return []
                deadline = time.monotonic() + self._window
                while self.waiting_tokens < self._budget and not self._closing:
                    if not self._changed.wait(deadline - time.monotonic()):
                        break
                batch: list[Job] = []
                tokens = 0
                while self._jobs and (not batch or tokens + self._jobs[0].tokens <= self._budget):
                    job = self._jobs.popleft()
                    self.waiting_tokens -= job.tokens
                    if job.answer.set_running_or_notify_cancel():
                        batch.append(job)
                        tokens += job.tokens
                    else:
                        self.cancelled += 1
                if batch:
                    return batch

    def _drop_cancelled(self) -> None:
        kept = [job for job in self._jobs if not job.answer.cancelled()]
        self.cancelled += len(self._jobs) - len(kept)
        self._jobs = collections.deque(kept)
        self.waiting_tokens = sum(job.tokens for job in kept)

    def _run(self, batch: Sequence[Job]) -> None:
        texts = [text for job in batch for text in job.texts]
        try:
            rows = self._compute(texts)
            if len(rows) != len(texts):
                raise RuntimeError(f"{len(texts)} texts gave {len(rows)} rows")
        except Exception as problem:
            if len(batch) == 1:
                batch[0].answer.set_exception(problem)
            else:
                # One of them is at fault, and only that one shall hear of it.
                for job in batch:
                    self._run([job])
            return
        self.batches += 1
        self.texts += len(texts)
        self.tokens += sum(job.tokens for job in batch)
        begin = 0
        for job in batch:
            job.answer.set_result(rows[begin : begin + len(job.texts)])
            begin += len(job.texts)
