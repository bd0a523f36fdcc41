"""Builds the CUDA sources under the host emulation into a Python module, once for each content."""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_emulation"
NAME = "clinfast_cuda_emulated"
# The fibers need the first two: without them, results are wrong at -O2, or glibc stops a longjmp between stacks.
FLAGS = [
    "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden",
    "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized",
    "-Wno-uninitialized", "-Wno-clobbered",
]  # fmt: skip


def missing() -> str | None:
    """What this machine lacks for the emulation, or None."""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()!r}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def _sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda_bindings.cpp", HERE / "module.cpp"]


def _content() -> str:
    import pybind11

    digest = hashlib.sha256(" ".join([compiler(), pybind11.__version__, *FLAGS]).encode())
    for file in sorted([*_sources(), *CSRC.glob("cuda*.h"), *(CSRC / "cuda").glob("*.*h"), *HERE.glob("*.h")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """The module's file, compiled if its content is new."""
    import pybind11

    folder = CACHE / _content()
    module = folder / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    includes = ["-I", str(CSRC), "-I", str(HERE), "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.{os.getpid()}.o"
        run([compiler(), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _sources()))
    unfinished = module.with_suffix(f".{os.getpid()}")
    run([compiler(), "-shared", *map(str, objects), "-o", str(unfinished)])
    for file in objects:
        file.unlink()
    unfinished.rename(module)
    return module


def library(source: Path) -> Path:
    """A plain shared library of one source under the emulation, once for each content."""
    digest = hashlib.sha256(source.read_bytes() + _content().encode()).hexdigest()[:16]
    target = CACHE / f"{source.stem}.{digest}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        includes = ["-I", str(CSRC), "-I", str(HERE)]
        run([compiler(), *FLAGS, "-fvisibility=default", *includes, "-shared", str(source), "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-6000:]}")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
