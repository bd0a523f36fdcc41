"""`make gpu-check`: build for the card at hand, test, benchmark; JSON out.

Uses the Python packages that are installed and no network. Runs in stages, each under nine minutes; what a stage
found is kept in `benchmarks/results/gpu/<card>/<commit>.json`. A stage that fails fails the run, and the others go on;
a second run does again what failed or is missing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGE_SECONDS = 540
REQUIRED = ("torch", "transformers", "pytest", "pytest_benchmark", "hypothesis", "numpy", "pybind11")
# Without them nothing that follows can be right.
NEEDED_STAGES = ("environment", "build")
PACKAGES = ("torch", "triton", "transformers", "pytest", "pytest-benchmark", "pybind11")


def command(*words: str, timeout: float = STAGE_SECONDS, **environment: str) -> dict[str, Any]:
    """Run one command from the project's root; its exit status, seconds and last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, text = (
            124,
            str(error.stdout or b"", "utf-8", "replace") if isinstance(error.stdout, bytes) else "",
        )
    seconds = time.monotonic() - start
    return {"command": " ".join(words), "status": status, "seconds": round(seconds, 1), "tail": text[-4000:]}


def git(*words: str) -> str:
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def environment() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    driver = "nvidia-smi is not installed"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "status": 0,
        "card": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "driver_clock_power": driver,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def build() -> dict[str, Any]:
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    folder = ROOT / "build" / f"sm_{architecture}"
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configured = command(
        "cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'clinfast'}",
    )  # fmt: skip
    if configured["status"]:
        return configured
    built = command("cmake", "--build", str(folder), "--target", "_C", "--parallel", str(os.cpu_count() or 1))
    says = [line.partition("-- ")[2] for line in configured["tail"].splitlines() if "CUDA kernels: " in line]
    return built if built["status"] else built | loads() | {"says": says}


def loads() -> dict[str, Any]:
    """Whether the module that was built loads here, with its CUDA half on this card."""
    from_new_process = (
        "from clinfast.backends.cuda import native; print('reason:', native.load_error()); "
        "print('CUTLASS:', native.kernels().has_cutlass())"
    )
    found = command(sys.executable, "-c", from_new_process, timeout=120)
    return {"status": found["status"], "loads": found["tail"].strip(), "tail": found["tail"]}


