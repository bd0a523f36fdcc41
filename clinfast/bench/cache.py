"""Things that are slow to make (weights, exported models, fp64 references), kept on disk and made once.

Each is made in a process of its own, so that a contender's process holds only the runtime that it times.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

# Where the package lies: the root of a checkout, or site-packages.
ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "CLINFAST_BENCH_CACHE"


class BuildError(RuntimeError):
    """A cached thing could not be made; the text is the last line that its process said."""


def root() -> Path:
    """`$CLINFAST_BENCH_CACHE`, or the user's cache folder."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clinfast"


def logs() -> Path:
    folder = root() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def key(**facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "said nothing"


def ensure(folder: Path, *what: str, threads: int, module: str = "clinfast.bench.build") -> Path:
    """`folder`, made if it is not there by `python -m MODULE WHAT... FOLDER`."""
    if folder.exists():
        return folder
    log = logs() / f"build-{folder.name}.log"
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = [sys.executable, "-m", module, *what, str(unfinished)]
    try:
        with log.open("w") as stream:
            done = subprocess.run(
                command, env=environment_of_worker(threads), stdout=stream, stderr=stream
            )
        if done.returncode:
            raise BuildError(last_line(log))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def environment_of_worker(threads: int) -> dict[str, str]:
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(_search_path()),
        VARIABLE: str(root()),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(root() / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _search_path() -> list[str]:
    """PYTHONPATH with a checkout in front, so that a child imports this very package from any working folder."""
    given = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return given if ROOT in installed else [str(ROOT), *given]
