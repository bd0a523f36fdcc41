"""Every CUDA source compiles, and ptxas finds nothing to complain of. Needs nvcc, no GPU."""

import compile_check
import pytest


@pytest.mark.parametrize("target", compile_check.DEFAULT_TARGETS)
@pytest.mark.parametrize("source", compile_check.sources(), ids=lambda source: source.stem)
def test_no_spill_no_stack_no_warning(source, target):
    if compile_check.nvcc() is None:
        pytest.skip("there is no nvcc")
    compile_check.compile_all(compile_check.DEFAULT_TARGETS)  # on all cores, kept by content
    wrong = compile_check.complaints(source, target)
    assert not wrong, "\n".join(wrong)


def test_a_spill_is_noticed(tmp_path, monkeypatch):
    if compile_check.nvcc() is None:
        pytest.skip("there is no nvcc")
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float *x, int n) {\n"
        "  float a[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; i++) a[i] = x[i * 32 + threadIdx.x];\n"
        "  for (int k = 0; k < n; k++)\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 96; i++) a[i] = a[i] * a[(i + 7) % 96] + k;\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; i++) x[i * 32 + threadIdx.x] = a[i];\n"
        "}\n"
    )
    monkeypatch.setattr(compile_check, "CACHE", tmp_path)
    assert any("spills on sm_80" in line and "of spills" in line for line in compile_check.complaints(source, "80"))


@pytest.mark.parametrize("source", compile_check.sources(), ids=lambda source: source.stem)
def test_every_kernel_waits_for_earlier_grids_before_it_touches_memory(source):
    """Programmatic dependent launch is right by that alone: see csrc/cuda/launch.cuh."""
    if compile_check.nvcc() is None or compile_check.cuobjdump() is None:
        pytest.skip("there is no nvcc, or no cuobjdump, which comes with Triton")
    for target in filter(compile_check.waits_for_grids, compile_check.DEFAULT_TARGETS):
        found = [x for x in compile_check.messages(source, target).splitlines() if x.startswith("grid wait: ")]
        assert len(found) == len(compile_check.kernels(source, target))
        assert all(line.endswith(": first") or "cutlass" in line for line in found), "\n".join(found)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("/*0000*/ MOV R1 ; /*0010*/ ACQBULK ; /*0020*/ PREEXIT ; /*0030*/ LDG.E R2 ;", "first"),
        ("/*0000*/ LDG.E R2 ; /*0010*/ ACQBULK ; /*0020*/ PREEXIT ;", "after LDG"),
        ("/*0000*/ @P0 EXIT ; /*0010*/ ACQBULK ; /*0020*/ PREEXIT ;", "after EXIT"),
        ("/*0000*/ ACQBULK ; /*0010*/ LDG.E R2 ;", "missing"),
    ],
)
def test_a_wait_that_comes_late_is_noticed(code, expected):
    assert compile_check.grid_waits(f"Function : kernel\n{code}") == [f"grid wait: kernel: {expected}"]
