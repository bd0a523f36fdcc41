"""Every kernel through Triton's interpreter, on the CPU, in a process of its own: interpreting and compiling exclude
each other. What the interpreter leaves unproved is said in `interpreter/interpreter.py`."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: no kernel can be interpreted")
HERE = Path(__file__).parent
PARTS = ("attention", "encoder", "disentangled", "rows", "linear", "packing", "fp8")  # the longest first


def old_interpreter_new_numpy():
    numbers = [tuple(int(x) for x in v.split("+")[0].split(".")[:2]) for v in (triton.__version__, numpy.__version__)]
    return numbers[0] < (3, 7) and numbers[1] >= (2, 4)


def run(part):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider",
         str(HERE / "interpreter" / f"test_interpreted_{part}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=HERE.parents[1], capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running():
    """All parts, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {part: pool.submit(run, part) for part in PARTS}


@pytest.mark.skipif(old_interpreter_new_numpy(), reason="the interpreter of Triton 3.6 needs numpy<2.4")
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part, running):
    done = running[part].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]
