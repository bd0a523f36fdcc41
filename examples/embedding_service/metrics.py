"""Counts in the text format of Prometheus."""

from __future__ import annotations

import collections
import threading
from typing import Any

from embedding_service.batcher import Batcher


class Metrics:
    """Requests by status and the seconds of those answered; the rest is read where it is counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[int] = collections.Counter()
        self._seconds = 0.0

    def count_request(self, status: int, seconds: float = 0.0) -> None:
        with self._lock:
            self._requests[status] += 1
            self._seconds += seconds

    def render(self, batcher: Batcher, report: Any) -> str:
        """The page; `report` is what `clinfast.report` gave."""
        with self._lock:
            requests, seconds = dict(self._requests), self._seconds
        lines = ["# TYPE embedding_requests_total counter"]
        lines += [f'embedding_requests_total{{status="{status}"}} {n}' for status, n in sorted(requests.items())]
        for name, kind, value in (
            ("embedding_request_seconds_total", "counter", f"{seconds:.6f}"),
            ("embedding_batches_total", "counter", batcher.batches),
            ("embedding_texts_total", "counter", batcher.texts),
            ("embedding_tokens_total", "counter", batcher.tokens),
            ("embedding_cancelled_total", "counter", batcher.cancelled),
            ("embedding_waiting_requests", "gauge", batcher.waiting_jobs),
            ("embedding_waiting_tokens", "gauge", batcher.waiting_tokens),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += [
            "# TYPE clinfast_calls_total counter",
            f'clinfast_calls_total{{path="fast"}} {report.calls_fast}',
            f'clinfast_calls_total{{path="stock"}} {report.calls_stock}',
            "# TYPE clinfast_fallbacks_total counter",
        ]
        lines += [f'clinfast_fallbacks_total{{reason="{_label(r)}"}} {n}' for r, n in sorted(report.fallbacks.items())]
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
