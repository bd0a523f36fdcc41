"""Makes the weights of one model: `python -m benchmarks.harness.build NAME FOLDER` (called by `cache.ensure`)."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.sources import save_random

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    save_random(name, Path(folder))