def tests(where: str, **environment: str) -> dict[str, Any]:
    """The tests marked gpu of one folder: other folders have none, and may want packages that are not here."""
    words = (sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-m", "gpu", where)
    return no_tests_is_fine(command(*words, **environment))


def cubins() -> dict[str, Any]:
    """The Triton kernels of this card's class as machine code in the package; what follows launches them."""
    import torch

    from clinfast.backends.triton import device
    from clinfast.triton_kernels import configs

    reason = device.no_compiler()
    if reason is not None:
        return {"status": 0, "note": reason}
    of_class = configs.device_class(torch.cuda.get_device_capability(0))
    return command(sys.executable, "-m", "clinfast.triton_kernels.build", "--classes", str(of_class))


def missing_packages() -> str | None:
    """What the tests and benchmarks import, and this Python has not."""
    absent = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{sys.executable} has no {', '.join(absent)}; install them, or name another Python: make gpu-check PYTHON=…"


def sanitizer() -> dict[str, Any]:
    """The CUDA C++ kernels on small shapes under memcheck and racecheck, where compute-sanitizer works."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not (ROOT / "tests" / "cuda").is_dir():
        return {"status": 0, "note": "compute-sanitizer is not installed"}
    works = command(tool, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')", timeout=120)
    if works["status"]:
        return {"status": 0, "note": "compute-sanitizer does not work here", "tail": works["tail"]}
    result: dict[str, Any] = {"status": 0}
    for check in ("memcheck", "racecheck"):
        found = command(
            tool, "--tool", check, "--error-exitcode", "99", sys.executable, "-m", "pytest", "-q", "-m", "gpu",
            "tests/cuda", "-k", "small or around or any_batch", timeout=STAGE_SECONDS / 2,
        )  # fmt: skip
        result[check] = found
        result["status"] = result["status"] or no_tests_is_fine(found)["status"]
        result["tail"] = found["tail"]
    return result


RESULTS = ROOT / "benchmarks" / "results" / "gpu"
MODELS = ("minilm", "bert-base", "bert-large", "distilbert-qa")
# Compiling a peer for one shape takes minutes: few cells a stage.
CELLS = ("1x16 1x128", "1x384 1x512", "32x128 8x512", "ragged-32", "squad-64")


def backends() -> dict[str, Any]:
    """The fastest backend of each op and size, and whether programmatic dependent launch gains."""
    table = RESULTS / "tuning.json"
    done = command(sys.executable, "-m", "clinfast", "tune", "--skip-tiles", "--output", str(table))
    if not done["status"]:
        found = json.loads(table.read_text())
        done["table"] = {key: found.get(key) for key in ("backends", "programmatic_launch")}
    return done


def bench(out: Path, *what: str) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    return no_tests_is_fine(command(sys.executable, "-m", "pytest", "-q", *what, f"--benchmark-json={out}"))


# Of the ops, by stage: what pytest runs. Inductor tunes its product for each size of the linear layer.
OPS = {
    "attention": ("bench_triton_attention.py",),
    "packing": ("bench_triton_packing.py",),
    "rows": ("bench_triton_rows.py",),
    "linear 768x3072": ("bench_triton_linear.py", "-k", "768x3072"),
    "linear 1024x4096": ("bench_triton_linear.py", "-k", "1024x4096"),
    "CUDA attention": ("bench_cuda_attention.py",),
    "CUDA rows": ("bench_cuda_rows.py",),
    "CUDA linear": ("bench_cuda_linear.py",),
    "launching": ("bench_launching.py",),
}


def bench_ops(name: str) -> dict[str, Any]:
    file, *options = OPS[name]
    return bench(ops_file(name), f"benchmarks/gpu/{file}", *options)


def ops_file(name: str) -> Path:
    return RESULTS / f"ops-{name.replace(' ', '-').lower()}.json"


def goals() -> dict[str, Any]:
    """What the project's goals for single ops ask for, what was found, and which peer was the best."""
    says = []
    for file in filter(Path.exists, map(ops_file, OPS)):
        for one in json.loads(file.read_text())["benchmarks"]:
            facts = one["extra_info"]
            for goal in facts.get("goals", ()):
                bound = f"at least {goal['least']}" if "least" in goal else f"at most {goal['most']}"
                met = "met" if goal["met"] else "NOT MET"
                found = f"{goal['name']} {goal['found']:.3g}, wanted {bound}"
                says.append(f"{one['name']}: {found}: {met} (best peer {facts['best_peer']}, {facts['ratio']:.2f})")
    return {"status": 0, "says": says or ["no op was benchmarked"]}


def part(model: str, cells: str) -> Path:
    return RESULTS / "parts" / f"{model}-{cells.replace(' ', '-')}.json"


def bench_models(model: str, cells: str) -> dict[str, Any]:
    names = [f"benchmarks/gpu/bench_models.py::bench_model[{model}-{cell}]" for cell in cells.split()]
    return bench(part(model, cells), *names)


def report() -> dict[str, Any]:
    """All parts that are there as one JSON, table and plot, beside the results."""
    parts = [str(file) for model in MODELS for cells in CELLS if (file := part(model, cells)).exists()]
    if not parts:
        return {"status": 0, "note": "no model was benchmarked"}
    return command(sys.executable, "-m", "benchmarks.compare", "merge", str(RESULTS / "models.json"), *parts)


def no_tests_is_fine(result: dict[str, Any]) -> dict[str, Any]:
    if result["status"] == 5:
        result.update(status=0, note="pytest found none")
    return result


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "environment": environment,
    "build": build,
    "tests of the CUDA kernels": functools.partial(tests, "tests/cuda"),
    "tests of Triton by its compiler": functools.partial(
        tests, "tests/gpu/test_triton_on_gpu.py", CLINFAST_CUBINS="0"
    ),
    "cubins": cubins,
    "tests of the engine and of Triton": functools.partial(tests, "tests/gpu"),
    **{f"benchmarks: {name}": functools.partial(bench_ops, name) for name in OPS},
    "goals": goals,
    "backends": backends,
    "sanitizer": sanitizer,
    **{
        f"{model} {cells}": functools.partial(bench_models, model, cells) for model in MODELS for cells in CELLS
    },
    "report": report,
}


def gpu_reason() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument(
        "--restart", action="store_true", help="forget what earlier runs of this commit found"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated, of: " + ", ".join(STAGES)
    )
    options = parser.parse_args()
    unknown = set(options.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"--stages names {', '.join(sorted(unknown))}; the stages are {', '.join(STAGES)}")
    reason = gpu_reason()
    if reason is not None:
        print(f"gpu-check: nothing to do: {reason}.")
        return 0
    absent = missing_packages()
    if absent is not None:
        print(f"gpu-check: {absent}")
        return 1
    facts = environment()
    card = facts["card"].replace(" ", "-").lower()
    path = ROOT / "benchmarks" / "results" / "gpu" / card / f"{facts['commit'][:12] or 'no-commit'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {} if options.restart or not path.exists() else json.loads(path.read_text())
    failed = []
    for name in options.stages.split(","):
        if state.get(name, {}).get("status") == 0:
            print(f"gpu-check: {name}: done before")
            continue
        print(f"gpu-check: {name} ...", flush=True)
        state[name] = STAGES[name]()
        path.write_text(json.dumps(state, indent=1) + "\n")
        for line in state[name].get("says", ()):
            print(f"gpu-check: {line}")
        if state[name]["status"]:
            failed.append(name)
            print(state[name].get("tail", ""))
            print(f"gpu-check: {name} failed with status {state[name]['status']}; results so far: {path}", flush=True)
            if name in NEEDED_STAGES:
                return 1
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'all stages passed'}; results: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
