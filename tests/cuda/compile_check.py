"""Compiles every CUDA source and reads what ptxas says of each kernel: `python -m compile_check` here, or
`make cuda-check`. Results are kept by content, so that only what changed is compiled again.

A spill, a stack frame, or a warning of ptxas about wgmma or setmaxnreg (C75xx) is an error. So is, from sm_90 on, a
kernel that could touch global memory before it has waited for the grids before it (programmatic dependent launch).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_check"
TARGETS = ("75", "80", "86", "89", "90a", "100", "120")
DEFAULT_TARGETS = ("80", "90a", "120")
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v", "-I", str(CSRC)]
CUTLASS_TARGETS = {"linear_wgmma": ("90a",), "linear_mma": ("80", "86", "89")}
# Where a stack frame is no sign of trouble: none today.
SLOW_KERNELS: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one target; bytes."""

    name: str
    source: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int


def cutlass() -> str | None:
    """The folder that holds CUTLASS's include/: CLINFAST_CUTLASS, or the Python package nvidia-cutlass."""
    asked = os.environ.get("CLINFAST_CUTLASS")
    spec = importlib.util.find_spec("cutlass_library")
    if asked or spec is None or not spec.submodule_search_locations:
        return asked
    return str(Path(spec.submodule_search_locations[0]) / "source")


