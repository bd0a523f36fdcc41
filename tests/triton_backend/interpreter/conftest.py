"""Runs in a process of its own, which `test_interpreted.py` starts: Triton interprets or compiles, by process."""

import os
import sys
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parents[1] / "ops"), str(here.parents[1] / "engine")]
    import torch
    from interpreter import install

    from clinfast.backends.triton import cubins, device, launch
    from clinfast.ops import registry

    install()
    # The CPU plays a GPU of four multiprocessors.
    device.TYPE = "cpu"
    device.capability = lambda index: (9, 0)
    device.multiprocessors = lambda index: 4
    device.no_gpu = device.no_compiler = lambda: None
    device.current = lambda: 0
    cubins.available = lambda index: False
    cubins.find = lambda *args: None
    # A kernel that does not run is a failure, not a reason for PyTorch to serve.
    launch._try = lambda name, call: call()
    registry.BACKENDS = {
        "triton": registry.Backend("clinfast.backends.triton", ("cpu",), partial=True),
        "torch": registry.BACKENDS["torch"],
    }
    registry.KERNEL_DTYPES["cpu"] = registry.KERNEL_DTYPES["cuda"]


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["ampere", "hopper"])
def card(request, monkeypatch):
    """Pointers, or descriptors."""
    from clinfast.backends.triton import device

    monkeypatch.setattr(device, "capability", lambda index: request.param)
    return request.param


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)
