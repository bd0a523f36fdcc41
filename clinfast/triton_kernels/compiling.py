"""Compiles a variant for a device class on any machine, and reads what the compiler made of it."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from clinfast.triton_kernels import versions
from clinfast.triton_kernels.variants import KERNELS, Variant

# By kind of parameter, its bytes in the compiled kernel.
SIZES = {"P": 8, "p": 8, "D": 4, "i": 4, "f": 4, "l": 8, "T": 128}
# Product instructions, by the name they have in the machine code of one generation or another.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
ELEMENTS = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}


class Compiled(NamedTuple):
    """`kinds`: of each parameter of the compiled kernel, as the launcher takes them, without the two of scratch."""

    cubin: bytes
    entry: str
    kinds: str
    shared: int
    num_warps: int
    descriptors: list[dict[str, Any]]


class Static(NamedTuple):
    """What stands in the machine code: `stack` bytes a thread are spills; `matrix` product instructions;
    `loop` the instructions of the smallest loop that holds one, 0 where there is none."""

    registers: int
    stack: int
    shared: int
    matrix: tuple[str, ...]
    loop: int
    instructions: int


def compile_variant(variant: Variant, of_class: int) -> Compiled:
    """Needs Triton, not a GPU. An error of the assembler may end the process: compile in a child."""
    versions.choose_assembler()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = KERNELS[variant.kernel]
    function = getattr(importlib.import_module(f"clinfast.triton_kernels.{spec.module}"), variant.kernel)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    kinds = ""
    values = dict(zip(spec.constants, variant.constants, strict=True))
    for at, ((name, kind), element) in enumerate(zip(spec.arguments, variant.types, strict=True)):
        if element == "-":
            signature[name], constants[(at,)] = "constexpr", None
            continue
        if kind == "T":
            signature[name] = f"tensordesc<{element}[{_block(name, values)}]>"
            kinds += "Tiill"
        else:
            signature[name] = f"*{element}" if kind in "Pp" else element
            kinds += kind
        if kind in "PD":
            attributes[(at,)] = [["tt.divisibility", 16]]
    for at, (name, value) in enumerate(values.items(), len(spec.arguments)):
        signature[name], constants[(at,)] = "constexpr", value
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = versions.options(variant.num_warps, variant.num_stages, variant.registers)
    made = triton.compile(source, target=GPUTarget("cuda", of_class, 32), options=options)
    _check_parameters(made.asm["ptx"], kinds)
    meta = made.metadata
    if getattr(meta, "global_scratch_size", 0):
        raise ValueError(f"{variant.key} wants scratch memory, which the launcher does not give")
    descriptors = [
        {"box": d["block_size"], "swizzle": d["swizzle"], "type": versions.host_element(d["elem_type"])}
        for d in versions.descriptor_metadata(made)
    ]
    return Compiled(made.asm["cubin"], meta.name, kinds, meta.shared, meta.num_warps, descriptors)


def _block(name: str, values: dict[str, Any]) -> str:
    first, second = {"x_desc": ("M", "K"), "w_desc": ("N", "K"), "out_desc": ("M", "N")}[name]
    return f"{values[f'BLOCK_{first}']}, {values[f'BLOCK_{second}']}"


def _check_parameters(ptx: str, kinds: str) -> None:
    """The launcher's view of the parameters against the compiler's, with the two of scratch behind."""
    found = []
    start = ptx.index(".entry")
    for line in ptx[start : ptx.index("\n{", start)].splitlines():
        if ".param" in line:
            block = re.search(r"\[(\d+)\]", line)
            width = re.search(r"\.[usbf](\d+) ", line)
            found.append(int(block[1]) if block else int(width[1]) // 8 if width else 0)
    expected = [SIZES[kind] for kind in kinds] + [8, 8]
    if found != expected:
        raise ValueError(f"the kernel takes parameters of {found} bytes, the launcher would pass {expected}")


def static(cubin: bytes, shared: int) -> Static:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(file))
        code = _run("cuobjdump", "-sass", str(file))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    names = [name.split(".")[0] for _, name, _ in lines]
    matrix = tuple(kind for kind in MATRIX if kind in names)
    return Static(registers, stack, shared, matrix, _loop(lines), len(lines))


def _loop(lines: list[tuple[str, str, str]]) -> int:
    """Instructions of the smallest loop, by its branch back, with a product in it."""
    index = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    smallest = 0
    for i, (_, name, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        start = index.get(int(target[1], 16)) if target else None
        if start is not None and start < i and any(n.split(".")[0] in MATRIX for _, n, _ in lines[start : i + 1]):
            smallest = min(smallest or i, i - start + 1)
    return smallest


def _run(tool: str, *words: str) -> str:
    done = subprocess.run([str(versions.tool(tool)), *words], capture_output=True, text=True, check=True)
    return done.stdout
