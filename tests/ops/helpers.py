"""What the op tests share: error budgets against fp64, offset views with sentinels, the instruction sets."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from clinfast.backends.cpu import native

SENTINEL = 12345.0
ISAS = native.kernels().available_isas() if native.load_error() is None else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set that this processor has."""
    kernels = native.kernels()
    kernels.select_isa(request.param)
    yield request.param
    kernels.select_isa(native.isa())


def assert_within_budget(ours: Tensor, stock: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Our error against fp64 is at most `factor` times stock's, plus half a rounding step of the dtype."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    assert torch.isfinite(ours.double()).all()
    scale = exact.abs().max().item() if exact.numel() else 0.0
    ours_error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    stock_error = (stock.double() - exact).abs().max().item() if exact.numel() else 0.0
    floor = torch.finfo(ours.dtype).eps * scale
    assert ours_error <= factor * stock_error + floor, (ours_error, stock_error, floor)


def offset_view(x: Tensor, padding: int = 3) -> Tensor:
    """`x` inside a larger tensor of sentinels: unaligned start, row stride larger than the row."""
    shape = [*x.shape]
    shape[-1] += 2 * padding
    shape[0] += 2
    big = torch.full(shape, SENTINEL).to(x.dtype)
    view = big[1:-1, ..., padding:-padding]
    view.copy_(x)
    return view


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def opcheck(name: str, args: tuple, kwargs: dict | None = None) -> None:
    torch.library.opcheck(
        getattr(torch.ops.clinfast, name).default, args, kwargs or {},
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


Reference = Callable[..., Tensor]
