"""The launch path without a GPU: real cubins through `clinfast._C` into a library that only writes down its calls."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile cubins with")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stub of libcuda with")
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, HERE / "stub_libcuda.c"], check=True)
    return path


def run(script, stub, folder, **environment):
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(folder)],
        env={**os.environ, "CLINFAST_LIBCUDA": str(stub), **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def facts(stub, tmp_path_factory):
    return run("launches.py", stub, tmp_path_factory.mktemp("cubins"))


def test_cubins_are_launched_without_triton(facts):
    assert facts["launches"] == {"cubin": 3, "jit": 0}
    assert not facts["triton_was_imported"]


def test_a_launch_is_what_the_kernel_takes(facts):
    norm = facts["recorded"][0]
    assert norm["entry"] == "layer_norm_kernel"
    assert norm["grid"] == [3, 1, 1] and norm["block"] == [128, 1, 1] and norm["stream"] == 0
    expected = facts["norm_arguments"]
    # Pointers, sizes and strides, eps, then two empty pointers of scratch.
    assert norm["values"][:4] == expected[:4]
    assert [v & 0xFFFFFFFF for v in norm["values"][4:9]] == expected[4:9]
    eps = ctypes.c_float.from_buffer_copy((norm["values"][9] & 0xFFFFFFFF).to_bytes(4, "little")).value
    assert eps == pytest.approx(1e-12)
    assert norm["values"][10:] == [0, 0]


def test_descriptors_come_by_value_with_shapes_and_strides(facts):
    linear = facts["recorded"][2]
    assert linear["entry"] == "linear_tma_kernel"
    assert linear["shared"] > 48 << 10 and linear["opt_in"] == linear["shared"]
    maps = facts["maps"]
    assert [m["shape"] for m in maps] == [[64, 70], [64, 128], [128, 70]]
    assert [m["row_bytes"] for m in maps] == [128, 128, 256]
    assert all(m["type"] == 9 and m["swizzle"] in (1, 2, 3) for m in maps)  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    # The first eight bytes of each map, as the stub wrote them: its number.
    assert linear["map_numbers"] == [1, 2, 3]
    assert facts["maps_after_a_second_call"] == 3


def test_a_thread_without_a_context_enters_the_devices(facts):
    assert facts["contexts_entered"] >= 1


def test_unaligned_arguments_are_not_launched(facts):
    assert facts["unaligned"] is False and facts["wide"] is False


def test_a_launch_costs_well_under_a_microsecond_of_c(facts):
    """Checks the order of magnitude, which says that nothing is built or looked up on the way, not a time."""
    assert facts["microseconds"] < 20


def test_no_driver_is_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from clinfast import _C; print(_C.open_driver('no-such-libcuda.so'))"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "no-such-libcuda.so" in done.stdout


def test_without_cubin_and_compiler_the_next_backend_serves(stub, tmp_path):
    facts = run("no_compiler.py", stub, tmp_path)
    assert facts["served"] == {"layer_norm[torch]": 2, "linear": "cuBLAS"}
    reason = "Triton needs a C compiler to launch what it compiles, and there is none (gcc, clang or CC)"
    assert facts["sentences"] == [
        f"clinfast: torch serves {op} where the package has no {kernel} for this card and shape, and {reason}"
        for op, kernel in (("layer_norm", "layer_norm_kernel"), ("linear", "linear_tma_kernel"))
    ]