def flags(source: Path, target: str) -> list[str]:
    found = cutlass()
    if target not in CUTLASS_TARGETS.get(source.stem, ()) or found is None:
        return FLAGS
    includes = ["-I", f"{found}/include", "-I", f"{found}/tools/util/include"]
    return [*FLAGS, "-DCLINFAST_CUTLASS", "--expt-relaxed-constexpr", *includes]


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The disassembler: the toolkit's, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return found
    theirs = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(theirs) if theirs.exists() else None


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _key(source: Path, target: str) -> str:
    read = "disassembled" if cuobjdump() and waits_for_grids(target) else ""
    digest = hashlib.sha256(" ".join([version(), target, read, *flags(source, target)]).encode())
    for file in [source, *sorted((CSRC / "cuda").glob("*.*h"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:20]


def version() -> str:
    words = nvcc()
    assert words is not None
    return subprocess.run([words, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def messages(source: Path, target: str) -> str:
    """What nvcc and ptxas say; raises RuntimeError where the source does not compile."""
    kept = CACHE / f"{source.stem}.sm_{target}.{_key(source, target)}.txt"
    if kept.exists():
        return kept.read_text()
    CACHE.mkdir(parents=True, exist_ok=True)
    compiler = nvcc()
    assert compiler is not None
    made = kept.with_suffix(f".{os.getpid()}.cubin")
    words = [compiler, *flags(source, target), f"-arch=sm_{target}", "-cubin", str(source), "-o", str(made)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{target}:\n{done.stdout}{done.stderr}")
    tool = cuobjdump()
    if tool is not None and waits_for_grids(target):
        code = subprocess.run([tool, "-sass", str(made)], capture_output=True, text=True, check=True).stdout
        done.stderr += "".join(f"{line}\n" for line in grid_waits(code))
    made.unlink(missing_ok=True)
    for old in CACHE.glob(f"{source.stem}.sm_{target}.*.txt"):
        old.unlink()
    kept.write_text(done.stdout + done.stderr)
    return done.stdout + done.stderr


def waits_for_grids(target: str) -> bool:
    return int(target.rstrip("a")) >= 90


# Reads and writes of global memory by their names in machine code, and what leaves a straight line.
GLOBAL = r"(LDG|STG|LD|ST|LDGSTS|LDGDEPBAR|ATOM|ATOMG|RED|REDG|UTMALDG|UTMASTG|UBLKCP|CCTL)"
TURNS = r"(BRA|BRX|JMP|CALL|EXIT|RET|BSSY|WARPSYNC)"


def grid_waits(code: str) -> list[str]:
    """For each kernel of a disassembly: `grid wait: NAME: first`, or what is wrong with its wait for earlier grids.

    Right is: griddepcontrol.wait (ACQBULK) stands in the straight line that a kernel begins with, before any access to
    global memory, and griddepcontrol.launch_dependents (PREEXIT) behind it. A kernel of CUTLASS has both, elsewhere.
    """
    found = []
    for part in code.split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        lines = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", part)
        if "ACQBULK" not in lines or "PREEXIT" not in lines:
            found.append(f"grid wait: {name}: missing")
            continue
        before = lines[: lines.index("ACQBULK")]
        early = [word for word in before if re.fullmatch(f"{GLOBAL}|{TURNS}", word)]
        found.append(f"grid wait: {name}: " + (f"after {', '.join(early)}" if early else "first"))
    return found


def kernels(source: Path, target: str) -> list[Kernel]:
    text = messages(source, target)
    found = []
    for entry in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'([^']+)'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        assert name and registers and frame, entry[:500]
        shared = re.search(r"(\d+) bytes smem", entry)
        stack, stores, loads = map(int, frame.groups())
        found.append(
            Kernel(
                short_name(name[1]), source.stem, target, int(registers[1]), int(shared[1]) if shared else 0, stack,
                stores + loads,
            )
        )  # fmt: skip
    return found


def short_name(mangled: str) -> str:
    """`layer_norm_kernel<float, 6, 32, true>` of a mangled name."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
    if len(plain) > 200:  # CUTLASS's, of a kilobyte
        return f"CUTLASS {'bf16' if 'bfloat16' in plain else 'fp16'}, {zlib.crc32(mangled.encode()):08x}"
    plain = re.sub(r"clinfast::cuda::|\(anonymous namespace\)::|^void ", "", plain)
    return re.sub(r"\(\w+\)", "", plain.removesuffix(plain[plain.rfind("(") :]) if plain.endswith(")") else plain)


def complaints(source: Path, target: str) -> list[str]:
    """What must not be: spills, stack frames, serialised wgmma, ignored setmaxnreg."""
    found = [
        f"{k.name} on sm_{target}: {k.stack} bytes of stack, {k.spills} of spills"
        for k in kernels(source, target)
        if (k.stack or k.spills) and not k.name.startswith(SLOW_KERNELS or ("\0",))
    ]
    text = messages(source, target)
    lines = [line for line in text.splitlines() if re.search(r"C75\d\d", line)]
    waits = [line.split(": ")[1:] for line in text.splitlines() if line.startswith("grid wait: ")]
    late = [
        f"{short_name(name)} on sm_{target}: its wait for earlier grids is {where}"
        for name, where in waits
        if where != "first" and not ("cutlass" in name and where != "missing")
    ]
    return found + late + [f"{source.name} on sm_{target}: {line}" for line in lines]


def compile_all(targets: tuple[str, ...]) -> None:
    """Everything that is not kept yet, on all cores."""
    work = [(source, target) for source in sources() for target in targets]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda pair: messages(*pair), work):
            pass


def table(targets: tuple[str, ...]) -> str:
    """Registers (and static shared memory) of each kernel, a column a target."""
    rows: dict[str, dict[str, str]] = {}
    for source in sources():
        for target in targets:
            for kernel in kernels(source, target):
                shared = f" {kernel.shared}B" if kernel.shared else ""
                rows.setdefault(kernel.name, {})[target] = f"{kernel.registers}{shared}"
    width = max(map(len, rows))
    lines = [f"{'registers, static shared memory':{width}}" + "".join(f" {'sm_' + t:>11}" for t in targets)]
    lines += [
        f"{name:{width}}" + "".join(f" {cells.get(target, ''):>11}" for target in targets)
        for name, cells in sorted(rows.items())
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make cuda-check", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of: " + ", ".join(TARGETS))
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    targets = tuple(options.targets.split(","))
    if nvcc() is None:
        print("cuda-check: nothing to do: there is no nvcc.")
        return 0
    compile_all(targets)
    print(table(targets))
    if options.json:
        found = [dataclasses.asdict(k) for source in sources() for target in targets for k in kernels(source, target)]
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    wrong = [line for source in sources() for target in targets for line in complaints(source, target)]
    if cuobjdump() is None:
        print("cuda-check: waits for earlier grids were not looked at: there is no cuobjdump (it comes with Triton)")
    print("\n".join(wrong) if wrong else f"cuda-check: no spill, no stack frame, no C75xx for {', '.join(targets)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
