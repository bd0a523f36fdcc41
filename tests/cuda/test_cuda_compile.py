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
