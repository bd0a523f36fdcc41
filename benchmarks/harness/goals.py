"""Speed goals: how many times a peer's time is to be ours, per model, precision, peer and cell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clinfast.bench.race import OURS
from clinfast.bench.results import Results, cell_key

GOALS_FILE = Path(__file__).resolve().parents[1] / "goals.json"
BEST_OF = "best_of:"


@dataclass(frozen=True)
class Verdict:
    model: str
    precision: str
    against: str
    cell: str
    goal: float
    reached: float | None
    """Median over the rounds of the peer's time over ours; None where there is no measurement."""
    why_not: str = ""

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached >= self.goal


def verdicts(results: Results, file: Path = GOALS_FILE) -> list[Verdict]:
    if not file.exists():
        return []
    found = []
    for group, peers in json.loads(file.read_text()).items():
        model, precision = group.split("/")
        for against, cells in peers.items():
            for cell, goal in cells.items():
                reached, why_not = _reached(results, cell_key(model, precision, cell), against)
                found.append(Verdict(model, precision, against, cell, float(goal), reached, why_not))
    return found


def _reached(results: Results, key: str, against: str) -> tuple[float | None, str]:
    """The ratio to the named peer; for `best_of:a,b` to the faster of those that were timed."""
    entry = results["cells"].get(key)
    if entry is None:
        return None, "-"
    contenders = entry["contenders"]
    if contenders.get(OURS, {}).get("status") != "ok":
        return None, f"no {OURS}"
    peers = against.removeprefix(BEST_OF).split(",")
    ratios = [
        contenders[peer]["over_clinfast"]["median"]
        for peer in peers
        if "over_clinfast" in contenders.get(peer, {})
    ]
    return (min(ratios), "") if ratios else (None, f"no {against.removeprefix(BEST_OF)}")
