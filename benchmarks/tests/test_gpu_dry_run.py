"""The benchmarks of the Triton kernels from end to end without a GPU (`cuda_on_cpu.py`); times mean nothing there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: no kernel can be interpreted")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# One case of each benchmark; the rest differ in sizes, which are small here anyway.
CASES = (
    "attention.py::bench_varlen_attention[mixed_32_512]", "rows.py::bench_add_layer_norm[768]",
    "rows.py::bench_embedding[sum]", "linear.py::bench_linear_gelu[768x3072-8192]",
    "packing.py::bench_pack_and_unpack[32x512]", "packing.py::bench_launch",
)  # fmt: skip


def old_interpreter_new_numpy():
    numbers = [tuple(int(x) for x in v.split("+")[0].split(".")[:2]) for v in (triton.__version__, numpy.__version__)]
    return numbers[0] < (3, 7) and numbers[1] >= (2, 4)


@pytest.mark.skipif(old_interpreter_new_numpy(), reason="the interpreter of Triton 3.6 needs numpy<2.4")
def test_gpu_benchmarks_run(tmp_path):
    path = tmp_path / "ops.json"
    cases = [f"benchmarks/gpu/bench_triton_{case}" for case in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "cuda_on_cpu", "-p", "no:cacheprovider",
         f"--benchmark-json={path}", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = {one["name"]: one["extra_info"] for one in json.loads(path.read_text())["benchmarks"]}
    assert len(found) == len(CASES) and all(facts["card"] == "No card" for facts in found.values())
    assert [goal["name"] for facts in found.values() for goal in facts.get("goals", ())] == [
        "ratio", "share_of_copy", "over_product_then_gelu", "share_of_forward",
    ]  # fmt: skip
