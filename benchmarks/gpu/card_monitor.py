"""Power and clocks of the card while a benchmark runs."""

from __future__ import annotations

import statistics
import subprocess
import threading
from typing import Any

FIELDS = ("power.draw", "clocks.sm", "clocks.mem", "temperature.gpu", "clocks_event_reasons.active")
SECONDS = 0.2


def sample() -> list[str] | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if done.returncode == 0 and len(values) == len(FIELDS) else None


def summary(samples: list[list[str]]) -> dict[str, Any]:
    """Mean and extremes of each field that is a number; `[N/A]` and the like are left out."""
    found: dict[str, Any] = {"samples": len(samples)}
    for name, column in zip(FIELDS, zip(*samples, strict=True), strict=False):
        if name.endswith("active"):
            found[name] = sorted(set(column))
            continue
        numbers = [float(x) for x in column if x.replace(".", "", 1).isdigit()]
        if numbers:
            found[name] = {"mean": statistics.mean(numbers), "least": min(numbers), "most": max(numbers)}
    return found


class Monitor:
    """`with Monitor() as seen: ...`; then `seen.summary()`."""

    def __enter__(self) -> Monitor:
        self.samples: list[list[str]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            values = sample()
            if values is None:
                return
            self.samples.append(values)
            self._stop.wait(SECONDS)

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        return summary(self.samples)
