"""Imports go down only: the floors of the library, held."""

import ast
from pathlib import Path

import clinfast

PACKAGE = Path(clinfast.__file__).parent

FLOORS = {
    "triton_kernels": 0,
    "_C": 0,
    "ops": 1,
    "backends": 1,
    "engine": 2,
    "models": 3,
    "patch": 4,
    "guard": 4,
    "forward": 4,
    "reason": 4,
    "snapshot": 4,
    "__main__": 5,
    "api": 5,
    "canary": 5,
    "bench": 5,
    "cli": 5,
    "demo": 5,
    "integrations": 5,
    "model_folder": 5,
    "report": 5,
    "rounded": 5,
    "texts": 5,
    "verify": 5,
}


def floor_of(module: str) -> int:
    parts = module.split(".")
    return 5 if len(parts) == 1 else FLOORS[parts[1]]


def imported_modules(path: Path, module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "clinfast"}
    return {name for name in found if name.split(".")[0] == "clinfast" and name != "clinfast"}


def sources() -> list[tuple[str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [
        (".".join(("clinfast", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"), file)
        for file in files
    ]


def test_every_source_has_a_floor():
    assert len(sources()) > 20
    for module, _ in sources():
        floor_of(module)


def test_imports_go_down_only():
    upward = [
        f"{module} (floor {floor_of(module)}) imports {name} (floor {floor_of(name)})"
        for module, file in sources()
        for name in imported_modules(file, module)
        if floor_of(name) > floor_of(module)
    ]
    assert not upward, "\n".join(upward)


def test_only_the_models_floor_knows_architectures():
    for module, file in sources():
        if floor_of(module) != 3 and floor_of(module) < 5:
            named = [name for name in imported_names(file) if name.startswith("transformers.models")]
            assert not named, f"{module} imports {named}"


def imported_names(path: Path) -> list[str]:
    return [
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]


def test_csrc_has_no_torch_header():
    csrc = PACKAGE.parent / "csrc"
    for file in csrc.rglob("*"):
        if file.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            text = file.read_text()
            assert "torch/" not in text and "ATen" not in text and "c10/" not in text, file
