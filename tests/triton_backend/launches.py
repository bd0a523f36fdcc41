"""Run by `test_launching.py`: compiles three cubins in a child, then launches them into the stub. Prints JSON."""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

FOLDER = Path(sys.argv[1])
BUILD = """
import sys
from pathlib import Path
from clinfast.triton_kernels import build, configs, variants
rows, warps = configs.rows(90, 512)
absent = ("residual_ptr", "bias_ptr")
norm = variants.make("layer_norm_kernel", variants.NORM, (rows, 512), warps, floats="bf16", absent=absent)
linear = variants.linear_variant(configs.linear(90, 2, 768, 3072, 1 << 20), "gelu", "bf16")
if __name__ == "__main__":
    build.build(90, [norm, linear], Path(sys.argv[1]), 1)
"""


def stubbed():
    """The CPU plays a Hopper card whose driver is the stub."""
    from clinfast.backends.triton import cubins, device

    device.TYPE = "cpu"
    device.capability = lambda index: (9, 0)
    device.multiprocessors = lambda index: 4
    cubins.FOLDER = FOLDER
    return ctypes.CDLL(os.environ["CLINFAST_LIBCUDA"])


def main():
    script = FOLDER / "build_them.py"
    script.write_text(BUILD)
    subprocess.run([sys.executable, str(script), str(FOLDER)], check=True, stdout=sys.stderr)
    stub = stubbed()
    from clinfast.backends.triton import cubins, launch
    from clinfast.backends.triton.layer_norm import layer_norm
    from clinfast.backends.triton.linear import GpuLinear
    from clinfast.triton_kernels import configs

    log = FOLDER / "log"
    stub.stub_open(str(log).encode())
    x = torch.zeros(9, 384, dtype=torch.bfloat16)
    weight, shift = torch.ones(384), torch.zeros(384)
    kept = []
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: kept.append(empty(*args, **kwargs)) or kept[-1]
    layer_norm(x, None, weight, shift, 1e-12)
    torch.empty = empty
    before = stub.stub_contexts()
    stub.stub_forget_context()
    worker = threading.Thread(target=layer_norm, args=(x, None, weight, shift, 1e-12))
    worker.start()
    worker.join()
    entered = stub.stub_contexts() - before

    linear = GpuLinear(torch.zeros(128, 64), torch.zeros(128), torch.bfloat16)
    rows = torch.zeros(70, 64, dtype=torch.bfloat16)
    tiles = configs.linear(90, 2, 768, 3072, 1 << 20)
    linear.product(rows, "gelu", None, tiles)
    counts = dict(launch.launches)
    stub.stub_close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]

    run = launch._runners[next(key for key in launch._runners if key[0] == "layer_norm_kernel")]
    loaded = run.__closure__[[c for c in run.__code__.co_freevars].index("fire")].cell_contents.__self__
    native = cubins.launcher()
    plain = [x.data_ptr(), weight.data_ptr(), shift.data_ptr(), kept[-1].data_ptr(), 9, 384, 384, 0, 384, 1e-12]
    off = [plain[0] + 2, *plain[1:]]
    wide = [*plain[:4], 2**31, *plain[5:]]
    start = time.perf_counter()
    for _ in range(20000):
        native.launch_kernel(loaded._handle, 0, 3, 1, 1, *plain)
    microseconds = (time.perf_counter() - start) / 20000 * 1e6
    print(f"a launch takes {microseconds:.2f} us", file=sys.stderr)
    print(json.dumps({
        "launches": counts,
        "triton_was_imported": "triton" in sys.modules,
        "recorded": [line for line in lines if "entry" in line],
        "maps": [line for line in lines if "map" in line],
        "maps_after_a_second_call": stub.stub_maps(),
        "norm_arguments": plain[:9],
        "contexts_entered": entered,
        "unaligned": native.launch_kernel(loaded._handle, 0, 3, 1, 1, *off),
        "wide": native.launch_kernel(loaded._handle, 0, 3, 1, 1, *wide),
        "microseconds": microseconds,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
