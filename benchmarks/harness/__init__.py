"""What is this project's own about its model benchmarks; the harness itself is `clinfast.bench`."""

import os
from pathlib import Path

# A variable, so that worker processes see it too.
os.environ.setdefault("CLINFAST_BENCH_CACHE", str(Path(__file__).resolve().parents[1] / ".cache"))
