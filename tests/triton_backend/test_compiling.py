"""Kernels compiled ahead of time for every device class: nothing spills, and products are done by matrix instructions.

The default run compiles every code path; `-m exhaustive` (make triton-check) every configuration of the tuning tables.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: nothing can be compiled")

from clinfast.triton_kernels import configs, variants

HERE = Path(__file__).parent
# What the products of each class are done by: wgmma on Hopper for tiles of 64 rows, tcgen05 on 10.0, mma elsewhere.
MATRIX = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}, 120: {"HMMA"}}
WIDEST = {90: "HGMMA", 100: "UTCHMMA"}
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.fixture(scope="module")
def code_paths():
    """All classes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        waiting = {of_class: pool.submit(compiled, of_class) for of_class in configs.CLASSES}
        yield waiting


def compiled(of_class, *options):
    """In a process of its own: an assembler's error can end it, and an interpreting one could not compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compiles.py"), "--classes", str(of_class), *options], env=environment,
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and lines[-1] == {"done": True}, done.stdout[-2000:] + done.stderr[-4000:]
    return lines[:-1]


def check(found, of_class):
    failures = [f"{one['key']}: {one['error']}" for one in found if "error" in one]
    for one in found:
        if "error" in one:
            continue
        where = f"{one['key']} on class {of_class}"
        if one["stack"]:
            failures.append(f"{where} spills {one['stack']} bytes a thread")
        if one["shared"] > SHARED[of_class] << 10:
            failures.append(f"{where} takes {one['shared']} bytes of shared memory")
        if variants.KERNELS[one["kernel"]].matrix and one["types"][0] != "fp32":
            if not set(one["matrix"]) & MATRIX[of_class]:
                failures.append(f"{where} multiplies without a matrix instruction")
        elif one["matrix"] and one["types"][0] != "fp32":
            failures.append(f"{where} is no product, but has {one['matrix']}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("of_class", configs.CLASSES)
def test_every_code_path(of_class, code_paths):
    found = code_paths[of_class].result()
    check(found, of_class)
    expected = {name for name, kernel in variants.KERNELS.items() if kernel.matrix or of_class in (80, 90)}
    expected -= {"linear_tma_kernel"} if of_class not in WIDEST else set()
    expected -= {"quantise_kernel"} if of_class < variants.FP8_CLASS else set()
    assert {one["kernel"] for one in found} >= expected
    quantised = [one for one in found if one["kernel"] == "quantise_kernel"]
    assert bool(quantised) is (of_class >= variants.FP8_CLASS)
    assert all("fp8e4nv" in one["types"] for one in quantised)
    if of_class in WIDEST:
        wide = [one for one in found if one["kernel"] == "linear_tma_kernel"]
        assert wide and all(WIDEST[of_class] in one["matrix"] for one in wide)


@pytest.mark.exhaustive
@pytest.mark.parametrize("of_class", configs.CLASSES)
def test_every_configuration(of_class):
    check(compiled(of_class, "--all"), of_class)


def test_tables_agree_with_their_names_and_defaults_are_said_once(caplog):
    for of_class in configs.CLASSES:
        assert configs.table(of_class)["device_class"] == of_class
    with caplog.at_level("INFO", logger="clinfast"):
        for _ in range(3):
            configs.linear(80, 2, 123, 457, 64)
    assert [record.getMessage() for record in caplog.records].count(
        "clinfast: no tuned tiles for linear of 123 x 457 on class 80: the default serves"
    ) <= 1


@pytest.mark.parametrize(
    ("capability", "of_class"),
    [((7, 5), 80), ((8, 0), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_classes_of_cards(capability, of_class):
    assert configs.device_class(capability) == of_class


def test_keys_tell_variants_apart():
    for of_class in configs.CLASSES:
        found = variants.shipped(of_class) + variants.tabled(of_class)
        assert len({variant.key for variant in found}) == len(found) > 100


def test_a_table_of_ones_own(tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    own = json.loads((configs.TABLES / "sm_90.json").read_text())
    own["rows"]["512"] = {"rows": 9, "num_warps": 2}
    path.write_text(json.dumps(own))
    monkeypatch.setenv("CLINFAST_TUNING_TABLE", str(path))
    configs.table.cache_clear()
    try:
        assert configs.table(90)["rows"]["512"]["rows"] == 9
        assert configs.table(80)["device_class"] == 80
        path.write_text("[]")
        configs.table.cache_clear()
        with pytest.raises(ValueError, match="is not a tuning table"):
            configs.table(90)
    finally:
        configs.table.cache_clear()
