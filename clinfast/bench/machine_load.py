"""How much of the machine others used while a contender was timed: a figure that says whether to trust it."""

from __future__ import annotations

import os
from time import perf_counter

TICK = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """CPU seconds that this machine has spent at work since it started, stolen time included."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICK


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class MachineLoad:
    """Adds up over the rounds of a cell; `others` is the mean number of cores that were busy for others."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.foreign = 0.0

    def begin(self, pid: int) -> None:
        self._start = (perf_counter(), busy_seconds(), cpu_seconds(pid), sum(os.times()[:2]))

    def end(self, pid: int) -> None:
        start, busy, worker, own = self._start
        self.seconds += perf_counter() - start
        known = cpu_seconds(pid) - worker + sum(os.times()[:2]) - own
        self.foreign += busy_seconds() - busy - known

    @property
    def others(self) -> float:
        return max(0.0, self.foreign / self.seconds) if self.seconds else 0.0
