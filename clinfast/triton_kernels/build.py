"""`python -m clinfast.triton_kernels.build`: compile the package's cubins, with Triton and without a GPU.

One archive a device class, `cubins/sm_90.zip`: the cubins and `manifest.json`, which says how each is launched. A
package without them works too: Triton then compiles at the first call.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from clinfast.triton_kernels import configs
from clinfast.triton_kernels.variants import Variant, shipped, sources

FOLDER = Path(__file__).parent / "cubins"
# A fixed time of day, so that the same kernels make the same archive.
EPOCH = (2020, 1, 1, 0, 0, 0)


def build(of_class: int, variants: Sequence[Variant], folder: Path, processes: int) -> Path:
    """Write the archive of one class. A kernel that does not compile ends the build with its name."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sm_{of_class}.zip"
    kernels, files = {}, {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for variant, made in zip(variants, pool.map(_compile, variants, [of_class] * len(variants)), strict=True):
            name = f"{variant.kernel}.{hashlib.sha256(variant.key.encode()).hexdigest()[:12]}.cubin"
            files[name] = made.cubin
            kernels[variant.key] = {**made._asdict(), "file": name}
            del kernels[variant.key]["cubin"]
    manifest = {"device_class": of_class, "triton": triton.__version__, "sources": sources(), "kernels": kernels}
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"manifest.json": json.dumps(manifest, indent=1).encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data, zipfile.ZIP_DEFLATED)
    partial.replace(path)
    return path


def _compile(variant: Variant, of_class: int):  # type: ignore[no-untyped-def]
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    from clinfast.triton_kernels.compiling import compile_variant

    try:
        return compile_variant(variant, of_class)
    except Exception as error:
        raise RuntimeError(f"{variant.key} for class {of_class}: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m clinfast.triton_kernels.build", description=__doc__)
    parser.add_argument(
        "--classes", type=int, nargs="+", default=list(configs.CLASSES), choices=configs.CLASSES, metavar="N",
        help="device classes, of " + ", ".join(map(str, configs.CLASSES)),
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    for of_class in options.classes:
        start, variants = time.monotonic(), shipped(of_class)
        path = build(of_class, variants, options.folder, options.processes)
        seconds, size = time.monotonic() - start, path.stat().st_size / 1e6
        print(f"class {of_class}: {len(variants)} kernels, {size:.1f} MB, {seconds:.0f} s: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
